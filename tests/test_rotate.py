"""The rotated stream, merged layers and biases, each against what they claim."""

import json
import shutil

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_minitron.architecture.architecture import OUTPUT, Architecture
from hf_minitron.architecture.family import FAMILIES
from hf_minitron.checkpoint.tensors import tensors_of
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.importance.residuals import read_residuals
from hf_minitron.plan import Plan, copy_plan, make_plan
from hf_minitron.pruning import rotate
from hf_minitron.pruning.compensate import DEFAULT_CORRECTIONS
from hf_minitron.pruning.prune import prune_checkpoint, prune_model
from hf_minitron.statistics import Statistics

PLAIN = [model_type for model_type in tiny.TYPES if FAMILIES[model_type].pre_norm_residual]
MERGING = (*DEFAULT_CORRECTIONS, "layer_merge")
IDS = tiny.blocks(40)["input_ids"][:]


def shape_of(model):
    return Architecture.of(model.config).shape


def rotated(model, moments):
    tensors = rotate.rotated(tensors_of(model), moments)
    made = AutoModelForCausalLM.from_config(tensors.architecture.config).to(model.dtype).eval()
    made.load_state_dict({name: tensors.read(name) for name in tensors.names()})
    return made, tensors.rotation


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", tiny.slow_twins(PLAIN))
def test_a_rotated_teacher_says_the_same(model_type, tied):
    model = tiny.model(model_type, tie_word_embeddings=tied)
    made, rotation = rotated(model, calibrate(model, tiny.blocks(40), moments=True).moments)
    with torch.no_grad():
        expected, found = (m(input_ids=IDS, use_cache=False).logits for m in (model, made))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max())  # norms compute in float32
    assert torch.allclose(rotation.basis.T @ rotation.basis, torch.eye(40, dtype=torch.float64), atol=1e-12)
    assert not torch.equal(made.lm_head.weight, made.model.embed_tokens.weight)


def test_moments_of_the_rotated_teacher_are_those_that_it_has():
    model = tiny.model(tie_word_embeddings=True)
    before = calibrate(model, tiny.blocks(40), moments=True).moments
    made, rotation = rotated(model, before)
    after = calibrate(made, tiny.blocks(40), moments=True).moments
    energies = 0
    for norm in ("model.layers.1.input_layernorm", "model.norm"):
        old, new = (moments[norm + OUTPUT] for moments in (before, after))
        found = rotation.moment(norm, old)
        assert torch.allclose(found.float(), new, rtol=1e-3, atol=1e-4)
        energies = energies + found[:-1].diagonal()
    assert energies[:10].sum() > 2 * energies[-10:].sum()  # by falling energy


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3", "gemma"])
def test_rotation_on_disk_equals_that_in_memory_and_loses_less(model_type, tied, tmp_path):
    teacher = tiny.model(model_type, dtype=torch.float32, tie_word_embeddings=tied)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    statistics = calibrate(teacher, tiny.blocks(40), moments=True)
    shape = shape_of(teacher)
    plan = make_plan(statistics.scores, shape, shape.cut_to({"hidden": 24, "ffn": 48}))
    names = ("rotation", "least_squares", "norm_ratio")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", statistics=statistics, corrections=names)
    loaded = tiny.load_complete(tmp_path / "student")
    made = prune_model(teacher, plan, statistics, names)
    assert not loaded.config.tie_word_embeddings
    for name, value in made.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-4), name
    assert Plan.load(tmp_path / "student" / "plan.json").keep["hidden"] == list(range(24))


