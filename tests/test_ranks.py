"""Cuts of `kv_rank` and `q_rank`: exact where nothing is lost, near where little is, alike in memory and on disk."""

from dataclasses import replace

import pytest
import tiny
import torch

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.plan import make_plan
from hf_minitron.pruning.prune import prune_checkpoint, prune_model
from hf_minitron.shape import ShapeError

TYPES = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "youtu", "minicpm3", "axk1")
IDS = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(3))


def logits(model):
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the default kernel takes no float64
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def error(student, teacher):
    expected = logits(teacher)
    return float((logits(student) - expected).norm() / expected.norm())


def plan_of(model, **target):
    shape = Architecture.of(model.config).shape
    return make_plan({}, shape, shape.cut_to(target))


def givers(model):
    return [(name, module) for name, module in model.named_modules() if name.endswith(("q_a_proj", "kv_a_proj_with_mqa"))]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_full_rank_in_another_basis_computes_the_same(model_type):
    teacher = tiny.model(model_type)
    shape = Architecture.of(teacher.config).shape
    plan = plan_of(teacher)
    keep = {axis: [list(range(shape[axis]))] * shape["layers"] for axis in ("kv_rank", "q_rank")}
    student = prune_model(teacher, replace(plan, keep=keep))
    name, module = givers(student)[0]
    assert not torch.allclose(module.weight, dict(givers(teacher))[name].weight), "the basis is the old one"
    assert error(student, teacher) < 1e-5  # the norms compute in float32


@pytest.mark.parametrize("model_type", ["deepseek_v3", "minicpm3", "deepseek_v32"])
def test_a_row_of_few_directions_loses_nothing(model_type):
    teacher = tiny.model(model_type)
    with torch.no_grad():
        for name, module in givers(teacher):
            size = 14 if name.endswith("q_a_proj") else 10
            left, values, right = torch.linalg.svd(module.weight[:size], full_matrices=False)
            module.weight[:size] = left[:, :6] * values[:6] @ right[:6]
    student = prune_model(teacher, plan_of(teacher, kv_rank=6, q_rank=6))
    assert (student.config.kv_lora_rank, student.config.q_lora_rank) == (6, 6)
    assert error(student, teacher) < 1e-5


def test_what_the_text_holds_decides_and_more_directions_are_nearer():
    torch.manual_seed(5)
    teacher = tiny.model("youtu")
    directions = torch.randn(4, 40, dtype=torch.float64)
    with torch.no_grad():  # a text that lies in few directions of what projections read
        teacher.model.embed_tokens.weight.copy_(torch.randn(99, 4, dtype=torch.float64) @ directions)
    statistics = calibrate(teacher, tiny.Dataset.from_dict({"input_ids": IDS.tolist()}).with_format("torch"), moments=True)
    errors = {}
    for kept in (4, 6, 8):
        plan = plan_of(teacher, kv_rank=kept, q_rank=kept)
        errors[kept] = [error(prune_model(teacher, plan, given), teacher) for given in (None, statistics)]
    assert errors[4][1] < errors[4][0], errors
    assert errors[8][1] < errors[6][1] < errors[4][1], errors


@pytest.mark.parametrize(("model_type", "cut"), [("deepseek_v3", {"hidden": 24}), ("minicpm3", {"layers": 2}), ("youtu", {})])
def test_a_checkpoint_is_cut_as_a_model_in_memory(model_type, cut, tmp_path):
    teacher = tiny.model(model_type, torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    statistics = calibrate(teacher, tiny.blocks(), moments=True)
    shape = Architecture.of(teacher.config).shape
    after = shape.cut_to({"kv_rank": 8, "q_rank": 8, **cut})
    plan = make_plan(statistics.scores, shape, after)
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", statistics=statistics)
    student, in_memory = tiny.load_complete(tmp_path / "student"), prune_model(teacher, plan, statistics)
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name
    assert after.cache_bytes(3, 2) == 2 * tiny.cached_numbers(student, 3)
    assert after.kv_cache_bytes_per_token(2) < shape.kv_cache_bytes_per_token(2)
    assert after.num_parameters(Architecture.of(student.config).rows) == Architecture.of(student.config).shape.num_parameters(
        Architecture.of(student.config).rows
    )
    assert student.generate(IDS[:1, :4], max_new_tokens=2).shape[1] <= 6


def test_a_bias_of_the_first_factor_goes_along():
    teacher = tiny.model("deepseek_v3", attention_bias=True)
    with torch.no_grad():
        for _, module in givers(teacher):
            module.bias.mul_(30)  # so that the row is mostly the bias
    measured, plan = calibrate(teacher, tiny.blocks(), moments=True), plan_of(teacher, kv_rank=3, q_rank=3)
    without, fitted = (error(prune_model(teacher, plan, given), teacher) for given in (None, measured))
    assert fitted < 0.5 * without


@pytest.mark.parametrize(
    ("model_type", "target", "message"),
    [
        ("llama", {"kv_rank": 4}, "kv_rank: not an axis of this model"),
        ("deepseek_v3", {"kv_rank": 11}, "kv_rank: 11 is larger than the model's 10"),
        ("sarvam_mla", {"q_rank": 4}, "q_rank: not an axis of this model"),
        ("axk2", {"q_rank": 4}, "q_rank: cannot be cut in this model: its queries read the narrow row before the norm"),
    ],
)
def test_an_illegal_rank_is_refused(model_type, target, message):
    with pytest.raises(ShapeError, match=message):
        Architecture.of(tiny.config(model_type)).shape.cut_to(target)


def test_the_residual_is_named():
    inexact = Architecture.of(tiny.config("deepseek_v3")).inexact
    assert "differs from token to token" in inexact["kv_rank"]
    assert "kv_rank" not in Architecture.of(tiny.config("llama")).inexact
