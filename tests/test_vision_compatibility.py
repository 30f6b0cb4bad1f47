"""A pruned vision-language model gives the same answers in transformers 4.57, of text and of an image."""

import json
import subprocess
import sys

import pytest
import tiny_vision
import torch
from safetensors.torch import load_file, save_file
from test_compatibility import IDS, environment
from test_families import rename
from test_vision import TYPES, answer
from transformers import AutoModelForImageTextToText

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.plan import Plan
from hf_minitron.pruning.prune import prune_checkpoint

# What vision models have in their names on the Hub and in transformers 4, and not in 5.
INSIDE = dict.fromkeys(("gemma3", "llava", "llava_next", "llava_onevision"), "vision_model.")
# Experts of qwen3_vl_moe lay transposed; of vipllava, a key of config.json had another name.
NOT_IN_4 = ("gemma4", "glm46v", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "vipllava")
LOAD = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

found = {}
for name, folder in json.load(open(sys.argv[1])).items():
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
        inputs = load_file(f"{folder}.inputs")
        with torch.no_grad():
            ids = inputs.pop("ids")
            found[f"{name}.text"] = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            found[f"{name}.image"] = model(**inputs, use_cache=False).logits
    except Exception as error:
        print(name, type(error).__name__, " ".join(str(error).split()), flush=True)
save_file(found, sys.argv[2])
"""


@pytest.mark.slow
def test_answers_to_text_and_images_in_transformers_4(tmp_path):
    folders, expected = {}, {}
    for model_type in [name for name in TYPES if name not in NOT_IN_4]:
        teacher = tiny_vision.model(model_type, torch.float32, **tiny_vision.THETAS.get(model_type, {}))
        teacher.save_pretrained(tmp_path / "teacher" / model_type)
        shape = Architecture.of(teacher.config).shape
        inside = INSIDE.get(model_type, "")
        rename(tmp_path / "teacher" / model_type, lambda name, inside=inside: name.replace("_tower.", f"_tower.{inside}"))
        plan = Plan(shape, shape.cut_to({"layers": 2}), {"layers": [0, 2]})
        folders[model_type] = str(tmp_path / model_type)
        prune_checkpoint(tmp_path / "teacher" / model_type, plan, folders[model_type])
        inputs = {name: t.contiguous() for name, t in tiny_vision.images(model_type, torch.float32).items()}
        save_file(inputs | {"ids": IDS}, f"{folders[model_type]}.inputs")
        student = AutoModelForImageTextToText.from_pretrained(folders[model_type], attn_implementation="eager").eval()
        with torch.no_grad():
            expected[f"{model_type}.text"] = student(input_ids=IDS, use_cache=False).logits
        if model_type not in ("idefics3", "llava_onevision", "smolvlm"):  # whose teachers' answers have changed with version 5
            expected[f"{model_type}.image"] = answer(student, model_type)
    (tmp_path / "asked.json").write_text(json.dumps(folders))
    command = [sys.executable, "-c", LOAD, tmp_path / "asked.json", tmp_path / "found.safetensors"]
    done = subprocess.run(command, env=environment("4.57.1"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout, done.stdout
    found = load_file(tmp_path / "found.safetensors")
    wrong = {name: float((found[name] - logits).abs().max() / logits.abs().max()) for name, logits in expected.items()}
    assert not {name: value for name, value in wrong.items() if value > 1e-5}, wrong