def test_a_stream_that_cannot_be_rotated_is_refused():
    model = tiny.model("gemma2", dtype=torch.float32)
    statistics = calibrate(model, tiny.blocks(), moments=True)
    shape = shape_of(model)
    plan = make_plan(statistics.scores, shape, shape.cut_to({"hidden": 24}))
    with pytest.raises(ValueError, match="rotation is not for gemma2: it needs RMS norms .*Leave rotation out"):
        prune_model(model, plan, statistics, ["rotation"])


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3"])
def test_merged_layers_leave_the_stream_nearer(model_type, tmp_path):
    """The state behind dropped layers must err less, on the text that was read, than when they are only dropped."""
    teacher = tiny.model(model_type, dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    shape, blocks = shape_of(teacher), tiny.blocks(400)
    statistics = calibrate(teacher, blocks, moments=True)
    for kept in ([0, 2], [0], [1, 2]):
        after = shape.cut_to({"layers": len(kept), "ffn": 64})
        plan = make_plan(statistics.scores, shape, shape.cut_to({"ffn": 64}))
        plan = Plan(shape, after, {"layers": kept, "ffn": [plan.keep["ffn"][layer] for layer in kept]})
        residuals = read_residuals(teacher, blocks, plan)
        assert len(residuals.added) == len(residuals.inputs) == (0 if kept[0] == 1 else 1)  # nothing stands before the first
        if kept[0] == 1:
            with pytest.raises(ValueError, match="layer_merge has no effect: no kept layer stands before a dropped one"):
                prune_model(teacher, plan, statistics, MERGING, residuals)
            continue
        plain, merged = (prune_model(teacher, plan, statistics, *given) for given in ((), (MERGING, residuals)))

        def state(model, layer):  # behind the first gap, before what follows
            found = []
            hook = model.model.layers[layer].register_forward_hook(lambda m, a, out: found.append(out))
            with torch.no_grad():
                model(input_ids=blocks["input_ids"][:], use_cache=False)
            hook.remove()
            return found[0]

        if kept[0] == 0:
            expected = state(teacher, kept[1] - 1 if len(kept) > 1 else 2)
            errors = [(state(student, 0) - expected).square().mean() for student in (plain, merged)]
            assert errors[1] < 0.97 * errors[0]
            given = {"statistics": statistics, "corrections": MERGING, "residuals": residuals}
            prune_checkpoint(tmp_path / "teacher", plan, tmp_path / f"s{kept}", **given)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"s{kept}").state_dict()
            assert all(torch.allclose(loaded[n], v, rtol=1e-3, atol=1e-4) for n, v in merged.state_dict().items())


def test_residuals_of_another_plan_are_refused():
    model = tiny.model(dtype=torch.float32, num_hidden_layers=4)
    statistics = calibrate(model, tiny.blocks(), moments=True)
    shape = shape_of(model)
    one, two = (Plan(shape, shape.cut_to({"layers": len(kept)}), {"layers": kept}) for kept in ([0, 2, 3], [0, 3]))
    residuals = read_residuals(model, tiny.blocks(), one)
    prune_model(model, one, statistics, MERGING, residuals)
    with pytest.raises(ValueError, match=r"not those of the layers \[1, 2\] that this plan drops: call"):
        prune_model(model, two, statistics, MERGING, residuals)


def test_residuals_are_means_over_the_text_and_not_over_padding():
    model = tiny.model(dtype=torch.float32)
    rows = [tiny.blocks(1, 12, seed=seed)["input_ids"][0].tolist() for seed in range(4)]
    short = {"input_ids": rows}
    padded = {"input_ids": [row + [7] * 4 for row in rows], "attention_mask": [[1] * 12 + [0] * 4] * 4}
    shape = shape_of(model)
    plan = Plan(shape, shape.cut_to({"layers": 2}), {"layers": [0, 2]})
    found, expected = (
        read_residuals(model, Dataset.from_dict(content).with_format("torch"), plan) for content in (padded, short)
    )
    for table in ("inputs", "added"):
        for name, values in getattr(expected, table).items():
            assert torch.allclose(getattr(found, table)[name], values, atol=1e-5), (table, name)


