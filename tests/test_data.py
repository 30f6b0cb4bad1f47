"""Training text: documents kept apart, mixtures, streams; what is read twice and what is not."""

import bz2
import gzip
import json
import lzma
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from accelerate import skip_first_batches
from datasets import Dataset
from test_accelerate import launch, script
from test_distillation import arguments, full_loss
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from hf_minitron import DistillationTrainer, token_blocks
from hf_minitron.__main__ import main
from hf_minitron.data import packing as data
from hf_minitron.data import shards as shard_files
from hf_minitron.data.mixture import check_sources, mixed_blocks, read_mixture, read_sources
from hf_minitron.data.packing import adds_bos_token, check_first_block, text_hash
from hf_minitron.data.texts import check_text, load_text
from hf_minitron.distillation.documents import check_documents_apart, check_layer_kinds
from hf_minitron.distillation.trainer import collate
from hf_minitron.evaluation.speed import random_model
from hf_minitron.modeling import PrunedConfig
from hf_minitron.run import Run
from hf_minitron.stages import cache, score, training

LENGTHS = (3, 9, 0, 1, 14, 2, 6, 21, 5, 4, 11)  # of documents; with end tokens 87 tokens


def documents(lengths=LENGTHS):
    words = iter(tiny.WORDS * 9)
    return Dataset.from_dict({"text": [" ".join(islice(words, length)) for length in lengths]})


def apart(block_size=16):
    return token_blocks(documents(), tiny.tokenizer(), block_size, cross_documents=False)


def pieces(blocks):
    """The documents of every block, cut where the text says so: after an end token."""
    for row in blocks["input_ids"][:].tolist():
        piece = []
        for token in row:
            piece.append(token)
            if token == tiny.tokenizer().eos_token_id:
                yield torch.tensor([piece])
                piece = []
        if piece:
            yield torch.tensor([piece])


def nonuniform(seed):
    torch.manual_seed(seed)
    stock = tiny.config(initializer_range=0.3)
    return AutoModelForCausalLM.from_config(PrunedConfig.from_stock(stock, layer_intermediate_size=[72, 0, 40])).double().eval()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "nonuniform"])
def test_a_block_of_documents_is_worth_what_they_are_alone(tmp_path, model_type):
    """Student and teacher: every logit, and the loss, which predicts no document's first token."""
    student, teacher = (nonuniform(s) if model_type == "nonuniform" else tiny.model(model_type, seed=s) for s in (1, 0))
    batch, alone = collate(list(apart())), list(pieces(apart()))
    assert len(alone) > len(batch["input_ids"]) + 5
    assert max(piece.shape[1] for piece in alone) > 7  # longer than the window
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    for model in (student, teacher):
        together = model(**inputs, use_cache=False).logits.flatten(0, 1)
        assert torch.allclose(together, torch.cat([model(input_ids=ids).logits[0] for ids in alone]), atol=1e-10)
    losses = {"forward_kl": 0.7, "cross_entropy": 0.3}
    trainer = DistillationTrainer(student, teacher, arguments(tmp_path, losses=losses), train_dataset=apart())
    found, count = trainer.compute_loss(student, dict(batch)), 0
    expected = torch.zeros((), dtype=torch.float64)
    for ids in alone:
        if (predicted := ids.shape[1] - 1) > 0:
            expected += full_loss(student, teacher, {"input_ids": ids, "labels": ids}, losses) * predicted
            count += predicted
    assert found.item() == pytest.approx(expected.item() / count, abs=1e-10)
    crossing = collate([{"input_ids": row["input_ids"]} for row in apart()])
    assert abs(trainer.compute_loss(student, crossing).item() - found.item()) > 1e-3


def test_rows_of_documents_are_padded_with_what_sees_nothing(tmp_path):
    student, teacher = tiny.model(seed=1), tiny.model()
    trainer = DistillationTrainer(student, teacher, arguments(tmp_path), train_dataset=apart())
    rows = [{name: values[:length] for name, values in row.items()} for row, length in zip(apart(), (16, 5, 9), strict=False)]
    alone = [collate([row]) for row in rows]
    counts = torch.tensor([int((batch["labels"][:, 1:] != -100).sum()) for batch in alone])
    expected = sum(trainer.compute_loss(student, dict(b)) * n for b, n in zip(alone, counts, strict=True)) / counts.sum()
    batch = collate(rows)
    assert batch["input_ids"].shape == (3, 16)
    assert "attention_mask" not in batch
    assert torch.allclose(trainer.compute_loss(student, batch), expected, atol=1e-12)


# Transformers resets no recurrent state, and no convolution, where positions start again.
CROSS = (
    "opt", "gpt_oss", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba", "mamba2",
    "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
)  # fmt: skip


