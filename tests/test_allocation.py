"""Error curves and the allocation of sizes by layer, against what students really lose and weigh."""

from dataclasses import replace

import pytest
import tiny
import torch

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.tensors import tensors_of
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.importance.removal import sublayer_costs
from hf_minitron.plan import make_nonuniform_plan
from hf_minitron.pruning.nonuniform import Choice, allocate_layers, error_curves, nonuniform_plan, sublayer_parameters
from hf_minitron.pruning.prune import prune_model


@pytest.fixture(scope="module")
def scored():
    teacher, blocks = tiny.model("qwen2", dtype=torch.float32), tiny.blocks(400)
    statistics = calibrate(teacher, blocks, moments=True)
    tensors = tensors_of(teacher)
    curves = error_curves(tensors, statistics, steps=4)
    return teacher, blocks, statistics, tensors, curves


def test_curves_are_what_projections_lose(scored):
    teacher, blocks, statistics, tensors, curves = scored
    shape = tensors.architecture.shape
    assert [choice.sizes["ffn"] for choice in curves["ffn", 0]] == [0, 18, 36, 54, 72]
    assert [tuple(choice.sizes.values()) for choice in curves["heads", 0]] == [(0, 0), (2, 1), (2, 2), (4, 2)]
    assert all(choices[0].relative_error == 1 and choices[-1].relative_error < 1e-9 for choices in curves.values())
    assert all(a.relative_error >= b.relative_error for axis, layer in curves if axis == "ffn" for a, b in
               zip(curves[axis, layer], curves[axis, layer][1:], strict=False))  # fmt: skip
    name, ids = "model.layers.0.mlp.down_proj", blocks["input_ids"][:]

    def output(model):
        found = []
        hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: found.append(out))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        hook.remove()
        return found[0].flatten(0, 1)[::4]  # the tokens of the moments

    expected = output(teacher)
    student = prune_model(teacher, make_nonuniform_plan(statistics.scores, shape, {"ffn": [36, 72, 72]}), statistics)
    lost = (output(student) - expected).square().sum() / expected.square().sum()
    assert curves["ffn", 0][2].relative_error == pytest.approx(lost.item(), rel=0.05)


def test_sublayers_weigh_what_the_model_loses_with_them(scored):
    teacher, _, statistics, tensors, _ = scored
    architecture = tensors.architecture
    shape = architecture.shape

    def parameters(sizes):
        return prune_model(teacher, make_nonuniform_plan(statistics.scores, shape, sizes)).num_parameters()

    whole = teacher.num_parameters()
    for sizes in ({"ffn": 18}, {"ffn": 0}, {"heads": 2, "kv_heads": 1}, {"heads": 0, "kv_heads": 0}):
        full = {axis: shape[axis] for axis in sizes}
        lists = {axis: [size, shape[axis], shape[axis]] for axis, size in sizes.items()}
        assert sublayer_parameters(architecture, full) - sublayer_parameters(architecture, sizes) == whole - parameters(lists)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_budget_is_spent_and_kept(scored, share):
    teacher, blocks, statistics, tensors, curves = scored
    architecture = tensors.architecture
    full = sublayer_parameters(architecture, {"ffn": 72}) + sublayer_parameters(architecture, {"heads": 4, "kv_heads": 2})
    budget = int(share * 3 * full)
    plan = nonuniform_plan(tensors, replace(statistics, sublayer_costs=sublayer_costs(teacher, blocks)), budget)
    student = prune_model(teacher, plan, statistics)
    body = student.num_parameters() - 2 * 99 * 40 - 40  # embedding, head and the last norm
    assert 0.75 * budget < body <= budget


def test_what_matters_more_keeps_more():
    architecture = Architecture.of(tiny.config())
    ffn = [Choice({"ffn": size}, 1 - size / 72) for size in (0, 36, 72)]
    heads = [Choice({"heads": size, "kv_heads": size // 2}, 1 - size / 4) for size in (0, 4)]
    curves = {("ffn", layer): ffn for layer in range(3)} | {("heads", layer): heads for layer in range(3)}
    costs = {"ffn": torch.tensor([5.0, 0.1, 1.0]), "heads": torch.tensor([5.0, 5.0, -1.0])}
    budget = 2 * sublayer_parameters(architecture, {"heads": 4, "kv_heads": 2}) + sublayer_parameters(architecture, {"ffn": 72})
    sizes = allocate_layers(curves, costs, architecture, budget + sublayer_parameters(architecture, {"ffn": 36}))
    assert sizes == {"heads": [4, 4, 0], "kv_heads": [2, 2, 0], "ffn": [72, 0, 36]}
