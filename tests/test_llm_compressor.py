"""The hand-off to quantization: recipes of llm-compressor, and the script that applies them, where it is installed."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_minitron.architecture.family import FAMILIES
from hf_minitron.axes import AxisError

FOLDER = Path(__file__).resolve().parents[1] / "recipes/quantization"
SCHEMES = sorted((FOLDER / "schemes").glob("*.yaml"))


def role_of(family, row):
    try:
        return family.role(row)
    except AxisError:  # of a row that this family does not have
        return None


@pytest.mark.parametrize("path", SCHEMES, ids=lambda path: path.stem)
def test_routers_are_ignored_and_nothing_else_is(path):
    (modifiers,) = yaml.safe_load(path.read_text())["default_stage"].values()
    (modifier,) = modifiers.values()
    assert modifier["targets"] == ["Linear"]
    head, *patterns = modifier["ignore"]
    assert head == "lm_head"
    rows = {(row, role_of(family, row)) for family in FAMILIES.values() for row in family.rows if row.endswith(".weight")}
    ignored = {(row, role) for row, role in rows if any(re.match(p[3:], row.removesuffix(".weight")) for p in patterns)}
    assert {row for row, role in rows if role == "router"} <= {row for row, _ in ignored}
    assert {role for _, role in ignored} <= {"router", "altup_router", "norm", None}  # a norm is no Linear


@pytest.mark.skipif(importlib.util.find_spec("llmcompressor") is None, reason="pip install llmcompressor")
@pytest.mark.parametrize(
    ("scheme", "words", "error"), [("fp8", [], 0.3), ("w4a16", ["--samples", "4", "--block-size", "32"], 0.8)]
)
def test_a_student_is_quantized_and_loads(tmp_path, scheme, words, error):
    """Random weights are the hardest to round; of what is unrelated the error would be 1.4."""
    student = tiny.model("llama", torch.float32, hidden_size=256, intermediate_size=512, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=64)  # fmt: skip
    student.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "train.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in tiny.text(30, 0)))
    words = [*words, "--text", str(text)] if words else []
    command = [
        sys.executable,
        FOLDER / "quantize.py",
        tmp_path / "model",
        "--scheme",
        FOLDER / f"schemes/{scheme}.yaml",
        *words,
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"model-{scheme}"
    weights = {file.parent.name: file.stat().st_size for file in tmp_path.rglob("model.safetensors")}
    assert weights[folder.name] < weights["model"] / 3
    ids = torch.arange(4, 20)[None]
    expected, found = (
        AutoModelForCausalLM.from_pretrained(where)(ids).logits.float() for where in (tmp_path / "model", folder)
    )
    assert (found - expected).norm() < error * expected.norm()