@pytest.mark.parametrize("model_type", [*tiny.MODEL_TYPES, "gemma4_text", "gpt_neox_japanese", "olmo_hybrid", "nonuniform"])
def test_which_models_keep_documents_apart(model_type):
    model = nonuniform(0) if model_type == "nonuniform" else tiny.model(model_type, dtype=torch.float32)
    ids, positions = (apart()[name][:] for name in ("input_ids", "position_ids"))
    with torch.no_grad():
        found = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.flatten(0, 1)
        alone = torch.cat([model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in pieces(apart())])
    holds = torch.allclose(found, alone, atol=1e-3)
    assert holds == (model_type not in CROSS)
    checks = [partial(check_documents_apart, model)]
    if model_type != "nonuniform":
        checks.append(partial(check_config, model.config))
    for check in checks:
        if holds:
            check()
        else:
            with pytest.raises(ValueError, match="takes no notice of where a document starts: set cross_documents to true"):
                check()


def check_config(config):
    """What a stage looks at before weights are read."""
    check_layer_kinds(config)
    check_documents_apart(random_model(config, torch.float32))


@pytest.mark.parametrize("streaming", [False, True])
def test_no_token_is_lost_between_batches_of_documents(streaming):
    texts = documents(LENGTHS * 9)  # more than the tokenizer gets at a time
    blocks = token_blocks(texts.to_iterable_dataset() if streaming else texts, tiny.tokenizer(), 16, 768, cross_documents=False)
    ids = [ids for text in texts["text"] for ids in [*tiny.tokenizer()(text)["input_ids"], tiny.tokenizer().eos_token_id]]
    assert [token for row in ids_of(blocks) for token in row] == ids[:768]
    assert len(ids) < 800
    ends = [token == tiny.tokenizer().eos_token_id for token in ids]
    starts = [i % 16 == 0 or ends[i - 1] for i in range(768)]
    assert [position == 0 for row in blocks for position in row["position_ids"].tolist()] == starts


def test_a_document_that_is_no_text_is_named():
    with pytest.raises(ValueError, match=r"The text: document 70 \(from 0\) holds no text"):
        token_blocks(Dataset.from_dict({"text": ["w1"] * 70 + [None]}), tiny.tokenizer(), 8)


def test_positions_start_again_at_documents_and_blocks():
    assert "position_ids" not in token_blocks(documents(), tiny.tokenizer(), 16).column_names
    blocks = token_blocks(documents((3, 9, 0, 5)), tiny.tokenizer(), 8, cross_documents=False)
    assert blocks["position_ids"][:].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 0]]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_and_blocks_begin_with_bos_where_the_tokenizer_does(streaming):
    texts = Dataset.from_dict({"text": ["w0 w1 w2", "", "w3 w4 w5 w6 w7", "<s> w0"]})  # as a chat, the last has its own
    texts = texts.to_iterable_dataset() if streaming else texts
    blocks = token_blocks(texts, tiny.tokenizer(adds_bos=True), 6, 18, cross_documents=False)
    rows = [{key: value.tolist() for key, value in row.items()} for row in blocks]
    assert [row["input_ids"] for row in rows] == [[1, 3, 4, 5, 2, 1], [1, 2, 1, 6, 7, 8], [1, 9, 10, 2, 1, 3]]
    assert [row["position_ids"] for row in rows] == [[0, 1, 2, 3, 4, 0], [0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1]]
    for row in rows:  # given, not predicted
        assert row["labels"] == [-100 if token == 1 else token for token in row["input_ids"]]


def test_every_document_is_what_the_tokenizer_makes_of_it():
    tokenizer, texts = tiny.tokenizer(adds_bos=True), documents((3, 9, 0, 5, 14) * 30)
    whole = [token for ids in tokenizer(list(texts["text"]))["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    for size in (7, 16, 64):
        found = []
        for row in token_blocks(texts, tokenizer, size)["input_ids"][:].tolist():
            assert row[0] == tokenizer.bos_token_id
            found += row[1:] if whole[len(found)] != tokenizer.bos_token_id else row
        assert found == whole[: len(found)]
        assert len(whole) - len(found) < size


def test_without_bos_blocks_are_as_they_were():
    """A tokenizer that has a BOS token but does not set it, and one that shall not: no token, no column more."""
    rows = [token_blocks(documents(), tiny.tokenizer(adds_bos=adds), 16, add_bos_token=wanted)
            for adds, wanted in ((False, None), (False, False), (True, False))]  # fmt: skip
    ids = [i for text in documents()["text"] for i in [*tiny.tokenizer()(text)["input_ids"], 2]]
    for blocks in rows:
        assert blocks.column_names == ["input_ids"]
        assert blocks["input_ids"][:].flatten().tolist() == ids[:80]
    wanted = token_blocks(documents(), tiny.tokenizer(), 16, add_bos_token=True)
    assert text_hash(wanted) == text_hash(token_blocks(documents(), tiny.tokenizer(adds_bos=True), 16)) != text_hash(rows[0])


def test_bos_where_there_is_none_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = None
    assert adds_bos_token(tokenizer) is False
    with pytest.raises(ValueError, match="add_bos_token: true, but the tokenizer has no BOS token; leave it out"):
        token_blocks(documents(), tokenizer, 16, add_bos_token=True)


def test_a_loss_does_not_count_bos(tmp_path):
    blocks = token_blocks(documents(), tiny.tokenizer(adds_bos=True), 16)
    batch = collate([blocks[i] for i in range(3)])
    assert (batch["labels"] == -100).equal(batch["input_ids"] == 1)
    assert (batch["input_ids"][:, 1:] == 1).any()
    trainer = DistillationTrainer(tiny.model(seed=1), tiny.model(), arguments(tmp_path), train_dataset=blocks)
    predicted = (batch["labels"][:, 1:] != -100).sum()
    assert float(trainer.compute_loss(trainer.model, batch)) > 0
    assert predicted < batch["labels"][:, 1:].numel()
    assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(
        float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=1) / predicted), rel=1e-5
    )


