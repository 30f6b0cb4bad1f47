"""Every form in which users have text, as a small real file: read, loaded or streamed, to the same blocks."""

import importlib.util
import json
import struct

import numpy as np
import pytest
import tiny
from datasets import Dataset, DatasetDict, Features, List, Value
from hub_server import hub_server, use

from hf_minitron import token_blocks
from hf_minitron.data.formats import WANTED
from hf_minitron.data.mixture import mixed_blocks, read_sources
from hf_minitron.data.packing import check_first_block
from hf_minitron.data.texts import check_text, load_text, splits_of
from hf_minitron.inputs import text_files

TEXTS = tiny.text(12, 0)
IDS = [tiny.tokenizer()(text)["input_ids"] + [2] for text in TEXTS]


def write_megatron(stem, rows, dtype=np.uint16, code=8, documents=None):
    """Write an indexed dataset as Megatron does: header, lengths, places, and the sequence with which each document begins."""
    flat = np.concatenate([np.asarray(row, dtype) for row in rows])
    stem.with_name(stem.name + ".bin").write_bytes(flat.tobytes())
    lengths = np.array([len(row) for row in rows], np.int32)
    places = (np.cumsum(lengths) - lengths).astype(np.int64) * np.dtype(dtype).itemsize
    documents = np.arange(len(rows) + 1, dtype=np.int64) if documents is None else np.array(documents, np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(rows), len(documents))
    stem.with_name(stem.name + ".idx").write_bytes(head + lengths.tobytes() + places.tobytes() + documents.tobytes())


def saved(folder, rows):
    Dataset.from_list(rows).save_to_disk(folder, num_shards=2)
    return folder


def spark(folder, rows):
    """A folder of parquet files as Spark writes it, with its marks."""
    folder.mkdir()
    for number in range(2):
        Dataset.from_list(rows[number * 6 : number * 6 + 6]).to_parquet(folder / f"part-0000{number}-c000.snappy.parquet")
    (folder / "_SUCCESS").write_text("")
    (folder / ".part-00000-c000.snappy.parquet.crc").write_text("crc")
    return folder


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def megatron(stem, rows):
    write_megatron(stem, [row["input_ids"] for row in rows])
    return stem


WAYS = {
    "save_to_disk": saved,
    "parquet": spark,
    "jsonl": lambda path, rows: jsonl(path.with_suffix(".jsonl"), rows),
    "megatron": megatron,
    "megatron.bin": lambda path, rows: megatron(path, rows).with_name(path.name + ".bin"),
    "megatron.idx": lambda path, rows: megatron(path, rows).with_name(path.name + ".idx"),
}


@pytest.mark.parametrize("what", ["text", "input_ids"])
@pytest.mark.parametrize("way", WAYS)
def test_every_form_gives_the_same_blocks(tmp_path, way, what):
    if "megatron" in way and what == "text":
        return
    values = TEXTS if what == "text" else IDS
    source = str(WAYS[way](tmp_path / "my-text_document", [{what: value, "url": "https://a.b"} for value in values]))
    expected = token_blocks(Dataset.from_dict({"text": TEXTS}), tiny.tokenizer(), 16)["input_ids"][:].tolist()
    check_text(source, 16)
    check_first_block(source, tiny.tokenizer(), 16)
    for streaming in (False, True):
        blocks = mixed_blocks(read_sources(source), tiny.tokenizer(), 16, streaming=streaming)
        assert blocks["input_ids"][:].tolist() == expected, f"streaming: {streaming}"
        assert blocks.column_names == ["input_ids"]
    files = text_files(source, {}).values()
    assert files, "the digest knows its files"
    assert all(path.is_file() for path in files)
    if "megatron" in way:
        assert {path.suffix for path in files} == {".bin", ".idx"}


