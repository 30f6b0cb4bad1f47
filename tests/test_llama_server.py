"""llama.cpp's own server on 127.0.0.1, where `llama-server` is on the PATH: a teacher's cache, chat templates, exports."""

import json
import shutil
from contextlib import contextmanager

import pytest
import requests
import torch
import yaml
from datasets import Dataset
from runtime_server import both_name, running
from test_export import SIZES, TOKENIZER, made, pruned, saved, with_chat
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_minitron.__main__ import main
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.served import ServedTeacher
from hf_minitron.export.gguf_model import write_gguf

PROGRAM = "llama-server"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=f"{PROGRAM}, of llama.cpp, is not on the PATH"),
]
K = 9
CHATS = [
    [{"role": "user", "content": "What is a library?"}],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": " The compiler\n\n  makes it: café 你好 "},
        {"role": "assistant", "content": "x = 3"},
        {"role": "user", "content": "don't </s> <s>"},
    ],
]


@contextmanager
def llama_server(folder, model, tokenizer, context=256):
    """A model folder and the address of a server of its GGUF file."""
    saved(folder / "model", model, tokenizer)
    path = folder / "model.gguf"
    write_gguf(folder / "model", path, "tiny")
    how = ["--host", "127.0.0.1", "--port", "{port}", "-c", str(context), "-np", "4", "-t", "1", "--no-warmup"]
    with running([PROGRAM, "-m", str(path), *how], folder, seconds=60) as address:
        yield address


def blocks_of(rows, length):
    ids = torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


def surer(model):
    """A model whose best tokens are not near to the next, as rounding goes."""
    model.lm_head.weight.data.mul_(4)
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A teacher of bytes, many of them parts of characters, in a context of less than all sequences of a batch."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = with_chat(TOKENIZER)
    backend, bos = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), tokenizer.bos_token
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer = with_chat(PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map))
    with llama_server(folder, surer(made()), tokenizer) as address:
        yield folder / "model", address


def test_the_cache_is_that_of_the_live_teacher(server, tmp_path):
    folder, address = server
    blocks = blocks_of(16, 60)
    chances = [logp.exp() for logp in both_name(address, folder, blocks, K, tmp_path)]
    assert ServedTeacher(address).at_once(8, 60) == 2
    assert torch.allclose(*chances, rtol=0, atol=5e-3)
    assert (chances[0] - chances[1]).abs().mean() < 3e-4


def test_a_sequence_beyond_the_servers_context_is_refused(server, tmp_path):
    folder, address = server
    with pytest.raises(ValueError, match="has a context of .* tokens, and a sequence has 300; start it with -c 300 or more"):
        write_cache(folder, blocks_of(2, 300), tmp_path / "cache", {"top_k": K}, server=address)


def test_a_recipe_is_taught_by_it(server, project, tmp_path):
    folder, address = server
    recipe = project["recipe"] | {"model": str(folder), "run": str(tmp_path / "run")}
    recipe["prune"] = {"target": {"ffn": 64}}
    recipe["cache"] = {"method": "top_k", "k": K, "server": f"{address}/v1"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("score", "prune", "cache", "distill"):
        assert main([stage, str(tmp_path / "recipe.yaml")]) == 0, stage
    history = json.loads((tmp_path / "run/distill/log.json").read_text())["history"]
    assert all(0 <= entry["loss"] < 20 for entry in history if "loss" in entry)


@pytest.mark.parametrize("chat", CHATS, ids=["one turn", "many"])
def test_a_chat_has_the_same_tokens(chat, server):
    folder, address = server
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = requests.post(f"{address}/apply-template", json={"messages": chat}, timeout=60).json()["prompt"]
    asked = {"content": said, "add_special": True, "parse_special": True}  # it leaves out a BOS that the tokenizer adds
    theirs = requests.post(f"{address}/tokenize", json=asked, timeout=60).json()["tokens"]
    assert theirs == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("kind", ["uniform", "nonuniform"])
def test_it_writes_what_transformers_writes(kind, tmp_path):
    model = surer(made() if kind == "uniform" else pruned())
    (prompt,) = blocks_of(1, 12)["input_ids"][:]
    written = model.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 12:]
    asked = {"prompt": prompt.tolist(), "n_predict": 8, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    with llama_server(tmp_path, model, TOKENIZER) as address:
        assert requests.post(f"{address}/completion", json=asked, timeout=60).json()["tokens"] == written.tolist()