def test_a_cache_is_made_again_when_bos_changes():
    assert "add_bos_token" in training.BLOCK_SETTINGS
    assert "distill.add_bos_token" in cache.STAGE.reads


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Three sources of words of their own: 35, 20 and 3 documents of 40 tokens with the end token."""
    monkeypatch.chdir(tmp_path)
    for number, (name, count) in enumerate({"a": 35, "b": 20, "c": 3}.items()):
        words = tiny.WORDS[number * 30 : number * 30 + 30]
        rows = [json.dumps({"text": " ".join(words[(i + j) % 30] for j in range(39))}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def shares(blocks):
    """Blocks of every source, told by its words; each block is of one source."""
    found = [{(int(token) - 3) // 30 for token in row if token > 2} for row in blocks]
    assert all(len(sources) == 1 for sources in found)
    order = [sources.pop() for sources in found]
    return order, [order.count(number) for number in range(3)]


def mix(text, streaming=False, **changes):
    settings = {"block_size": 20, "seed": 3} | changes
    return mixed_blocks(read_sources(text), tiny.tokenizer(), streaming=streaming, **settings)


def ids_of(blocks, count=None):
    return [row["input_ids"].tolist() for row in islice(blocks, count)]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_shares_of_tokens_and_a_short_source_is_read_again(texts, caplog, streaming):
    text = {"a.jsonl": 6, "b.jsonl": 3, "c.jsonl": 1}
    rows = ids_of(mix(text, streaming, max_tokens=20 * 100))
    order, counts = shares(rows)
    assert counts == [60, 30, 10]
    assert sorted(order[:10]) == [0] * 6 + [1] * 3 + [2]
    assert "c.jsonl is read 1.7 times" in caplog.text
    assert "a.jsonl" not in caplog.text
    assert rows == ids_of(mix(text, streaming, max_tokens=20 * 100)) != ids_of(mix(text, streaming, max_tokens=2000, seed=4))


def test_an_epoch_of_a_mixture_reads_nothing_twice(texts, caplog):
    rows = ids_of(mix({"a.jsonl": 1, "c.jsonl": 1}, max_tokens=None))
    order, counts = shares(rows)
    assert counts == [7, 0, 6]
    assert "13 blocks: c.jsonl ends first, of the others 63 blocks" in caplog.text
    assert len(set(map(tuple, rows))) == 13


def test_a_source_may_have_its_own_column(texts):
    (texts / "d.jsonl").write_text("".join(json.dumps({"body": "w60 w61 w62 " * 20, "more": 1}) + "\n" for _ in range(9)))
    blocks = mix({"a.jsonl": 0.5, "d.jsonl": {"weight": 0.5, "column": "body"}}, max_tokens=400)
    assert shares(blocks["input_ids"][:])[1] == [10, 0, 10]
    with pytest.raises(ValueError, match="d.jsonl has no column 'text'; it has body, more"):
        mix({"a.jsonl": 0.5, "d.jsonl": 0.5}, streaming=True)


COLUMNS = {"id": "<urn:uuid:1>", "score": 2.5, "text": None, "metadata": {"source": "web", "tags": ["a"]}}  # of a real data set


def write_rows(rows, path):
    """Write rows as a user would have them, by the file's suffixes."""
    kind, packed = path.suffixes[0], path.suffixes[-1] in PACKED
    table, plain = Dataset.from_list(rows), path.with_suffix("") if packed else path
    if kind == ".txt":
        plain.write_text("".join(f"{row['text']}\n" for row in rows))
    elif kind == ".json" and "list" in path.name:
        plain.write_text(json.dumps(rows, indent=1))
    elif kind == ".csv":
        table.remove_columns("metadata").to_csv(plain) if "metadata" in rows[0] else table.to_csv(plain)
    else:
        table.to_parquet(plain) if kind == ".parquet" else table.to_json(plain)
    if packed:
        path.write_bytes(PACKED[path.suffix].compress(plain.read_bytes()))
        plain.unlink()
    return path