def test_documents_of_megatron_may_have_several_sequences_and_any_type(tmp_path):
    for code, dtype in {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}.items():
        write_megatron(tmp_path / "a", [[3, 4], [5, 2], [6, 7, 2]], dtype, code, documents=[0, 2, 3])
        blocks = token_blocks(load_text(str(tmp_path / "a")), tiny.tokenizer(), 7, cross_documents=False)
        assert blocks["input_ids"][:].tolist() == [[3, 4, 5, 2, 6, 7, 2]]
        assert blocks["position_ids"][:].tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_a_megatron_dataset_is_mapped_and_shuffled_without_a_copy(tmp_path, monkeypatch):
    write_megatron(tmp_path / "a", IDS)
    documents = load_text(str(tmp_path / "a.bin"))
    (values,) = (chunk.values for chunk in documents.data.column("input_ids").chunks)
    assert values.type == "uint16"
    found = token_blocks(documents, tiny.tokenizer(), 41, seed=3)["input_ids"][:].tolist()
    assert sorted(found) == sorted(IDS)
    assert found != IDS


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"TNTIDX\x00\x00" + raw[8:], "a.idx is not an index of Megatron: it does not begin with MMIDIDX"),
        (lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:], "a.idx is of version 2 with tokens of type 8"),
        (lambda raw: raw[:17] + b"\x07" + raw[18:], "a.idx is of version 1 with tokens of type 7"),
        (lambda raw: raw[:17] + b"\x04" + raw[18:], "a.idx counts 492 tokens of 4 bytes, and a.bin has 984 bytes"),
        (lambda raw: raw[:-9], "a.idx is cut off: 273 bytes of 282"),
        (lambda raw: b"", "a.idx is not an index of Megatron"),
    ],
)
def test_a_damaged_megatron_dataset_is_refused_in_a_line(tmp_path, damage, message):
    write_megatron(tmp_path / "a", IDS)
    path = tmp_path / "a.idx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"a cannot be read: {message}") as raised:
        check_first_block(str(tmp_path / "a"), tiny.tokenizer(), 16)
    assert "\n" not in str(raised.value)


def test_half_a_megatron_dataset_is_refused(tmp_path):
    write_megatron(tmp_path / "a", IDS)
    (tmp_path / "a.idx").unlink()
    with pytest.raises(ValueError, match=r"a.idx is missing beside .*a.bin: a Megatron dataset is both"):
        check_text(str(tmp_path / "a.bin"))


def test_splits_of_save_to_disk(tmp_path):
    DatasetDict(train=Dataset.from_dict({"text": ["w1"]}), test=Dataset.from_dict({"text": ["w2"]})).save_to_disk(
        tmp_path / "a"
    )
    assert list(load_text(str(tmp_path / "a"), "test")) == [{"text": "w2"}]
    assert splits_of(str(tmp_path / "a")) == ["train", "test"]
    with pytest.raises(ValueError, match=r"a cannot be read: Bad split: dev. Available splits: \['train', 'test'\]"):
        load_text(str(tmp_path / "a"), "dev")
    saved(tmp_path / "b", [{"text": "w1"}, {"text": "w3"}])
    assert len(load_text(str(tmp_path / "b"), "test")) == 2, "one dataset has no splits"
    assert splits_of(str(tmp_path / "b")) == ["train"]
    saved(tmp_path / "c", [{"text": "w1"}, {"text": None}])
    with pytest.raises(ValueError, match="c, row 2: column 'text' holds 'None', not text. Leave it out"):
        load_text(str(tmp_path / "c"))


MASKED = {
    "labels": {"labels": [-100, -100, 5, 2]},
    "completion_mask": {"completion_mask": [0, 0, 1, 1]},
    "assistant_masks": {"assistant_masks": [0, 0, 1, 1]},
    "attention_mask": {"input_ids": [9, 3, 4, 5, 2], "attention_mask": [0, 1, 1, 1, 1], "labels": [-100, -100, -100, 5, 2]},
}


@pytest.mark.parametrize("kind", MASKED)
def test_tokens_with_masks_are_learnt_where_these_say(tmp_path, kind):
    path = jsonl(tmp_path / "a.jsonl", [{"input_ids": [3, 4, 5, 2]} | MASKED[kind]] * 8)
    for streaming in (False, True):
        blocks = token_blocks(load_text(str(path), streaming=streaming), tiny.tokenizer(), 8)
        assert blocks["input_ids"][:].tolist() == [[3, 4, 5, 2] * 2] * 4
        assert blocks["labels"][:].tolist() == [[-100, -100, 5, 2] * 2] * 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [3, 4, 2], "labels": [4, 2, -100]}, "has labels that are neither its input_ids nor -100"),
        ({"input_ids": [3, 4, 2], "labels": [3, 4]}, "has 2 labels for 3 input_ids"),
        ({"input_ids": [3, -4, 2], "labels": [3, 4, 2]}, "holds the id -4, which the tokenizer does not have"),
        ({"input_ids": [3, 70_000, 2], "labels": [3, 4, 2]}, "holds the id 70,000, which the tokenizer does not have"),
    ],
)
def test_tokens_that_are_none_are_refused_by_their_row(tmp_path, row, message):
    path = jsonl(tmp_path / "a.jsonl", [{"input_ids": [3, 4, 2], "labels": [3, 4, 2]}] * 70 + [row])
    with pytest.raises(ValueError, match=rf"a.jsonl: document 70 \(from 0\) {message}"):
        token_blocks(load_text(str(path)), tiny.tokenizer(), 8, name="a.jsonl")


