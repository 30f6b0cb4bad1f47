"""data and checkpoint."""

import json
import platform
import shutil
from collections import namedtuple

import pytest
import tiny
import torch
from datasets import Dataset

from hf_minitron.checkpoint import checkpoint
from hf_minitron.checkpoint.checkpoint import (
    Checkpoint,
    TensorSpec,
    best_dtype,
    complete_or_absent,
    require_space,
    resolve,
    write_tensors,
)
from hf_minitron.data.packing import text_hash, token_blocks
from hf_minitron.data.texts import check_text, load_text


def documents(count=5, seed=0):
    return Dataset.from_dict({"text": tiny.text(count, seed)})


def test_blocks_hold_every_token_and_the_end_tokens():
    tokenizer, texts = tiny.tokenizer(), documents()
    blocks = token_blocks(texts, tokenizer, 16)
    flat = [i for ids in tokenizer(texts["text"][:])["input_ids"] for i in [*ids, tokenizer.eos_token_id]]
    assert blocks["input_ids"][:].flatten().tolist() == flat[: len(flat) // 16 * 16]


def test_blocks_are_bounded_shuffled_by_seed_and_hashed():
    tokenizer = tiny.tokenizer()
    first, same = (token_blocks(documents(), tokenizer, 16, 64, seed=3) for _ in range(2))
    other = token_blocks(documents(), tokenizer, 16, 64, seed=4)
    assert len(first) == 4
    assert text_hash(first) == text_hash(same) != text_hash(other)


def test_a_short_text_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"41 tokens in 1 documents, block_size 64"):
        token_blocks(documents(1), tiny.tokenizer(), 64)


def test_text_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "w1 w2"}\n')
    assert load_text(str(tmp_path / "a.jsonl"), column="body")["text"][0] == "w1 w2"
    with pytest.raises(ValueError, match="no column 'text'; it has body"):
        load_text(str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="No text at './none.jsonl'"):
        check_text("./none.jsonl")
    with pytest.raises(ValueError, match="too short for one block: 18 bytes"):
        check_text(str(tmp_path / "a.jsonl"), 512)


@pytest.fixture
def folder(tmp_path):
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    return tmp_path / "m"


def test_damaged_checkpoints_are_named(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shards[1].name} is truncated or damaged"):
        Checkpoint(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"Shard {shards[1].name} is missing"):
        Checkpoint(folder)
    shards[1].write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = shards[1].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="promises 'model.extra'"):
        Checkpoint(folder)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_a_number_is_named(tmp_path, value):
    specs = {"a.weight": TensorSpec("F32", (2, 2))}
    with pytest.raises(ValueError, match="'a.weight' holds NaN or infinity"):
        write_tensors(tmp_path, specs, [("a.weight", [torch.ones(1, 2), torch.tensor([[1.0, value]])])], 1000)


def test_a_disk_that_becomes_full_is_told_with_the_bytes_still_needed(tmp_path):
    specs = {name: TensorSpec("F32", (1000,)) for name in "ab"}
    (tmp_path / "model-00002-of-00002.safetensors").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="became full while .*00002.safetensors was written: 4,000 bytes more are needed"):
        write_tensors(tmp_path, specs, ((name, [torch.ones(1000)]) for name in specs), 4000)


@pytest.mark.parametrize("max_shard_bytes", [10, 300, 10**9])
def test_written_tensors_are_read_back(tmp_path, max_shard_bytes):
    tensors = {
        "a": torch.randn(5, 7),
        "b": torch.randn(3, 9).bfloat16(),
        "c": torch.arange(4),
        "d": torch.randn(6, 5).T,
        "e": torch.tensor(1.5).half(),
    }
    names = {dtype: name for name, dtype in checkpoint.DTYPES.items()}
    specs = {name: TensorSpec(names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(tmp_path, specs, ((name, [t]) for name, t in tensors.items()), max_shard_bytes)
    read = Checkpoint(tmp_path)
    assert read.specs == specs
    assert all(torch.equal(read.read(name), t) for name, t in tensors.items())
    assert len(list(tmp_path.glob("*.safetensors"))) == {10: 5, 300: 2, 10**9: 1}[max_shard_bytes]


def test_a_folder_is_complete_or_absent(tmp_path):
    with pytest.raises(RuntimeError), complete_or_absent(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not (tmp_path / "out").exists()
    with complete_or_absent(tmp_path / "out") as folder:
        assert not (folder / "half").exists()
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_with_the_bytes_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(ValueError, match="1,001 bytes needed, 1,000 free"):
        require_space(tmp_path / "new" / "folder", 1001, "the student")
    require_space(tmp_path, 1000, "the student")


@pytest.mark.parametrize("model", ["./nowhere", "nowhere", "a/b/c"])
def test_a_model_that_is_nowhere_is_refused(model):
    with pytest.raises(ValueError, match="No model at"):
        resolve(model)


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_tile"])
@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_models_run_in_bfloat16_where_the_processor_multiplies_it(monkeypatch, feature, has, old):
    if old:  # torch without a public way
        monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
        for name in ("avx512_bf16", "amx_tile"):
            monkeypatch.setattr(f"torch.cpu._is_{name}_supported", lambda name=name: has and name == feature)  # it is there
    else:
        assert {"avx512_bf16", "amx_tile"} <= torch.cpu.get_capabilities().keys() or platform.machine() != "x86_64"
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {feature: has})
    assert best_dtype("cpu") == (torch.bfloat16 if has else torch.float32)
    assert best_dtype("meta") == torch.float32