PACKED = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
KINDS = """a.jsonl a.json list.json list.json.gz a.json.gz a.jsonl.gz a.JSONL a.jsonl.bz2 a.jsonl.xz a.parquet a.csv a.csv.gz
v1[0]*?.jsonl""".split()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("column", ["text", "body"])
def test_other_columns_change_nothing(tmp_path, name, column):
    """Nor does the format, whether compressed, loaded or streaming."""
    write_rows(list(documents()), tmp_path / "plain.jsonl")
    rows = [{("body" if key == "text" and column == "body" else key): value for key, value in (COLUMNS | row).items()}
            for row in documents()]  # fmt: skip
    path = write_rows(rows, tmp_path / name)
    expected = ids_of(token_blocks(load_text(str(tmp_path / "plain.jsonl")), tiny.tokenizer(), 16))
    check_first_block(str(path), tiny.tokenizer(), 16, column=column)
    for streaming in (False, True):
        found = token_blocks(load_text(str(path), column=column, streaming=streaming), tiny.tokenizer(), 16)
        assert ids_of(found, len(expected)) == expected, f"streaming: {streaming}"


def test_a_line_of_a_text_file_is_a_document(tmp_path):
    rows = [{"text": "w1 w2"}, {"text": ""}, {"text": "NA null w3"}]
    for name in ("a.txt", "a.txt.gz", "a.csv"):  # what pandas would take for nulls is text
        path = write_rows(rows, tmp_path / name)
        assert [list(load_text(str(path), streaming=streaming)) for streaming in (False, True)] == [rows, rows], name


SHARDS = ["en/c4-train.00000-of-00002.json.gz", "en/c4-train.00001-of-00002.json.gz", "en/c4-validation.00000-of-00001.json.gz"]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A clone of a data set: two shards of a train split and one of another, of one row each, a card, and hidden files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4/en").mkdir(parents=True)
    for number, name in enumerate(SHARDS):
        write_rows([{"text": f"w{number}", "url": "https://a.b"}], tmp_path / "c4" / name)
    configs = {"configs": [{"config_name": "en", "data_files": [{"split": "train", "path": "en/c4-train.*.json.gz"}]}]}
    (tmp_path / "c4/README.md").write_text(f"---\n{yaml.safe_dump(configs)}---\n# C4\n")
    (tmp_path / "c4/.gitattributes").write_text("*.gz filter=lfs\n")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_read_as_datasets_reads_it_and_a_pattern_names_files(shards, streaming):
    for source, words in {
        "c4:en": ["w0", "w1"],  # by the card
        "./c4/en": ["w0", "w1"],  # by the files' names
        "c4/**/*.json.gz": ["w0", "w1", "w2"],
        "c4/en/c4-train.0000[1-9]*": ["w1"],
    }.items():
        check_text(source)
        assert [row["text"] for row in load_text(source, streaming=streaming)] == words, source
    assert list(load_text("c4/en", "validation", streaming=streaming)) == [{"text": "w2"}]


@pytest.mark.parametrize("text", ["c4:en", "./c4/en", "c4/**/*.json.gz", {"c4/en": 0.5, "c4:en": 0.5}])
def test_a_changed_shard_makes_a_stage_run_again(shards, text):
    def digest():
        recipe = {"score": {"text": text, "notes": "long " * 99}}
        run = Run(shards / "run", "owner/model", 0, recipe, shards / "recipe.yaml", {"score": score.Args})  # reads files once
        return run.digest("score", ())

    before = digest()
    assert before == digest()
    write_rows([{"text": "w7 w8"}], shards / "c4" / SHARDS[1])
    assert digest() != before


@pytest.mark.parametrize("source", ["/", "files"])
def test_a_folder_of_a_whole_disk_is_no_folder_of_texts(shards, monkeypatch, source):
    monkeypatch.setattr("hf_minitron.data.formats.MOST_OTHERS", 2)
    (shards / "files").mkdir()
    for number in range(3):
        (shards / f"files/{number}.py").write_text("")
    with pytest.raises(ValueError, match=f"^{source} holds more than 2 files that are no texts: name the folder of the texts$"):
        check_text(source)


def test_a_folder_may_be_called_text(shards):
    (shards / "text").mkdir()
    write_rows([{"text": "w5"}], shards / "text/a.jsonl")
    assert list(load_text("text")) == [{"text": "w5"}]


