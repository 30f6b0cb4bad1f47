"""vLLM's own server on 127.0.0.1, where `vllm` is on the PATH: a teacher's cache, uniform and nonuniform students."""

import os
import re
import shutil
from contextlib import contextmanager

import pytest
import requests
import torch
from runtime_server import both_name, running
from test_export import made, pruned, saved
from test_llama_server import blocks_of, surer
from transformers import AutoModelForCausalLM

from hf_minitron.pruning.export import export

PROGRAM = "vllm"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=f"{PROGRAM} is not on the PATH"),
]
K = 9
HEADS = {"head_dim": 32}  # its kernels have no smaller ones
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def alike():
    """A nonuniform student whose layers differ in their MLPs alone, one of them without."""
    return pruned(heads=(4, 4, 4, 4), kv_heads=(2, 2, 2, 2), ffn=(96, 64, 32, 0), **HEADS)


@contextmanager
def vllm_server(folder, model):
    """The address of a server of a model, whose folder is below another."""
    saved(folder / "model", model)
    how = ["--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager",
           "--max-num-seqs", "4", "--max-logprobs", str(K), "--trust-remote-code"]  # fmt: skip
    with running([PROGRAM, "serve", str(folder / "model"), *how], folder, seconds=400, env=os.environ | OFFLINE) as address:
        yield address


STUDENTS = {"uniform": lambda: made(**HEADS), "nonuniform": alike, "padded": lambda: pruned(**HEADS)}


@pytest.mark.parametrize("kind", STUDENTS)
def test_it_computes_what_transformers_does_and_fills_a_cache(kind, tmp_path):
    model = surer(STUDENTS[kind]())
    (prompt,) = blocks_of(1, 12)["input_ids"][:]
    written = model.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 12:]
    if kind == "padded":
        saved(tmp_path / "nonuniform", model)
        export(tmp_path / "nonuniform", tmp_path / "stock")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    with vllm_server(tmp_path, model) as address:
        asked = {"model": str(tmp_path / "model"), "prompt": prompt.tolist(), "max_tokens": 8, "temperature": 0}
        asked |= {"ignore_eos": True, "return_token_ids": True}
        said = requests.post(f"{address}/v1/completions", json=asked, timeout=120).json()
        assert torch.allclose(*both_name(address, tmp_path / "model", blocks_of(6, 60), K, tmp_path), rtol=0, atol=5e-3)
    assert said["choices"][0]["token_ids"] == written.tolist()


def test_layers_that_differ_in_heads_are_not_taken(tmp_path):
    """As the guide says, and why their export is padded: it fails at such a layer, or at shapes, rather than answers."""
    with pytest.raises((AssertionError, requests.RequestException)), vllm_server(tmp_path, pruned(**HEADS)) as address:
        asked = {"model": str(tmp_path / "model"), "prompt": [5, 6, 7], "max_tokens": 1}
        assert requests.post(f"{address}/v1/completions", json=asked, timeout=120).ok
    refused = r"shape '\[.*\]' is invalid for input of size|Layer \d+ does not dispatch through the Transformers attention"
    assert re.search(refused, (tmp_path / "server.log").read_text())
