"""Two environments: what is written here loads in transformers 4.57 with equal logits and the same tokens, and in 5."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_vision
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_minitron.__main__ import main
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.checkpoint import Checkpoint
from hf_minitron.checkpoint.saving import legacy_rope, minimum_transformers, save_config
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.modeling import configuration_pruned
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.plan import Plan, make_nonuniform_plan
from hf_minitron.pruning.export import export
from hf_minitron.pruning.prune import prune_checkpoint, prune_model

HOME = Path("~/.cache/hf_minitron").expanduser()
# Other versions of transformers, each with what it needs, in folders of their own; the second is the oldest that we support.
OTHERS = {
    "4.57.1": ["transformers==4.57.1", "huggingface_hub<1.0", "tokenizers<0.23"],
    "5.15.0": ["transformers==5.15.0", "huggingface_hub<2.0", "tokenizers<0.23", "httpx", "httpcore"],
}
IDS = tiny.blocks()["input_ids"][:]
THETA = 5e4
LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": THETA, "short_factor": [1.5] * 5, "long_factor": [4.0] * 5}
# What rope each model type is tried with beside another theta.
ROPES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt_oss"), [LLAMA3, YARN, LINEAR, DYNAMIC]),
    "deepseek_v3": [YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, LINEAR],
    "gpt_neox": [LINEAR | {"partial_rotary_factor": 0.4}],
    "olmo": [LINEAR, DYNAMIC],
    "olmo2": [LINEAR],
    "phi3": [LONG | {"original_max_position_embeddings": 8}],
    "phi": [LINEAR | {"partial_rotary_factor": 0.5}],
}
GEMMA3 = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}
# What transformers 4.57 cannot load: it has classes for all model types that are tested, and ours needs version 5.
NOT_IN_4 = {"nonuniform", "lfm2_moe_0", "nemotron_h_0", "qwen3_5_moe_text_0", "qwen3_5_text_0"}

LOAD = """
import json, sys, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

asked = json.load(open(sys.argv[1]))
assert transformers.__version__ == asked["version"], transformers.__version__
found = {}
for name, folder in asked["folders"].items():
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", trust_remote_code=True
        ).eval()
        assert model.dtype == torch.float32, model.dtype
        with torch.no_grad():
            found[name] = model(input_ids=torch.tensor(asked["ids"]), use_cache=False).logits
        tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(asked["text"])["input_ids"]
        assert tokens == asked["tokens"], tokens
    except Exception as error:
        print(name, type(error).__name__, " ".join(str(error).split()), flush=True)
save_file(found, sys.argv[2])
"""


def environment(version):
    """Return the environment of a process with another transformers, installed once; skip where it cannot be had."""
    folder = HOME / f"transformers-{version}"
    if not (folder / "ready").is_file():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *OTHERS[version]]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"transformers {version} cannot be had: {done.stderr.strip().splitlines()[-1]}")
        (folder / "ready").touch()
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONNOUSERSITE": "1"}


def loaded_in(version, folders, tmp_path):
    """Load models in another transformers; return the difference of their logits to ours, and what refuses the others."""
    expected, text = {}, " ".join(tiny.WORDS[:9])
    for name, folder in folders.items():
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            expected[name] = student(input_ids=IDS, use_cache=False).logits
    asked = {"folders": {name: str(folder) for name, folder in folders.items()}, "ids": IDS.tolist(), "text": text}
    asked |= {"tokens": tiny.tokenizer()(text)["input_ids"], "version": version}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", LOAD, tmp_path / "asked.json", tmp_path / "logits.safetensors"]
    env = environment(version) | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "logits.safetensors")
    refused = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    return {name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in found}, refused


def cut(config, layers):
    """A plan that drops a layer and, where it can be, some of the FFN's channels."""
    shape = Architecture.of(config).shape
    after = shape.cut_to({"layers": layers})
    return Plan(shape, after, {"layers": shape.first_layers(layers, {})})


