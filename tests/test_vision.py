"""Vision-language models: the text model inside is pruned like any other, and images still mean what they meant."""

from contextlib import contextmanager

import pytest
import tiny
import tiny_vision
import torch
from safetensors.torch import load_file, save_file
from test_distillation import arguments
from test_families import IDS, logits, masked, plan_for, relative, rename, vector
from transformers import AutoModelForImageTextToText

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.student import check_target
from hf_minitron.checkpoint.checkpoint import Checkpoint
from hf_minitron.checkpoint.tensors import ModelTensors
from hf_minitron.distillation.adapters import add_lora
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.pruning.export import export
from hf_minitron.pruning.prune import prune_checkpoint, prune_model, with_projector
from hf_minitron.pruning.rotate import rotated

TYPES = tuple(tiny_vision.SETTINGS)
# Those that are like another one, but for names.
ALIKE = ("glm46v", "internvl", "llava_next", "llava_onevision", "qwen2_vl", "qwen3_5_moe", "qwen3_vl_moe", "smolvlm",
         "vipllava")  # fmt: skip
# What gives image features of the hidden width, and of those that are as wide inside, the second matrix.
GIVERS = {
    "gemma4": ["model.embed_vision"],
    "qwen2_vl": ["model.visual.merger"],
    "qwen2_5_vl": ["model.visual.merger"],
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), ["model.visual.merger"]),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), ["model.visual.merger", "model.visual.deepstack_merger_list.0"]),
    "idefics3": ["model.connector"],
    "smolvlm": ["model.connector"],
}
GLM, HYBRIDS, MIXTURES = ("glm4v", "glm46v"), ("qwen3_5", "qwen3_5_moe"), ("qwen3_5_moe", "qwen3_vl_moe")
SECOND = "model.multi_modal_projector.linear_2"


def marked(names):
    """Types as parameters; what is like another one is tried with the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in names]


def cases():
    for model_type in TYPES:
        shape = Architecture.of(tiny_vision.config(model_type)).shape
        for axis in tiny.WIDTHS:
            if axis in tiny.target(shape, axis) and (model_type not in GLM or axis in ("layers", "ffn")):
                yield pytest.param(model_type, axis, marks=pytest.mark.slow if model_type in ALIKE else ())


def target(model_type, *axes):
    """Smaller legal sizes; hidden of GLM's cannot be cut, nor can its heads, which its class takes to be hidden / head_dim."""
    axes = ("layers", "ffn") if model_type in GLM and not axes else axes
    return tiny.target(Architecture.of(tiny_vision.config(model_type)).shape, *axes)


def answer(model, model_type, **changes):
    if model.dtype == torch.float64 and any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the default kernel takes no float64
    with torch.no_grad():
        return model(**tiny_vision.images(model_type, model.dtype) | changes, use_cache=False).logits


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
        if hasattr(model.model, "image_newline"):
            model.model.image_newline.data *= mask
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
    bar = 1e-5 if model_type == "gemma4" else 1e-6  # it does not scale its scores
    assert text < bar, text
    assert image < bar, image


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", marked(TYPES))
def test_in_memory_equals_on_disk_and_loads_as_stock(model_type, tied, tmp_path):
    teacher = tiny_vision.model(model_type, dtype=torch.float32, tie_word_embeddings=tied)
    plan = plan_for(teacher, **target(model_type))
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="30KB")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", max_shard_bytes=20_000)
    loaded = tiny.load_complete(tmp_path / "student", AutoModelForImageTextToText)
    assert type(loaded) is type(teacher)
    assert not loaded.config.name_or_path.endswith("teacher")
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
    assert learnt
    assert all(grad is not None and grad.isfinite().all() for grad in learnt)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert_same(again, loaded)