def test_tokens_have_the_type_of_their_column(tmp_path):
    features = Features({"input_ids": List(Value("uint16"))})
    Dataset.from_dict({"input_ids": IDS}, features=features).to_parquet(tmp_path / "a.parquet")
    assert token_blocks(load_text(str(tmp_path / "a.parquet")), tiny.tokenizer(), 41)["input_ids"][:].tolist() == IDS


@pytest.mark.skipif(importlib.util.find_spec("zstandard") is None, reason="zstandard is not installed")
def test_zstandard(tmp_path):
    import zstandard

    raw = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    for streaming in (False, True):
        assert [row["text"] for row in load_text(str(tmp_path / "a.jsonl.zst"), streaming=streaming)] == TEXTS


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a dataset of two folders of files."""
    folder = tmp_path_factory.mktemp("repo")
    for name, rows in {"en/a-0": TEXTS[:4], "en/a-1": TEXTS[4:8], "de/b-0": TEXTS[8:]}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        jsonl(folder / f"{name}.jsonl", [{"text": text} for text in rows])
    with hub_server() as server, pytest.MonkeyPatch.context() as patch:
        server.add_folder("datasets/me/files", folder)
        use(server, patch, tmp_path_factory.mktemp("cache"))
        yield server


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("hf://datasets/me/files/en/*.jsonl", 8),
        ("hf://datasets/me/files/en/a-1.jsonl", 4),
        ("hf://datasets/me/files@main/de/*", 4),
        ("hf://datasets/me/files", 12),
    ],
)
def test_files_of_the_hub(hub, source, count):
    check_first_block(source, tiny.tokenizer(), 8)
    for streaming in (False, True):
        assert len(list(load_text(source, streaming=streaming))) == count
    (commit,) = text_files(source, {}).values()
    assert len(commit) == 40
    assert splits_of(source) == ["train"]


def test_data_files_of_a_source(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    for number, text in enumerate(TEXTS[:2]):
        jsonl(tmp_path / f"local/{number}.jsonl", [{"text": text}])
    text = {"me/files": {"weight": 1, "data_files": "de/*.jsonl"}, "local": {"weight": 1, "data_files": "1.jsonl"}}
    sources = read_sources(text)
    assert [source.name for source in sources] == ["hf://datasets/me/files/de/*.jsonl", "local/1.jsonl"]
    assert [len(load_text(source.name)) for source in sources] == [4, 1]
    for source, pattern in (("local/0.jsonl", "*"), ("me/files", ["a"]), ("me/files:en", "*")):
        with pytest.raises(ValueError, match=f"text: {source}: data_files"):
            read_sources({source: {"weight": 1, "data_files": pattern}})


@pytest.mark.parametrize("source", ["hf://models/me/files", "hf://datasets/me", "hf://me/files/a.jsonl"])
def test_other_places_of_the_hub_are_refused(source):
    with pytest.raises(ValueError, match="is no dataset: write hf://datasets/owner/name"):
        load_text(source)


@pytest.mark.parametrize("name", ["a.npy", "a.tar", "a.arrow", "a.bin.gz", "a.tfrecord", "a.pt", "a.pdf"])
def test_anything_else_is_refused_by_what_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match="has no known suffix") as raised:
        check_text(str(tmp_path / name))
    assert str(raised.value).endswith(WANTED)
    for what in (".jsonl", ".parquet", ".zst", "save_to_disk", ".bin and .idx", "hf://", "Hub id"):
        assert what in str(raised.value)