def test_folders_and_patterns_that_would_be_read_in_part_are_refused(shards):
    write_rows([{"text": "w5"}], shards / "c4/en/more.csv")
    (shards / "none").mkdir()
    (shards / "odd[1]").mkdir()
    (shards / "notes.md").write_text("none")
    for source, message in {
        "c4": "c4 holds .csv and .json files, and one text is of one format: name one kind, such as",
        "c4/en/*": "holds .csv and .json files",
        "c4/en/*.parquet": "No text at 'c4/en/\\*.parquet': want files that end in .jsonl, .json, .parquet",
        "none": "none is a folder without texts",
        "odd[1]": "a folder's name cannot hold",
        "*.md": "notes.md has no known suffix",
        "c4/en/c4-train.json.gz": "No text at",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_text(source)
    (shards / "c4/en/more.csv").unlink()
    with pytest.raises(ValueError, match=r"c4/en cannot be read: Bad split: test. Available splits: \['train', 'validation'\]"):
        load_text("c4/en", "test", streaming=True)


def test_compressed_bytes_are_not_counted_as_tokens(tmp_path):
    for name in ("a.jsonl.gz", "a.parquet"):
        path = write_rows([{"text": "w1 " * 9000}], tmp_path / name)
        assert path.stat().st_size < 9000
        check_text(str(path), 9000)
    with pytest.raises(ValueError, match=r"a.jsonl is too short for one block: \d+ bytes, block_size 9,000"):
        check_text(str(write_rows([{"text": "w1"}], tmp_path / "a.jsonl")), 9000)


def test_zstandard_needs_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    monkeypatch.setattr("datasets.config.ZSTANDARD_AVAILABLE", False)
    with pytest.raises(
        ValueError, match="a.jsonl.zst is compressed by Zstandard, which needs a package: pip install zstandard"
    ):
        check_text(str(tmp_path / "a.jsonl.zst"))


NOT_TEXT = {
    "numbers": (
        [{"text": 3, "body": "w1", "url": "u"}],
        "row 1: column 'text' holds '3', not text. Columns with text: body, url;",
    ),
    "nulls": ([{"text": None}, {"text": None}], "row 1: column 'text' holds 'None', not text. Columns with text: none"),
    "lists": ([{"text": ["w1", "w2"]}], "row 1: column 'text' holds \"\\['w1', 'w2'\\]\", not text"),
    "booleans": ([{"text": True}], "row 1: column 'text' holds 'True', not text"),
    "mixed": ([{"text": "w1"}, {"text": "w2"}, {"text": 3}], "row 3: column 'text' holds '3', not text"),
    "other": (
        [{"rows": [{"role": "user", "content": "w1"}], "source": "web"}],
        "has no column 'text'; it has rows, source. Columns with text: source; with messages: rows; set text_column. "
        "Also read are messages, conversations, completion, input_ids",
    ),
}


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_a_column_that_holds_no_text_is_refused_by_its_row(tmp_path, kind):
    rows, message = NOT_TEXT[kind]
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=f"{kind}.jsonl,? {message}") as raised:
            load_text(str(path), streaming=streaming)
        assert "\n" not in str(raised.value), "one line"
    with pytest.raises(ValueError, match=message):
        check_first_block(str(path), tiny.tokenizer(), 2)


def test_a_null_among_texts_is_refused_by_its_row_when_loaded(tmp_path):
    path = write_rows([{"text": "w1"}, {"text": None}, {"text": "w2"}], tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 2: column 'text' holds 'None', not text"):
        load_text(str(path))


def test_a_null_in_a_shuffled_stream_is_refused_by_its_row(tmp_path):
    rows = [{"body": "w1 w2 w3"}] * 700 + [{"body": None}] + [{"body": "w1"}] * 300
    path = write_rows(rows, tmp_path / "late.jsonl")
    documents = load_text(str(path), column="body", streaming=True)
    with pytest.raises(ValueError, match="late.jsonl, row 701: column 'body' holds 'None', not text. Leave it out"):
        token_blocks(documents, tiny.tokenizer(), 16, seed=1, name="late")


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def test_files_that_hold_nothing_or_break_are_refused_in_a_line(tmp_path):
    for name, content, message in (
        ("empty.jsonl", b"", " cannot be read: .*it is empty"),
        ("packed.jsonl.gz", gzip.compress(b""), " cannot be read: .*it is empty"),
        ("broken.jsonl", b'{"text": "w1"}\n{"text": \n', ", line 2 is not JSON: "),
        ("broken.parquet", b"PAR1 or not", " cannot be read: .*Parquet"),
        ("broken.json.gz", b"\x1f\x8b or not", ", line 1 cannot be decompressed: "),
    ):
        (tmp_path / name).write_bytes(content)
        for streaming in (False, True):
            with pytest.raises(ValueError, match=name + message) as raised:
                load_text(str(tmp_path / name), streaming=streaming)
            assert "\n" not in str(raised.value), "one line"


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.jsonl", b'{"text": \n', "line 801 is not JSON"),
        ("a.json", b'{"text": \n', "line 801 is not JSON"),
        ("a.jsonl", b"[1]\n", r"line 801 holds \[1\], not an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 801 is not UTF-8: byte 0xff"),
    ],
)
def test_a_broken_line_is_numbered_in_a_compressed_file_too(tmp_path, name, line, message, suffix):
    whole = b'{"text": "w1 w2"}\n' * 800
    path = tmp_path / (name + suffix)
    path.write_bytes(PACKERS[suffix](whole + line + whole))
    with pytest.raises(ValueError, match=f"{path.name}, {message}.* Mend or remove it") as raised:
        check_first_block(str(path), tiny.tokenizer(), 16)
    assert "\n" not in str(raised.value), "one line"
    if b"[1]" not in line:
        with pytest.raises(ValueError, match=f"{path.name}, {message}"):
            list(load_text(str(path), streaming=True))


