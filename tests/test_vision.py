"""Vision-language models: the text model inside is pruned like any other, and images still mean what they meant."""

from contextlib import contextmanager

import pytest
import tiny
import tiny_vision
import torch
from test_families import logits, masked, plan_for, relative, vector
from transformers import AutoModelForImageTextToText

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.pruning.prune import prune_checkpoint, prune_model, with_projector
from hf_minitron.tensors import ModelTensors

TYPES = tuple(tiny_vision.SETTINGS)
# What gives image features of the hidden width, and of those that are as wide inside, the second matrix.
GIVERS = {
    "qwen2_vl": ["model.visual.merger"],
    "qwen2_5_vl": ["model.visual.merger"],
    "qwen3_vl": ["model.visual.merger", "model.visual.deepstack_merger_list.0"],
    "idefics3": ["model.connector"],
    "smolvlm": ["model.connector"],
}
SECOND = "model.multi_modal_projector.linear_2"
# Cuts after which the student is not the masked teacher: the same reasons as those of its text model, or with images only.
INEXACT = {("gemma3", "hidden")}


def cases():
    for model_type in TYPES:
        for axis in ("layers", "hidden", "ffn", "heads", "kv_heads"):
            if model_type != "glm4v" or axis in ("layers", "ffn"):
                yield model_type, axis


def target(model_type, *axes):
    """Smaller legal sizes; glm4v's hidden cannot be cut, nor can its heads, which its class takes to be hidden / head_dim."""
    axes = ("layers", "ffn") if model_type == "glm4v" and not axes else axes
    return tiny.target(Architecture.of(tiny_vision.config(model_type)).shape, *axes)


def answer(model, model_type):
    with torch.no_grad():
        return model(**tiny_vision.images(model_type, model.dtype), use_cache=False).logits


def assert_same(found, expected):
    """The same weights, bit by bit, and the same answer to an image: how memory is aligned may change its last bits."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model_type = found.config.model_type
    assert relative(answer(found, model_type), answer(expected, model_type)) < 1e-5


@contextmanager
def blind(model, plan):
    """Dropped channels of what images give, switched off by hand."""
    modules, hooks = dict(model.named_modules()), []
    if "hidden" in plan.keep:
        mask = vector(plan.before["hidden"], plan.keep["hidden"])
        for name in GIVERS.get(model.config.model_type, ["model.multi_modal_projector"]):
            hooks.append(modules[name].register_forward_hook(lambda m, args, output: output * mask))
    if "projector" in plan.keep:
        inner = vector(plan.before["hidden"], plan.keep["projector"])
        hooks.append(modules[SECOND].register_forward_pre_hook(lambda m, args: (args[0] * inner,)))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("model_type", "axis"), list(cases()))
def test_pruned_equals_masked_with_and_without_an_image(model_type, axis):
    teacher = tiny_vision.model(model_type)
    plan = with_projector(ModelTensors(teacher), plan_for(teacher, **target(model_type, axis)))
    student, whole = prune_model(teacher, plan), answer(teacher, model_type)
    assert type(student) is type(teacher)
    assert relative(answer(student, model_type), whole) > 1e-3, "the cut changed nothing: the test cannot fail"
    with masked(teacher, plan), blind(teacher, plan):
        text, image = (
            relative(logits(student), logits(teacher)),
            relative(answer(student, model_type), answer(teacher, model_type)),
        )
    print(model_type, axis, text, image)
    if (model_type, axis) not in INEXACT:
        assert text < 1e-6, text
        assert image < 1e-6, image


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", TYPES)
def test_in_memory_equals_on_disk_and_loads_as_stock(model_type, tied, tmp_path):
    teacher = tiny_vision.model(model_type, dtype=torch.float32, tie_word_embeddings=tied)
    plan = plan_for(teacher, **target(model_type))
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="30KB")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", max_shard_bytes=20_000)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is type(teacher) and not loaded.config.name_or_path.endswith("teacher")
    architecture = Architecture.of(loaded.config)
    assert architecture.shape == plan.after
    tensors = {t.data_ptr(): t for name, t in loaded.state_dict().items() if name in architecture.parameters}
    assert sum(t.numel() for t in tensors.values()) == plan.after.num_parameters(architecture.rows)
    assert_same(loaded, prune_model(teacher, plan))
    inputs = tiny_vision.images(model_type, torch.float32)
    out = loaded.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    loaded(**inputs, labels=inputs["input_ids"]).loss.backward()
    learnt = [p.grad for name, p in loaded.named_parameters() if architecture.parameters[name].layer is not None]
    assert learnt and all(grad is not None and grad.isfinite().all() for grad in learnt)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert_same(again, loaded)
