"""Documents from files or from a dataset on the Hub: one per row, in a column `text`.

It must not know a tokenizer.
"""

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from hf_minitron.formats import FORMATS, format_of, plain_bytes, text_files


def check_text(source: str, block_size: int = 1) -> None:
    """Refuse a text that does not exist, or is too short for one block, without reading it.

    Args:
        source (`str`): A path or a Hub id, as for `load_text`.
        block_size (`int`, *optional*, defaults to 1): Tokens per block.
    """
    files = text_files(source)
    size = plain_bytes(files) if files else None
    if size is not None and size < block_size:  # a token is at least a byte
        raise ValueError(f"{source} is too short for one block: {size:,} bytes, block_size {block_size:,}")


def load_text(source: str, split: str = "train", column: str = "text", streaming: bool = False) -> Dataset | IterableDataset:
    """Load documents: local .jsonl, .json, .parquet, .csv or .txt files, compressed or not, or a dataset on the Hub.

    Args:
        source (`str`): A file, a pattern such as `shards/*.json.gz`, a folder of shards, or a Hub id; with a configuration
            after a colon where a dataset has several (`Salesforce/wikitext:wikitext-2-raw-v1`).
        split (`str`, *optional*, defaults to `"train"`): Split of a folder or a Hub dataset.
        column (`str`, *optional*, defaults to `"text"`): The column that holds the text.
        streaming (`bool`, *optional*, defaults to `False`): Read documents as they are asked for, not all of them now.

    Returns:
        `Dataset`, or `IterableDataset` when streaming: One document per row, in a column `text`.

    Raises:
        ValueError: when it cannot be read, or the column is missing or holds something else than text, with the row.
    """
    files = text_files(source)
    try:
        documents = _load(source, files, split, streaming)
        first = next(iter(documents), {})
    except Exception as error:  # of any library below: a file's format, the Hub, the network
        said = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"{source} cannot be read: {' '.join(str(said).split()) or 'it is empty'}") from error
    if not first:
        raise ValueError(f"{source} cannot be read: it is empty")
    _check_column(source, documents, column, first)
    documents = documents.select_columns(column)
    if streaming:  # whose rows nobody has looked at; before shuffling, which would hide where they stand
        documents = documents.map(_check_row, with_indices=True, fn_kwargs={"source": source, "column": column})
    return documents if column == "text" else documents.rename_column(column, "text")


def _load(source: str, files: Sequence[Path] | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    if files is None or files[0].is_dir():
        name, _, configuration = source.partition(":")
        name = str(files[0].absolute()) if files else name  # a folder may be called as a builder is: text, csv
        return load_dataset(name, configuration or None, split=split, streaming=streaming)
    builder, options = FORMATS[format_of(files[0])]
    names = [glob.escape(str(file.absolute())) for file in files]  # they exist, so no name is a pattern
    return load_dataset(builder, data_files=names, split="train", streaming=streaming, **options)


def _check_column(source: str, documents: Dataset | IterableDataset, column: str, first: Mapping) -> None:
    """Refuse a missing column, and one that holds something else than text, by the first row where it does."""
    columns = documents.column_names or list(first)  # a stream may not know before its first row
    texts = ", ".join(name for name, value in first.items() if isinstance(value, str)) or "none"
    advice = f"Columns with text: {texts}; set text_column"
    if any(map(_is_chat, first.values())):
        advice += ". Chats are not read as text: write them to a file with the tokenizer's apply_chat_template first"
    if column not in columns:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(columns)}. {advice}")
    if isinstance(first[column], str) and _is_text(documents, column):
        return
    for number, row in enumerate(documents.select_columns(column), 1):
        if not isinstance(row[column], str):
            raise ValueError(f"{source}, row {number:,}: column {column!r} holds {str(row[column])[:40]!r}, not text. {advice}")


def _check_row(row: dict, number: int, source: str, column: str) -> dict:
    """Return a row of a stream; refuse one whose column holds something else than text."""
    if not isinstance(row[column], str):
        raise ValueError(f"{source}, row {number + 1:,}: column {column!r} holds {str(row[column])[:40]!r}, not text. Leave it "
                         "out")  # fmt: skip
    return row


def _is_text(documents: Dataset | IterableDataset, column: str) -> bool:
    """Return whether a column is of one type, text, and, where all of it is here, without nulls."""
    kind = (documents.features or {}).get(column, Value("string"))  # a stream's features may not be known
    whole = isinstance(documents, IterableDataset) or documents.data.column(column).null_count == 0
    return getattr(kind, "dtype", None) in ("string", "large_string") and whole


def _is_chat(value: object) -> bool:
    """Return whether a value is a list of messages, as the Hub's `messages` and `conversations` columns hold."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def broken_line(path: Path) -> str | None:
    """Say which line of a text file is not UTF-8 or not a JSON object, and why; `None` when it is not for that."""
    if not path.is_file() or path.suffix not in (".jsonl", ".json", ".csv", ".txt"):
        return None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if path.suffix == ".jsonl" and line.strip() else line.decode()
            except UnicodeDecodeError as error:
                return f"line {number:,} is not UTF-8: byte {error.object[error.start]:#04x}"
            except (ValueError, RecursionError) as error:
                return f"line {number:,} is not JSON: {error}"
            if path.suffix == ".jsonl" and line.strip() and not isinstance(row, dict):
                return f'line {number:,} holds {str(row)[:40]}, not an object such as {{"text": ...}}'
    return None