def configs():
    for model_type in tiny.MODEL_TYPES:
        config = tiny.config(model_type)
        ropes = [None, *ROPES.get(model_type, [])]
        if model_type == "gemma3_text":
            ropes = [GEMMA3]
        elif getattr(config, "rope_parameters", None):
            ropes[0] = config.rope_parameters | {"rope_theta": THETA}
        for number, rope in enumerate(ropes):
            yield f"{model_type}_{number}", model_type, {} if rope is None else {"rope_parameters": rope}


def write_nonuniform(folder, model_type="llama", **changes):
    """Write a model whose layers differ, one without attention and one without an MLP."""
    lists = {"layer_intermediate_size": [72, 0, 51], "layer_num_attention_heads": [4, 2, 0]}
    made = AutoModelForCausalLM.from_config(PrunedConfig.from_stock(tiny.config(model_type, **changes), **lists))
    made.save_pretrained(folder)
    save_config(made.config, folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_every_students_logits_and_tokens_in_transformers_4(tmp_path):
    folders = {}
    for name, model_type, changes in configs():
        teacher, folders[name] = tmp_path / "teacher" / name, tmp_path / "student" / name
        changes |= {"original_max_position_embeddings": 8} if name == "phi3_1" else {}
        own_heads = name in ("phi3_1", "qwen2_moe_0", "granitemoehybrid_0", "jamba_0")
        changes |= {"head_dim": None} if own_heads else {}  # what transformers 4 has
        changes |= {"use_mamba_kernels": False} if model_type == "jamba" else {}  # which transformers 4 insists on
        groups = {"bamba": "mamba_n_groups", "granitemoehybrid": "mamba_n_groups", "mamba2": "n_groups"}.get(model_type)
        changes |= {groups: 1} if groups else {}  # the norm behind Mamba-2 has one group in transformers 4
        made = tiny.model(model_type, torch.float32, **changes)
        made.save_pretrained(teacher)
        tiny.tokenizer().save_pretrained(teacher)
        prune_checkpoint(teacher, cut(made.config, 2), folders[name])
    folders["nonuniform"] = write_nonuniform(tmp_path / "nonuniform", rope_parameters=LLAMA3)
    folders["exported"] = tmp_path / "exported"
    export(folders["nonuniform"], folders["exported"])
    differences, refused = loaded_in("4.57.1", folders, tmp_path)
    assert refused.keys() == NOT_IN_4, refused
    wanted = "ImportError Layers of different sizes need transformers >= 5.15 (tested up to 5.24), not 4.57.1: "
    assert refused["nonuniform"].startswith(wanted)
    assert differences.keys() == folders.keys() - NOT_IN_4
    assert not {name: value for name, value in differences.items() if value > 1e-6}


@pytest.mark.slow
def test_nonuniform_models_in_the_oldest_transformers(tmp_path):
    kinds = (
        "arcee",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    )
    folders = {name: write_nonuniform(tmp_path / name, name) for name in kinds}
    folders |= {"llama3": write_nonuniform(tmp_path / "llama3", rope_parameters=LLAMA3)}
    folders |= {"sliding": write_nonuniform(tmp_path / "sliding", "mistral", sliding_window=6)}
    differences, refused = loaded_in("5.15.0", folders, tmp_path)
    assert not refused
    assert differences.keys() == folders.keys()
    assert not {name: value for name, value in differences.items() if value > 1e-6}


LACKING = {
    "Cache": ("transformers.cache_utils.Cache", None, "cannot import name 'Cache'"),
    "strict": ("huggingface_hub.dataclasses.strict", None, "cannot import name 'strict'"),
}


@pytest.mark.parametrize("name", LACKING)
def test_a_transformers_without_what_nonuniform_models_need_is_named(tmp_path, monkeypatch, name):
    assert transformers.__version__.startswith(f"{configuration_pruned.NEWEST}."), "say which version is tested"
    place, instead, reason = LACKING[name]
    shutil.copytree(
        Path(configuration_pruned.__file__).parent, tmp_path / "copied", ignore=shutil.ignore_patterns("__init__.py")
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(place, instead) if instead else monkeypatch.delattr(place)
    said = rf"need transformers >= 5.15 \(tested up to 5.24\), not {transformers.__version__}: {reason}"
    try:
        with pytest.raises(ImportError, match=said) as raised:
            importlib.import_module("copied.modeling_pruned")
        assert "\n" not in str(raised.value)
    finally:
        for module in [module for module in sys.modules if module.partition(".")[0] == "copied"]:
            del sys.modules[module]


@pytest.fixture
def teacher(tmp_path):
    """A teacher in bfloat16 with norms in float32, code of its own beside its config, and a sloppy generation config."""
    model, folder = tiny.model(dtype=torch.bfloat16), tmp_path / "teacher"
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + 1e-3  # no bfloat16 holds it
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    change(folder / "config.json", auto_map={"AutoConfig": "configuration_x.XConfig"}, use_cache=True)
    change(folder / "generation_config.json", do_sample=False, temperature=0.6, auto_map={"AutoModel": "generate.X"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.XTokenizer", None]})
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def dtypes(folder):
    """Whether every norm is float32 and all else bfloat16."""
    return {("norm" in name, spec.dtype) for name, spec in Checkpoint(folder).specs.items()}


MIXED = {(True, "F32"), (False, "BF16")}


@pytest.mark.parametrize("way", ["pruned", "distilled", "lora", "corrected", "exported", "in memory"])
def test_each_tensor_keeps_its_dtype_and_the_config_the_teachers(teacher, project, tmp_path, way):
    folder = tmp_path / "student"
    if way == "in memory":
        model = AutoModelForCausalLM.from_pretrained(teacher)
        for name, tensor in load_file(teacher / "model.safetensors").items():
            model.get_parameter(name).data = tensor
        student = prune_model(model, cut(model.config, 2))
        assert student.model.norm.weight.dtype == torch.float32
        assert torch.equal(student.model.norm.weight, model.model.norm.weight)
        student.save_pretrained(folder)
        assert dtypes(folder) == MIXED
        return
    if way == "exported":
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        sizes = {"ffn": [72, 48, 8], "heads": [2, 4, 2], "kv_heads": [1, 2, 2]}
        plan = make_nonuniform_plan(calibrate(model, tiny.blocks()).scores, Architecture.of(model.config).shape, sizes)
        prune_checkpoint(teacher, plan, tmp_path / "nonuniform")
        export(tmp_path / "nonuniform", folder)
    elif way == "pruned":
        prune_checkpoint(teacher, cut(AutoConfig.from_pretrained(teacher), 2), folder)
    else:
        recipe = {**project["recipe"], "model": str(teacher), "run": str(tmp_path / "run")}
        recipe["distill"] = {**recipe["distill"], "max_steps": 1}
        stages = ["score", "prune", "distill"]
        if way == "corrected":
            recipe["correct"] = {**recipe["distill"], "warmup_steps": 0, "losses": {"cross_entropy": 1.0}}
            stages = ["correct"]
        if way == "lora":
            recipe["distill"]["lora"] = {"r": 2}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        for stage in stages:
            assert main([stage, str(tmp_path / "recipe.yaml")]) == 0
        folder = tmp_path / "run" / ("correct/teacher" if way == "corrected" else "distill/student")
    assert dtypes(folder) == MIXED
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["use_cache"]) == ("bfloat16", "bfloat16", True)
    assert config["rope_theta"] == 1e4
    assert config["rope_scaling"] is None
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text()), name
    generation = json.loads((folder / "generation_config.json").read_text())
    assert "temperature" not in generation
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")


def test_a_model_saved_from_python_is_written_the_same_way(tmp_path):
    model = tiny.model(dtype=torch.float32, rope_parameters=LLAMA3)
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    args = DistillationArguments(tmp_path / "out", report_to="none", losses={"cross_entropy": 1.0}, max_steps=1, save_steps=1,
                                 bf16=False)  # fmt: skip
    trainer = DistillationTrainer(model, None, args, train_dataset=tiny.blocks(), processing_class=tiny.tokenizer())
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        config = json.loads((folder / "config.json").read_text())
        assert (config["rope_theta"], config["rope_scaling"]["factor"], config["use_cache"]) == (THETA, 4.0, True), folder
        assert config["torch_dtype"] == "float32"
        assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_an_old_files_buffers_are_left_out_and_kill_no_save(tmp_path, project):
    """Old GPT-2 files: names without the base model's, boolean masks as buffers, one of them the first tensor."""
    model, teacher = tiny.model("gpt2", torch.float32), tmp_path / "teacher"
    model.save_pretrained(teacher)
    tiny.tokenizer().save_pretrained(teacher)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(teacher / "model.safetensors").items()}
    tensors = {"a.bias_table": torch.ones(2, dtype=torch.bool), **tensors}
    for layer in range(3):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    recipe = {**project["recipe"], "model": str(teacher), "run": str(tmp_path / "run")}
    recipe["prune"] = {"target": {"ffn": 48}}
    recipe["distill"] = {**recipe["distill"], "max_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("score", "prune", "distill"):
        assert main([stage, str(tmp_path / "recipe.yaml")]) == 0
    student = tmp_path / "run" / "distill" / "student"
    assert {spec.dtype for spec in Checkpoint(student).specs.values()} == {"F32"}
    tiny.load_complete(student)


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {}, {"rope_theta": 1e4, "rope_scaling": None}),
        ("gpt2", {}, {}),
        ("gpt_neox", {}, {"rotary_emb_base": 1e4, "rotary_pct": 0.4, "rope_scaling": None}),
        ("stablelm", {}, {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "rope_scaling": None}),
        ("gemma3_text", {"rope_parameters": GEMMA3},
         {"rope_theta": THETA, "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("olmo", {"rope_parameters": LINEAR}, {"rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("olmo2", {"rope_parameters": YARN}, None),
        ("gemma3_text", {"rope_parameters": GEMMA3 | {"sliding_attention": LINEAR}}, None),
    ],
)  # fmt: skip
def test_what_transformers_4_reads(model_type, changes, expected):
    config = tiny.config(model_type, **changes)
    assert legacy_rope(config) == expected
    if expected is None:
        assert minimum_transformers(config) == "5.0"


def test_the_oldest_transformers_that_will_do():
    known = {model_type: minimum_transformers(tiny.config(model_type)) for model_type in ("llama", "qwen3", "gpt_oss")}
    assert known == {"llama": None, "qwen3": "4.51", "gpt_oss": "4.55"}
    assert minimum_transformers(tiny.config("qwen2_moe")) == "5.0"  # its heads are not as wide as its hidden states
    assert minimum_transformers(PrunedConfig.from_stock(tiny.config())) == "5.15"


def test_a_generation_config_beyond_repair_is_refused_before_scoring(project, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(project["folder"] / "teacher", teacher)
    change(teacher / "generation_config.json", do_sample=False, num_return_sequences=3)
    recipe = {**project["recipe"], "model": str(teacher), "run": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "generation_config.json" in line
    assert "num_return_sequences" in line
    assert not (tmp_path / "run" / "score").exists()


@pytest.mark.slow
def test_the_oldest_supported_transformers_does_a_whole_run(project, tmp_path):
    """All stages by the command, and a training with every kind of loss: not only what loads published models."""
    recipe = {**project["recipe"], "run": str(tmp_path / "run"), "cache": {"method": "top_k", "k": 8}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    root = str(Path(__file__).resolve().parent.parent)
    env = environment("5.15.0")
    env["PYTHONPATH"] += os.pathsep + root
    command = [sys.executable, "-m", "hf_minitron", "run", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    card = (tmp_path / "run/publish/model/README.md").read_text()
    assert "transformers 5.15.0" in " ".join(card.split()), card[-2000:]
    tests = ["tests/test_states.py", "tests/test_losses.py", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_model_type_says_since_when_it_is_loaded():
    """Also those whose heads differ from layer to layer, which a config does not say at once."""
    configs = [*map(tiny.config, tiny.TYPES), *map(tiny_vision.config, tiny_vision.SETTINGS)]
    found = {config.model_type: minimum_transformers(config) for config in configs}
    assert set(found.values()) <= {None, *(f"{major}.{minor}" for major in (4, 5) for minor in range(99))}
    assert "gemma4_text" in found