def test_a_compressed_file_that_ends_early_is_refused_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "w%d"}\n' % i for i in range(3000)))[:-1000])
    with pytest.raises(ValueError, match=r"a.jsonl.gz, line \d[\d,]* cannot be decompressed: .*end"):
        check_first_block(str(path), tiny.tokenizer(), 16)


@pytest.mark.parametrize("source", ["many", "many/*.jsonl"])
def test_a_row_or_line_is_named_by_its_shard_and_its_place_there(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many").mkdir()
    rows = [[{"body": f"w{shard} w{i % 90}"} for i in range(50)] for shard in range(4)]
    rows[2][30] = {"body": None}
    for shard, part in enumerate(rows):
        write_rows(part, tmp_path / f"many/train-{shard}.jsonl")
    said = "many/train-2.jsonl, row 31: column 'body' holds 'None', not text. Leave it out"
    stream = load_text(source, column="body", streaming=True)
    assert stream.num_shards == 4, "shards are shared among processes and shuffled"
    for order in (stream, stream.shuffle(seed=1, buffer_size=20), stream.shard(2, 1)):
        with pytest.raises(ValueError, match=said):
            list(order)
    with pytest.raises(ValueError, match=said):
        load_text(source, column="body")
    path = tmp_path / "many/train-2.jsonl"
    path.write_text(path.read_text().replace("null}", "3"))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="many/train-2.jsonl, line 31 is not JSON: .* Mend or remove it"):
            list(load_text(source, column="body", streaming=streaming))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text is missing"),
        ({}, "text is missing"),
        ({"a.jsonl": 0}, "a.jsonl: weight 0 is not a number above zero"),
        ({"a.jsonl": 1, "b.jsonl": "half"}, "b.jsonl: weight 'half'"),
        ({"a.jsonl": float("nan")}, "a.jsonl: weight nan"),
        ({"a.jsonl": True}, "a.jsonl: weight True"),
        ({"a.jsonl": {"split": "test"}}, "a.jsonl: weight None"),
        ({"a.jsonl": {"weight": 1, "colunm": "x"}}, "a.jsonl: 'colunm' is none of weight, split, column"),
        ({"a.jsonl": {"weight": 1, "column": 2}}, "a.jsonl: split 'train' and column 2 must be text"),
        ({"a.jsonl": 1, "none.jsonl": 1}, "No text at 'none.jsonl'"),
        ({"a.jsonl": 1, "b.jsonl": 1e-6}, "b.jsonl would give none of 40 blocks"),
    ],
)
def test_bad_mixtures_are_refused_by_name(texts, text, message):
    with pytest.raises(ValueError, match=message):
        check_sources(read_sources(text), 20, 800)


def test_a_source_too_short_is_named(texts):
    with pytest.raises(ValueError, match="c.jsonl is too short for one block: 120 tokens in 3 documents, block_size 121"):
        mix({"a.jsonl": 1, "c.jsonl": 1}, block_size=121, max_tokens=2 * 121)
    with pytest.raises(ValueError, match="c.jsonl is too short for one block"):
        mix({"a.jsonl": 1, "c.jsonl": 1}, streaming=True, block_size=121)


