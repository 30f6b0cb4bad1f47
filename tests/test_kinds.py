"""What is no plain causal language model, and which weights a folder means: one line, before anything slow."""

import json
import shutil
import textwrap

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_minitron.__main__ import main
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.checkpoint import Checkpoint, load_model
from hf_minitron.checkpoint.model_files import resolve, weights_of
from hf_minitron.distillation.teacher import LiveTeacher

LLAMA = tiny.config().to_dict()
TEXT = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
VIDEO = {"model_type": "video_llava", "text_config": TEXT, "vision_config": {}}
# Small files of a model to the refusal.
KINDS = {
    "vision-language": (
        {"config.json": VIDEO},
        "is a multimodal model .video_llava.. Save its text part as a model of its own: m = Auto",
    ),
    "vision-language in one": (
        {"config.json": AutoConfig.for_model("glm4v_moe").to_dict()},
        "Its text part is no causal language",
    ),
    "encoder": ({"config.json": AutoConfig.for_model("bert").to_dict()}, r"is an encoder \(bert\)"),
    "encoder-decoder": ({"config.json": AutoConfig.for_model("t5").to_dict()}, r"is an encoder-decoder \(t5\)"),
    "vision": ({"config.json": AutoConfig.for_model("vit").to_dict()}, "'vit' is not a causal language model"),
    "remote code": (
        {"config.json": LLAMA | {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}}},
        r"'chatglm' needs code of its own \(auto_map\), which is not run here",
    ),
    "unknown": ({"config.json": LLAMA | {"model_type": "llamma"}}, "'llamma' is in no class of Transformers"),
    "no type": ({"config.json": {}}, "config.json has no model_type"),
    "AWQ": (
        {"config.json": LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}}},
        "is compressed with awq, which",
    ),
    "GPTQ": ({"config.json": LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, "is compressed with gptq"),
    "compressed-tensors": (
        {"config.json": LLAMA | {"quantization_config": {"quant_method": "compressed-tensors"}}},
        "compressed with compressed-tensors, which cannot be loaded here: .* Name the checkpoint in bfloat16",
    ),
    "a method of tomorrow": ({"config.json": LLAMA | {"quantization_config": {"quant_method": "zip"}}}, "compressed with zip"),
    "adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "me/base"}},
        "is a PEFT adapter of me/base, not a model; merge",
    ),
    "GGUF": ({"model.Q4_1.gguf": {}}, r"is GGUF; load it with from_pretrained\(folder, gguf_file=...\)"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_language_model_is_said_in_one_line(kind, project, tmp_path, capsys):
    files, message = KINDS[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        resolve(folder)
    assert "\n" not in str(caught.value)
    for section, key in ((None, "model"), ("evaluate", "models"), *([("distill", "teacher")] if kind != "adapter" else [])):
        recipe = json.loads(json.dumps(project["recipe"])) | {"run": str(tmp_path / "run")}
        (recipe if section is None else recipe[section])[key] = {"other": str(folder)} if key == "models" else str(folder)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["run", str(tmp_path / "recipe.yaml")]) == 1
        assert not (tmp_path / "run" / "score").exists(), f"{section}.{key}: it was begun"
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(caught.value) in said


def test_the_text_part_is_got_as_the_refusal_says(tmp_path):
    from transformers import AutoModelForImageTextToText

    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 14}
    config = AutoConfig.for_model("video_llava", text_config=TEXT, vision_config=small | {"patch_size": 14})
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "vl")
    with pytest.raises(ValueError, match="multimodal") as caught:
        resolve(tmp_path / "vl")
    statements = str(caught.value).partition("its own: ")[2].partition("; and")[0]
    scope = {"AutoModelForImageTextToText": AutoModelForImageTextToText, "AutoModelForCausalLM": AutoModelForCausalLM}
    exec(statements, scope | {"folder": str(tmp_path / "text")})
    whole, ids = AutoModelForImageTextToText.from_pretrained(tmp_path / "vl").eval(), tiny.blocks()["input_ids"][:]
    with torch.no_grad():
        expected, found = whole(input_ids=ids).logits, load_model(tmp_path / "text", torch.float32)(input_ids=ids).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_an_adapter_teaches(project, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(project["folder"] / "teacher", base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    teacher = LiveTeacher(tmp_path / "adapter", torch.device("cpu"), {"dtype": "float32"}).model
    ids = tiny.blocks()["input_ids"][:]
    with torch.no_grad():
        assert torch.allclose(teacher(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=0, atol=1e-4)
    recipe = {**project["recipe"], "run": str(tmp_path / "run")}
    recipe["distill"] = {**recipe["distill"], "teacher": str(tmp_path / "adapter"), "max_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("score", "prune", "distill"):
        assert main([stage, str(tmp_path / "recipe.yaml")]) == 0, capsys.readouterr().err
    recipe["cache"] = {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["cache", str(tmp_path / "recipe.yaml")]) == 1
    assert "is a PEFT adapter, of which no cache is made" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path):
    tiny.model(dtype=torch.float32, seed=1).save_pretrained(tmp_path / "s", max_shard_size="40KB")
    return tmp_path / "s"


def test_one_file_goes_before_an_index_as_in_transformers(folder, sharded):
    for path in sharded.iterdir():
        if path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
    assert weights_of(folder).files == (folder / "model.safetensors",)
    assert torch.equal(Checkpoint(folder).read(name), expected)
    assert torch.equal(load_model(folder, torch.float32).state_dict()[name], expected)


def test_a_variant_is_another_file(folder, sharded):
    other = tiny.model(dtype=torch.float32, seed=2)
    other.save_pretrained(folder, variant="fp16")
    assert torch.equal(load_model(folder, torch.float32, variant="fp16").lm_head.weight, other.lm_head.weight)
    assert torch.equal(Checkpoint(folder, "fp16").read("lm_head.weight"), other.lm_head.weight)
    assert not torch.equal(Checkpoint(folder).read("lm_head.weight"), other.lm_head.weight)


def test_the_file_that_the_config_names_goes_first(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "other.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    assert torch.equal(Checkpoint(folder).read("lm_head.weight"), loaded)
    assert torch.equal(loaded, tensors["lm_head.weight"] + 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.safetensors", "but consolidated.safetensors: Mistral's own format"),
        ("model.fp16.safetensors", "but model.fp16.safetensors: a variant; name it"),
        ("weights.safetensors", "but weights.safetensors: none of them by a name that Transformers loads"),
        ("pytorch_model.bin", "but pytorch_model.bin: pickled; load it with from_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "but pytorch_model-00001-of-00002.bin: pickled"),
    ],
)
def test_weights_that_are_not_read_are_named(folder, name, message):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_stale_index_is_said_to_be_stale(sharded, folder):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].rename(sharded / "model-00001-of-00001.safetensors")
    with pytest.raises(
        ValueError, match=f"is of another sharding: it names {shards[1].name}, and there is model-00001-of-00001"
    ):
        Checkpoint(sharded)
    (sharded / "model-00001-of-00001.safetensors").rename(shards[1])
    content["weight_map"]["model.extra"] = shards[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="promises 'model.extra' .*it is the index of another save") as caught:
        Checkpoint(sharded)
    assert "again" not in str(caught.value)
    shutil.copyfile(folder / "model.safetensors", shards[0])
    with pytest.raises(ValueError, match="both hold '.*': they are of different saves"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../../x"}}', '{"weight_map": {"a": 3}}']
)
def test_a_damaged_index_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json") as caught:
        Checkpoint(sharded)
    assert "\n" not in str(caught.value)


def test_float8_weights_are_refused_by_name(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors", {"format": "pt"})
    for read in (Checkpoint, lambda folder: load_model(folder, torch.float32)):
        with pytest.raises(ValueError, match=f"'{name}' in .* is stored as F8_E4M3"):
            read(folder)


class MadeUpConfig(LlamaConfig):
    """A config of a type that nobody has heard of."""

    model_type = "made_up"
    odd: str = ""


class MadeUpForCausalLM(LlamaForCausalLM):
    config: MadeUpConfig

    def __init__(self, config):
        if config.odd == "raises":
            raise RuntimeError("no such kernel\n" + "  at some line\n" * 40)
        super().__init__(config)
        for part in range(30 if config.odd == "long names" else 0):
            self.model.add_module(f"a_{'very_' * 12}long_name_{part}", torch.nn.Linear(3, 5))


@pytest.mark.parametrize("odd", ["raises", "long names"])
def test_an_unknown_type_is_refused_in_at_most_five_lines(odd):
    AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)
    with pytest.raises(
        ValueError, match="no such kernel|does not cover model type 'made_up'.* has no row and 58 more"
    ) as refused:
        Architecture.of(tiny.config("made_up", odd=odd))
    assert len(textwrap.wrap(str(refused.value), 120)) <= 5


@pytest.mark.parametrize(
    "model_type", ["blip-2", "clvp", "kimi_linear", "longcat_flash", "musicgen", "phi4_multimodal", "qwen2_5_omni"]
)
def test_a_composite_or_unknown_type_of_transformers_is_refused_in_at_most_five_lines(model_type):
    with pytest.raises(ValueError) as refused:
        Architecture.of(AutoConfig.for_model(model_type))
    assert len(textwrap.wrap(str(refused.value), 120)) <= 5, refused.value
