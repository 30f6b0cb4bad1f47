"""Two environments: what is written here loads in transformers 4.57 with equal logits and the same tokens, and in 5."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_minitron.families.family import family_of
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.plan import Plan
from hf_minitron.pruning.export import export
from hf_minitron.pruning.prune import prune_checkpoint

FOLDER = Path("~/.cache/hf_minitron/transformers-4.57.1").expanduser()
PACKAGES = ["transformers==4.57.1", "huggingface_hub<1.0", "tokenizers<0.23"]
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
# Model types whose classes transformers 4.57 does not have; none of those that are tested.
NOT_IN_4 = ("minitron_pruned",)

LOAD = """
import json, sys, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__ == "4.57.1", transformers.__version__
asked = json.load(open(sys.argv[1]))
found = {}
for name, folder in asked["folders"].items():
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        assert model.dtype == torch.float32, model.dtype
        with torch.no_grad():
            found[name] = model(input_ids=torch.tensor(asked["ids"]), use_cache=False).logits
        tokens = AutoTokenizer.from_pretrained(folder)(asked["text"])["input_ids"]
        assert tokens == asked["tokens"], tokens
    except Exception as error:
        print(name, type(error).__name__, error, flush=True)
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="session")
def transformers_4():
    """A folder with transformers 4.57 and what it needs, made once; skipped where it cannot be had."""
    if not (FOLDER / "ready").is_file():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(FOLDER), *PACKAGES]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"transformers 4.57 cannot be had: {done.stderr.strip().splitlines()[-1]}")
        (FOLDER / "ready").touch()
    return {**os.environ, "PYTHONPATH": str(FOLDER), "PYTHONNOUSERSITE": "1"}


def cut(config, layers):
    """A plan that drops a layer and, where it can be, some of the FFN's channels."""
    shape = family_of(config).shape_of(config)
    return Plan(shape, shape.cut_to({"layers": layers}), {"layers": list(range(layers))})


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


@pytest.mark.slow
def test_every_students_logits_and_tokens_in_transformers_4(transformers_4, tmp_path):
    folders, expected = {}, {}
    for name, model_type, changes in configs():
        teacher, folders[name] = tmp_path / "teacher" / name, tmp_path / "student" / name
        changes |= {"original_max_position_embeddings": 8} if name == "phi3_1" else {}
        changes |= {"head_dim": None} if name in ("phi3_1", "qwen2_moe_0") else {}  # what transformers 4 has
        made = tiny.model(model_type, torch.float32, **changes)
        made.save_pretrained(teacher)
        tiny.tokenizer().save_pretrained(teacher)
        prune_checkpoint(teacher, cut(made.config, 2), folders[name])
    lists = {"layer_intermediate_size": [72, 30, 51], "layer_num_attention_heads": [4, 2, 4]}
    nonuniform = AutoModelForCausalLM.from_config(PrunedConfig.from_stock(tiny.config(rope_parameters=LLAMA3), **lists))
    nonuniform.save_pretrained(tmp_path / "nonuniform")
    tiny.tokenizer().save_pretrained(tmp_path / "nonuniform")
    folders["exported"] = tmp_path / "exported"
    export(tmp_path / "nonuniform", folders["exported"])
    for name, folder in folders.items():
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            expected[name] = student(input_ids=IDS, use_cache=False).logits
    text = " ".join(tiny.WORDS[:9])
    asked = {"folders": {name: str(folder) for name, folder in folders.items()}, "ids": IDS.tolist(), "text": text}
    asked["tokens"] = tiny.tokenizer()(text)["input_ids"]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", LOAD, tmp_path / "asked.json", tmp_path / "logits.safetensors"]
    done = subprocess.run(command, env=transformers_4, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout, done.stdout
    found = load_file(tmp_path / "logits.safetensors")
    differences = {name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in folders}
    assert not {name: value for name, value in differences.items() if value > 1e-6}