@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("text", ["b.jsonl", {"a.jsonl": 2, "b.jsonl": 1}])
def test_a_stream_gives_the_blocks_of_the_text_in_memory(texts, text, cross_documents):
    same = {"seed": None, "max_tokens": 600, "cross_documents": cross_documents}
    stream, memory = mix(text, True, **same), mix(text, False, **same)
    assert len(memory) == 30
    for found, expected in zip(stream, memory, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_stream_is_shuffled_by_its_seed(texts):
    first, plain = (ids_of(mix("b.jsonl", True, seed=seed)) for seed in (3, None))
    assert first == ids_of(mix("b.jsonl", True, seed=3))
    assert first != plain
    assert sorted(first) == sorted(plain)


def test_several_processes_tokenize_as_one_does(texts, monkeypatch):
    """Of a text and of a stream; that of several files is shared by as many processes on every machine."""
    for number in range(3):
        (texts / f"part{number}.jsonl").write_text((texts / f"{'abc'[number]}.jsonl").read_text())
    plain = [ids_of(mix("a.jsonl")), ids_of(mix("part*.jsonl"))]
    streamed = ids_of(mix("part*.jsonl", True))
    assert sorted(map(sum, streamed)) == sorted(map(sum, plain[1])), "in another order"
    started = []
    monkeypatch.setattr(
        data, "DataLoader", lambda *args, **how: (started.append(how["num_workers"]), DataLoader(*args, **how))[1]
    )
    monkeypatch.setattr(data, "_FEW", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(2))
    assert [ids_of(mix("a.jsonl")), ids_of(mix("part*.jsonl"))] == plain
    assert ids_of(mix("part*.jsonl", True)) == streamed
    assert started == [2, 2, 3]
    (texts / "part3.jsonl").write_text('{"text": "w1 w2"}\n' * 70 + '{"text": null}\n')
    with pytest.raises(ValueError, match="^part3.jsonl, row 71: column 'text' holds 'None', not text. Leave it out$"):
        mix("part*.jsonl", True)


def test_what_a_process_refuses_is_told_in_a_line(texts, monkeypatch):
    monkeypatch.setattr(data, "_FEW", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(2))
    rows = Dataset.from_dict({"text": ["w1"] * 200 + [None]})
    with pytest.raises(ValueError, match=r"^The text: document 200 \(from 0\) holds no text") as raised:
        token_blocks(rows, tiny.tokenizer(), 8)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_blocks_are_written_to_files_and_mapped(texts, monkeypatch, streaming):
    """Two bytes for a token, in files of a limited size; another process reads the same rows."""
    monkeypatch.setattr(shard_files, "TABLE_TOKENS", 100)
    monkeypatch.setattr(data, "_READ_TOGETHER", 4)
    monkeypatch.setattr(shard_files.write_blocks, "__defaults__", (1000,))
    for text, changes in (("a.jsonl", {}), ({"a.jsonl": 2, "c.jsonl": 1}, {"max_tokens": 1800, "cross_documents": False})):
        folder = texts / f"blocks{len(text)}"
        written, memory = (mix(text, streaming, folder=to, **changes) for to in (folder, None))
        again = read_mixture(folder)
        for found in (written, again):
            assert found.column_names == memory.column_names
            assert all(torch.equal(row[name], other[name]) for row, other in zip(found, memory, strict=True) for name in row)
        files = sorted(folder.rglob("*.arrow"))
        assert len(files) > 2
        assert {str(feature.feature.dtype) for feature in again.features.values()} == {"uint16"}
        assert {Path(file["filename"]) for file in again.cache_files} == set(files)


def test_ids_take_four_bytes_where_two_do_not_hold_them(texts):
    large = tiny.tokenizer([*tiny.WORDS, *(f"more{i}" for i in range(2**16))])
    (texts / "large.jsonl").write_text(json.dumps({"text": "w1 more65535 more7"}) + "\n")
    blocks = mixed_blocks(read_sources("large.jsonl"), large, block_size=4)
    assert blocks.features["input_ids"].feature.dtype == "uint32"
    assert ids_of(blocks) == [large("w1 more65535 more7")["input_ids"] + [2]]


def trainer_on(blocks, folder, **changes):
    values = {
        "max_steps": 9,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    teacher, student = tiny.model(), tiny.model(seed=1, hidden_size=24)
    return DistillationTrainer(student, teacher, arguments(folder, **(values | changes)), train_dataset=blocks)


def losses_of(trainer, **kwargs):
    trainer.train(**kwargs)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_where_it_was_interrupted(texts, workers):
    """In the third pass over its text."""
    text = {"a.jsonl": 0.5, "c.jsonl": 0.5}
    expected = losses_of(trainer_on(mix(text, max_tokens=160), texts / "whole"))
    changes = {"dataloader_num_workers": workers, "dataloader_prefetch_factor": 2 if workers else None}
    again = trainer_on(mix(text, True, max_tokens=160), texts / "again", **changes)
    assert losses_of(again, resume_from_checkpoint=str(texts / "whole/checkpoint-6")) == expected
    other = trainer_on(mix(text, max_tokens=160, seed=4), texts / "other")
    assert losses_of(other, resume_from_checkpoint=str(texts / "whole/checkpoint-6")) != expected


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Blocks for 100,001 steps of two rows."""
    folder = tmp_path_factory.mktemp("many")
    rows = (np.arange(200_002)[:, None] // 90 ** np.arange(4) % 90).astype(np.uint16)  # a row's number in digits
    return shard_files.write_blocks(folder, shard_files.tables_of([{"input_ids": rows}]))


@pytest.mark.parametrize("step", [10, 1_000, 100_000])
def test_training_goes_on_at_any_step_without_reading_what_was_before(many, tmp_path, monkeypatch, step):
    """The Trainer's own way of skipping, which draws numbers of rows: none is read but those of the next batches."""
    args = arguments(tmp_path, max_steps=100_001, per_device_train_batch_size=2, seed=5)
    loader = DistillationTrainer(tiny.model(seed=1), tiny.model(), args, train_dataset=many).get_train_dataloader()
    expected, read, asked = next(islice(loader.batch_sampler, step, None)), [], Dataset.__getitems__
    monkeypatch.setattr(Dataset, "__getitems__", lambda self, keys: (read.append(keys), asked(self, keys))[1])
    begin = time.process_time()
    batch = next(iter(skip_first_batches(loader, step)))
    assert time.process_time() - begin < 5
    assert (batch["input_ids"] * 90 ** torch.arange(4)).sum(1).tolist() == expected
    assert read[0] == expected
    assert len(read) <= 2, "one more is fetched ahead"


def run(project, folder, *more):
    overrides = [item for name, value in more for item in (f"--distill.{name}", json.dumps(value))]
    return main(["distill", str(project["path"]), "--run", str(folder), *overrides])


@pytest.fixture(scope="module")
def pruned(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "run"
    for stage in ("score", "prune"):
        assert main([stage, str(project["path"]), "--run", str(folder)]) == 0
    return folder


def test_the_stage_streams_a_mixture_of_documents_kept_apart(project, pruned):
    sources = [str(project["folder"] / f"{name}.jsonl") for name in ("train", "calibration")]
    keys = [("text", dict.fromkeys(sources, 0.5)), ("cross_documents", False)]
    logs = {}
    for streaming in (True, False):
        assert run(project, pruned, *keys, ("streaming", streaming)) == 0
        logs[streaming] = json.loads((pruned / "distill/log.json").read_text())
    for log in logs.values():
        history = [entry["loss"] for entry in log["history"] if "loss" in entry]
        assert len(history) == 6
        assert history[-1] < history[0]
        assert log["tokens"] == 6 * 2 * 16


def test_a_model_that_cannot_keep_documents_apart_is_not_trained_on_such(texts):
    blocks = mix("a.jsonl", max_tokens=40, cross_documents=False)
    for student, teacher in (("opt", "llama"), ("llama", "opt")):
        with pytest.raises(ValueError, match="opt takes no notice"):
            DistillationTrainer(tiny.model(student), tiny.model(teacher), arguments(texts / "out"), train_dataset=blocks)


def test_the_stage_makes_blocks_once(project, pruned, monkeypatch):
    made, train = [], DistillationTrainer.train
    original = mixed_blocks

    def count(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(training, "mixed_blocks", count)
    monkeypatch.setattr(DistillationTrainer, "train", lambda *args, **kwargs: 1 / 0)
    change = ("learning_rate", 2e-3)
    with pytest.raises(ZeroDivisionError):
        run(project, pruned, change)
    seen = []
    monkeypatch.setattr(DistillationTrainer, "train", lambda self, **kw: (seen.append(self.train_dataset), train(self, **kw)))
    assert run(project, pruned, change) == 0
    assert len(made) == 1
    assert text_hash(seen[0]) == text_hash(made[0])
    assert not (pruned / "distill/checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("text", {"./none.jsonl": 1})], "No text at './none.jsonl'"),
        ([("text", {"none": "much"})], "none: weight 'much' is not a number above zero"),
        ([("text", 3)], "distill.text: 3 is not text or a section"),
    ],
)
def test_the_stage_refuses_before_it_works(project, pruned, capsys, changes, message):
    assert run(project, pruned, *changes) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_mixes_documents_is_refused_before_it_works(project, tmp_path, capsys):
    tiny.model("opt", dtype=torch.float32).save_pretrained(tmp_path / "opt")
    tiny.tokenizer().save_pretrained(tmp_path / "opt")
    arguments = ["--model", str(tmp_path / "opt"), "--run", str(tmp_path / "run"), "--prune.target", "{ffn: 32}"]
    assert main(["run", str(project["path"]), *arguments, "--distill.cross_documents", "false"]) == 1
    assert "distill: opt takes no notice of where a document starts" in capsys.readouterr().err
    assert not (tmp_path / "run/score").exists()


def test_a_nonuniform_teacher_may_keep_documents_apart(project, pruned, tmp_path):
    nonuniform(0).float().save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    assert run(project, pruned, ("teacher", str(tmp_path / "teacher")), ("cross_documents", False)) == 0


def test_a_changed_source_of_a_mixture_makes_the_stage_run_again(project, pruned, tmp_path, capsys):
    source = tmp_path / "more.jsonl"
    source.write_text((project["folder"] / "train.jsonl").read_text())
    keys = [("text", {str(source): 1})]
    assert run(project, pruned, *keys) == 0
    assert run(project, pruned, *keys) == 0
    assert "distill: done before, skipped" in capsys.readouterr().out
    source.write_text(source.read_text() * 2)
    assert run(project, pruned, *keys) == 0
    assert "done before" not in capsys.readouterr().out


SCRIPT = """
import json, os, sys
sys.path.insert(0, {tests!r})
import test_data, tiny
os.chdir({texts!r})
rank, processes, batch = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 2 // int(os.environ["WORLD_SIZE"])
text, found = {{"a.jsonl": 0.5, "c.jsonl": 0.5}}, []
for start in ("", "1/checkpoint-6", "2/checkpoint-6"):
    blocks = test_data.mix(text, True, max_tokens=9 * 2 * 20, cross_documents=False)
    if not start or os.path.isdir(start):
        trainer = test_data.trainer_on(blocks, f"{{processes}}", per_device_train_batch_size=batch)
        found.append(test_data.losses_of(trainer, resume_from_checkpoint=start or None))
with open(f"{{processes}}-{{rank}}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_training_goes_on_with_another_number_of_processes(texts):
    """Two processes with one row each, where one had two."""
    for processes in (1, 2):
        launch(processes, script(texts, SCRIPT, texts=str(texts)))
    one, two = (json.loads((texts / f"{number}-0.json").read_text()) for number in (1, 2))
    assert len(one[0]) == 9
    assert one[1] == one[0], "resumed, to the bit"
    assert two[2] == two[0], "resumed by two, to the bit"
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert two[1] == pytest.approx(one[0], rel=1e-6), "begun by one process"