@pytest.mark.parametrize("model_type", ["gpt2", "starcoder2", "phi", "qwen2"])
@pytest.mark.parametrize("names", [("bias",), ("bias", "least_squares")])
def test_a_bias_gives_back_the_mean(model_type, names):
    teacher = tiny.model(model_type, dtype=torch.float32)
    shape = shape_of(teacher)
    target = {"hidden": 24} if model_type == "qwen2" else {"ffn": 32}
    ids = tiny.blocks(200, 4)  # every fourth token is read, the first of every block here
    statistics = calibrate(teacher, ids, moments=True)
    plan = make_plan(statistics.scores, shape, shape.cut_to(target))
    if model_type == "qwen2":
        name = "model.layers.0.self_attn.k_proj"
    else:
        (_, name), *_ = Architecture.of(teacher.config).taps("ffn")

    def mean(model):
        found = []
        hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: found.append(out))
        with torch.no_grad():
            model(input_ids=ids["input_ids"][:], use_cache=False)
        hook.remove()
        return found[0][:, 0].mean(0)

    expected = mean(teacher)
    without = tuple(n for n in names if n != "bias")
    cases = [(statistics, without) if without else (), (statistics, names)]
    plain, biased = ((mean(prune_model(teacher, plan, *given)) - expected).abs().max() for given in cases)
    if model_type == "qwen2":  # its norm sees fewer channels: not the very same input
        assert biased < plain
    else:
        assert biased < 1e-5
        assert plain > 100 * biased


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """A teacher on disk, its plan, and the student that a rotation made of it."""
    folder = tmp_path_factory.mktemp("turned")
    teacher = tiny.model(dtype=torch.float32, tie_word_embeddings=True)
    teacher.save_pretrained(folder / "teacher")
    statistics = calibrate(teacher, tiny.blocks(40), moments=True, save_to=folder / "statistics")
    plan = make_plan(statistics.scores, shape_of(teacher), shape_of(teacher).cut_to({"hidden": 24, "ffn": 48}))
    for names in ROTATIONS:
        prune_checkpoint(folder / "teacher", plan, folder / str(len(names)), statistics=statistics, corrections=names)
    return folder, teacher


ROTATIONS = (("rotation",), ("rotation", "least_squares", "norm_ratio"))


@pytest.mark.parametrize("names", ROTATIONS)
def test_a_rotated_plan_that_is_loaded_gives_the_same_student(names, turned, tmp_path):
    """Not a bit differs, also without the rotation's moments: the basis comes with the plan."""
    folder, teacher = turned
    student, plan = folder / str(len(names)), Plan.load(folder / str(len(names)) / "plan.json")
    assert plan.rotated
    assert plan.keep["hidden"] == list(range(24))
    assert plan.basis.dtype == torch.float64
    written = json.loads((student / "plan.json").read_text())["basis"]
    assert written["file"] == "plan/basis.safetensors"
    assert written["bytes"] == (student / written["file"]).stat().st_size
    stored = load_file(student / "model.safetensors")
    statistics = Statistics.load(folder / "statistics")
    given = {"statistics": statistics, "corrections": names} if len(names) > 1 else {}
    made = prune_model(teacher, plan, **given).state_dict()
    prune_checkpoint(folder / "teacher", plan, tmp_path / "again", **given)
    for name, value in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(value, stored[name]), name
        assert torch.equal(value, made[name]), name
    assert json.loads((tmp_path / "again" / "plan.json").read_text())["basis"] == written
    assert [path.name for path in student.glob("*.safetensors")] == ["model.safetensors"]  # what vLLM takes for weights


def test_a_rotated_plan_without_its_basis_is_refused(turned, tmp_path):
    folder, teacher = turned
    shutil.copyfile(folder / "1" / "plan.json", tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.kept_layers == [0, 1, 2]  # what needs no basis can be read
    for call in (lambda: prune_model(teacher, plan), lambda: plan.save(tmp_path / "copy.json")):
        with pytest.raises(ValueError, match="basis, plan/basis.safetensors beside plan.json, which is missing: copy it"):
            call()
    (tmp_path / "plan").mkdir()
    save_file({"basis": torch.eye(40, dtype=torch.float64)}, tmp_path / "plan" / "basis.safetensors")
    with pytest.raises(ValueError, match="basis.safetensors is not the basis that .*plan.json names"):
        Plan.load(tmp_path / "plan.json")


def test_a_large_basis_stays_with_the_run_and_is_told(turned, tmp_path, monkeypatch, caplog):
    folder, _ = turned
    copy_plan(folder / "1", tmp_path)
    assert Plan.load(tmp_path / "plan.json").basis is not None
    monkeypatch.setattr("hf_minitron.plan.LARGE_BASIS", 1000)
    (tmp_path / "large").mkdir()
    copy_plan(folder / "1", tmp_path / "large")
    assert Plan.load(tmp_path / "large" / "plan.json").basis is None
    assert "will not be published" in caplog.text