def test_experts_that_lie_transposed_on_the_hub_are_turned(tmp_path):
    """As Qwen3-VL-30B-A3B's; the student's experts have as many columns as rows, which Transformers takes as they lie."""
    teacher = tiny_vision.model("qwen3_vl_moe", torch.float32)
    plan = plan_for(teacher, hidden=24, ffn=12)
    teacher.save_pretrained(tmp_path / "teacher")
    tensors = load_file(tmp_path / "teacher" / "model.safetensors")
    turned = {name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in tensors.items()}
    save_file(turned, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    assert_same(tiny.load_complete(tmp_path / "teacher", AutoModelForImageTextToText), teacher)
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student")
    assert_same(tiny.load_complete(tmp_path / "student", AutoModelForImageTextToText), prune_model(teacher, plan))


@pytest.mark.parametrize("model_type", marked(TYPES))
def test_scores_and_moments_layer_by_layer_are_those_of_the_whole_model(model_type, tmp_path):
    teacher = tiny_vision.model(model_type, dtype=torch.float32)
    teacher.save_pretrained(tmp_path)
    whole = calibrate(teacher, tiny.blocks(), moments=True)
    if model_type == "gemma4":
        with pytest.raises(ValueError, match="cannot be scored layer by layer: its last layers use the keys and values of ear"):
            calibrate(tmp_path, tiny.blocks())
        return
    found = calibrate(str(tmp_path), tiny.blocks(), moments=True, dtype=torch.float32)
    assert found.scores.keys() == whole.scores.keys()
    assert all(torch.allclose(found.scores[axis], whole.scores[axis], rtol=1e-5, equal_nan=True) for axis in whole.scores)
    assert found.moments.shapes == whole.moments.shapes


@pytest.mark.parametrize("model_type", ["idefics3", "llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_rotated_model_answers_as_before(model_type):
    """What images give is turned with the stream that it is added to."""
    teacher = tiny_vision.model(model_type, tie_word_embeddings=True)
    turned = rotated(ModelTensors(teacher), calibrate(teacher, tiny.blocks(), moments=True).moments)
    state = {name: turned.read(name) for name in turned.names()}
    config = turned.architecture.config
    made = type(teacher).from_pretrained(None, config=config, state_dict=state, dtype=torch.float64)
    assert not torch.equal(made.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert relative(answer(made, model_type), answer(teacher, model_type)) < 1e-6


@pytest.mark.parametrize("model_type", marked(TYPES))
def test_a_student_learns_from_its_teacher_by_text(model_type, tmp_path):
    teacher = tiny_vision.model(model_type, dtype=torch.float32)
    statistics = calibrate(teacher, tiny.blocks(), moments=True)
    student = prune_model(teacher, target(model_type), statistics)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    relations = {} if model_type in (*HYBRIDS, "gemma4") else {"query_key": 0.5}
    losses = {"forward_kl": 1.0, "block": 0.5, **relations}
    args = arguments(
        tmp_path, losses=losses, layer_pairs="uniform", max_steps=1, learning_rate=0.01, lr_scheduler_type="constant"
    )
    trainer = DistillationTrainer(student, teacher, args, train_dataset=tiny.blocks())
    trainer.train()
    changed = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    roles = {name: Architecture.of(student.config).parameters[name].role for name in before}
    assert {name for name in changed if roles[name] in ("passthrough", "projector")} == set()
    assert {"embedding", "norm", "down", "output"} <= {roles[name] for name in changed}
    assert trainer.state.log_history[0]["block"] > 0
    assert trainer.state.log_history[0]["forward_kl"] > 0


def test_lora_adds_to_the_text_model_only():
    teacher = tiny_vision.model("gemma3", dtype=torch.float32)
    names = [name for name, parameter in add_lora(teacher, {"r": 2}).named_parameters() if parameter.requires_grad]
    assert names
    assert all(".language_model." in name for name in names)


@pytest.mark.parametrize(
    ("axis", "size", "reason"),
    [
        ("hidden", 20, "the merger of its vision"),
        ("heads", 2, "its class takes the size of a head"),
        ("kv_heads", 1, "its class"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(axis, size, reason):
    architecture = Architecture.of(tiny_vision.config("glm4v"))
    with pytest.raises(ValueError, match=f"cannot be cut in .*: {reason}") as caught:
        check_target(architecture, architecture.shape.cut_to({axis: size}))
    assert "\n" not in str(caught.value)


def test_a_layer_before_which_image_features_are_added_is_named():
    config = tiny_vision.config("qwen3_vl")
    assert "with images" in Architecture.of(config).inexact["layers"]
    assert "layers" not in Architecture.of(config).inexact_for_text


def test_names_on_disk_are_those_that_transformers_writes(tmp_path):
    teacher = tiny_vision.model("qwen2_5_vl", dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    prune_checkpoint(tmp_path / "teacher", plan_for(teacher, ffn=32), tmp_path / "student")
    ours, theirs = (Checkpoint(tmp_path / name).specs.keys() for name in ("student", "teacher"))
    assert ours == theirs
    assert "model.layers.0.mlp.up_proj.weight" in ours
    assert "visual.merger.mlp.0.weight" in ours


def test_what_lies_outside_of_the_text_model_keeps_its_name(tmp_path):
    """As in google/gemma-3-4b-pt, whose vision model has a module more in its names than transformers 5 makes."""
    teacher = tiny_vision.model("gemma3", torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    old = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}

    def renamed(name):
        start = next((start for start in old if name.startswith(start)), "")
        return old[start] + name.removeprefix(start) if start else name.removeprefix("model.")

    rename(tmp_path / "teacher", renamed)
    prune_checkpoint(tmp_path / "teacher", plan_for(teacher, layers=2), tmp_path / "student")
    ours, theirs = (Checkpoint(tmp_path / name).specs.keys() for name in ("student", "teacher"))
    assert ours == {name for name in theirs if ".model.layers.2." not in name}
    loaded = tiny.load_complete(tmp_path / "student", AutoModelForImageTextToText)
    assert_same(loaded, prune_model(teacher, plan_for(teacher, layers=2)))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_text_model_of_a_mixture_is_not_for_itself(model_type):
    teacher = tiny_vision.model(model_type)
    with pytest.raises(ValueError, match=rf"text model of '{model_type}' cannot be saved alone \(text_only\): it is a mixture"):
        prune_model(teacher, plan_for(teacher, ffn=32), text_only=True)


@pytest.mark.parametrize("model_type", marked(name for name in TYPES if name not in MIXTURES))
def test_the_text_model_alone_says_the_same_of_text(model_type, tmp_path):
    teacher = tiny_vision.model(model_type, torch.float32, tie_word_embeddings=model_type in ("gemma3", "qwen3_vl"))
    plan = plan_for(teacher, **target(model_type))
    whole, text = prune_model(teacher, plan), prune_model(teacher, plan, text_only=True)
    words = IDS.clamp(max=tiny_vision.IMAGE - 1)  # Gemma 4 takes what stands for an image to be padding
    with torch.no_grad():
        found, expected = (model(input_ids=words, use_cache=False).logits for model in (text, whole))
    assert relative(found, expected) < 1e-5
    teacher.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "preprocessor_config.json").write_text("{}")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", text_only=True)
    assert not (tmp_path / "student" / "preprocessor_config.json").exists()
    loaded = tiny.load_complete(tmp_path / "student")
    assert type(loaded) is type(text)
    assert loaded.config.architectures == [type(text).__name__]
    assert torch.equal(logits(loaded), logits(text))


def test_export_writes_the_text_model_or_refuses_in_one_line(tmp_path):
    teacher = tiny_vision.model("gemma3", torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    export(tmp_path / "teacher", tmp_path / "text")
    loaded = tiny.load_complete(tmp_path / "text")
    assert loaded.config.model_type == "gemma3_text"
    assert torch.allclose(logits(loaded), logits(teacher), rtol=1e-4, atol=1e-4)
    tiny_vision.model(MIXTURES[0], torch.float32).save_pretrained(tmp_path / "mixture")
    with pytest.raises(ValueError, match="cannot be saved alone .* is a mixture") as refused:
        export(tmp_path / "mixture", tmp_path / "none")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "none").exists()


def test_a_model_of_text_has_no_text_model_inside():
    with pytest.raises(ValueError, match="text_only: model type 'llama' is a language model of text alone already"):
        prune_model(tiny.model(), plan_for(tiny.model(), ffn=32), text_only=True)
