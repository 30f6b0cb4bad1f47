"""From a model of the Hub and "I want half of it" to one that others load, by the commands that a newcomer types."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import TOKEN
from test_export import llama_cpp, made, mlx, saved, with_chat
from test_real_input import real_hub  # noqa: F401  (a fixture)
from tiny_tokenizers import ALL
from transformers import AutoConfig

from hf_minitron.__main__ import main

MODEL, SMALL, CHATS = "owner/Tiny-Instruct", "me/Tiny-Half", "HuggingFaceH4/ultrachat_200k"
# A tiny model's share of what the drafted recipe asks of a GPU.
FEW = {
    "score": {"tokens": 2048, "block_size": 64, "batch_size": 2},
    "distill": {
        "block_size": 64, "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1,
        "gradient_accumulation_steps": 1, "warmup_steps": 1, "save_steps": 3, "disable_tqdm": True,
    },
    "evaluate": {
        "tokens": 4096, "block_size": 64, "tasks": [], "chat_template": False,
        "generate": ["What is a library?"], "max_new_tokens": 4, "speed": False,
    },
    "publish": {"repo_id": SMALL, "base_model": MODEL, "license": "mit", "export": ["gguf"], "gguf_types": ["F16", "Q8_0"]},
}  # fmt: skip
LOAD = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (loader.from_pretrained({SMALL!r}) for loader in (AutoModelForCausalLM, AutoTokenizer))
chat = [{{"role": "user", "content": "What is a library?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
print(type(model).__module__, answer.shape[1] > inputs["input_ids"].shape[1])
"""


@pytest.fixture(scope="module")
def walked(real_hub, tmp_path_factory):  # noqa: F811
    """The folder in which somebody typed the README's commands, one after the other, and what each has said."""
    folder, teacher = tmp_path_factory.mktemp("walk"), tmp_path_factory.mktemp("teacher")
    saved(teacher, made(hidden_size=512, intermediate_size=1024), with_chat(ALL["byte_level"]))
    real_hub.add_folder(MODEL, teacher)
    few = [
        word
        for stage, keys in FEW.items()
        for key, value in keys.items()
        for word in (f"--{stage}.{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            ["init", MODEL, "--keep", "50%", "--text", CHATS, "--output", "half.yaml"],
            ["plan", "half.yaml", "--gpus", "1", "--gpu-memory", "24GB"],
            ["run", "half.yaml", *few],
            ["report", "half.yaml", *few],
            ["publish", "half.yaml", *few, "--push"],
        ):
            assert main(command) == 0, command
    return folder


@pytest.mark.slow
def test_half_of_the_model_is_published_and_anybody_loads_it(walked, real_hub, tmp_path):  # noqa: F811
    (folder,) = walked.glob("runs/*/publish/model")
    before, after = (AutoConfig.from_pretrained(path) for path in (MODEL, folder))
    assert (after.hidden_size, after.intermediate_size) < (before.hidden_size, before.intermediate_size)
    published = real_hub.repos[SMALL]
    card, page = (folder / "README.md").read_text(), (folder.parent.parent / "report.html").read_text()
    assert f'chat = pipeline("text-generation", model="{SMALL}")' in card, "the card has a chat snippet"
    assert "What is a library?" in page, "what the models answer"
    assert {"model.safetensors", "README.md", "export.json"} <= set(published["commits"][published["refs"]["main"]])
    environment = {**os.environ, "HF_ENDPOINT": real_hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    done = subprocess.run([sys.executable, "-I", "-c", LOAD], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    module, answered = done.stdout.split()
    assert module.startswith("transformers.models.")
    assert answered == "True"


@pytest.mark.slow
@llama_cpp
def test_llama_cpp_has_loaded_what_was_published(walked):
    (facts,) = (json.loads(path.read_text()) for path in walked.glob("runs/*/publish/model/export.json"))
    assert [file["type"] for file in facts["files"]] == ["F16", "Q8_0"]
    assert all("runtime" in file for file in facts["files"])


@pytest.mark.slow
@mlx
def test_mlx_takes_it_too(walked, tmp_path):
    (folder,) = walked.glob("runs/*/publish/model")
    assert main(["export", str(folder), "--to", "mlx", "--output", str(tmp_path / "exports"), "--tokens", "128"]) == 0
    (file,) = json.loads((tmp_path / "exports/export.json").read_text())["files"]
    assert "runtime" in file
