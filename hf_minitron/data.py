"""Text to token blocks: the one form in which calibration, distillation and perplexity read text.

It must not know a model. Documents are packed one after another with the end token between them and cut into blocks of equal
length, so that no block is padded. Blocks are made at once, or, of a stream, as they are asked for.
"""

import glob
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from math import ceil
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset, Value, config, load_dataset
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_minitron.formats import FORMATS, format_of, plain_bytes, text_files

logger = logging.getLogger(__name__)

_READ_TOGETHER = 64  # documents handed to the tokenizer at a time


def check_text(source: str, block_size: int = 1, split: str = "train", column: str = "text") -> None:
    """Refuse a text that cannot be read, has no such column or is too short for one block, by its first row at most.

    Args:
        source (`str`): A path or a Hub id, as for `load_text`.
        block_size (`int`, *optional*, defaults to 1): Tokens per block.
        split (`str`, *optional*, defaults to `"train"`): Split of a folder or a Hub dataset.
        column (`str`, *optional*, defaults to `"text"`): The column that holds the text.
    """
    files = text_files(source)
    size = plain_bytes(files) if files else None
    if size is not None and size < block_size:  # a token is at least a byte
        raise ValueError(f"{source} is too short for one block: {size:,} bytes, block_size {block_size:,}")
    load_text(source, split, column, streaming=files is not None or not config.HF_HUB_OFFLINE)  # a cache cannot be streamed


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


def _is_text(documents: Dataset | IterableDataset, column: str) -> bool:
    """Return whether a column is of one type, text, and, where all of it is here, without nulls."""
    kind = (documents.features or {}).get(column, Value("string"))  # a stream's features may not be known
    whole = isinstance(documents, IterableDataset) or documents.data.column(column).null_count == 0
    return getattr(kind, "dtype", None) in ("string", "large_string") and whole


def _is_chat(value: object) -> bool:
    """Return whether a value is a list of messages, as the Hub's `messages` and `conversations` columns hold."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def token_blocks(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_tokens: int | None = None,
    seed: int | None = None,
    cross_documents: bool = True,
    shuffle_buffer: int = 10_000,
    name: str = "The text",
) -> Dataset | IterableDataset:
    """Pack documents into blocks of tokens.

    Args:
        documents (`Dataset` or `IterableDataset`): One document per row, in a column `text`. Of a stream, blocks are made as
            they are asked for; it never ends: when the documents do, they are read again in another order, so that a Trainer
            sees one long epoch and finds its place in it after an interruption.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's; its end token separates documents.
        block_size (`int`): Tokens per block.
        max_tokens (`int`, *optional*): Stop when this many tokens are packed; all text (a stream: never) when left out.
        seed (`int`, *optional*): Shuffle the documents with it first.
        cross_documents (`bool`, *optional*, defaults to `True`): Whether tokens attend to the documents before theirs in the
            block, as is usual in pretraining (Megatron's default, and so the papers'). Otherwise every row has `position_ids`
            that start again at each document, from which Transformers makes the attention mask.
        shuffle_buffer (`int`, *optional*, defaults to 10,000): Documents among which a stream is shuffled; they are in memory.
        name (`str`, *optional*): What errors and warnings call the text.

    Returns:
        `Dataset` or `IterableDataset`: One block per row, `input_ids` of length `block_size`, and `position_ids` of the same
            length when documents are kept apart; the incomplete last block is left out.

    Raises:
        ValueError: when the text is too short for one block (a stream's: when the first block is asked for).
    """
    wanted = None if max_tokens is None else max_tokens // block_size
    if wanted == 0:
        raise ValueError(f"{name}: {max_tokens:,} tokens are not one block of {block_size:,}. Ask for more, or smaller blocks")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path or 'The tokenizer'} has no end token to set between documents: give it one")
    settings = {"tokenizer": tokenizer, "block_size": block_size, "cross_documents": cross_documents, "name": name}
    if isinstance(documents, IterableDataset):
        if seed is not None:
            documents = documents.shuffle(seed=seed, buffer_size=shuffle_buffer)
        stream = IterableDataset.from_generator(_again_and_again, gen_kwargs={"documents": documents, **settings})
        return (stream if wanted is None else stream.take(wanted)).with_format("torch")
    if seed is not None:
        documents = documents.shuffle(seed=seed)
    batches, number = documents.iter(_READ_TOGETHER), ceil(len(documents) / _READ_TOGETHER)
    with tqdm(batches, "Tokenizing", number, unit=" documents", unit_scale=_READ_TOGETHER, leave=False) as batches:
        blocks = list(islice(_pack(batches, **settings), wanted))
    if wanted is not None and len(blocks) < wanted:
        logger.warning("%s holds only %s of the %s blocks asked for", name, f"{len(blocks):,}", f"{wanted:,}")
    return Dataset.from_dict({key: [block[key] for block in blocks] for key in blocks[0]}).with_format("torch")


def _again_and_again(documents: IterableDataset, name: str, **settings) -> Iterator[dict[str, np.ndarray]]:
    """Yield the blocks of a stream, pass after pass; every pass has its own order when the stream is shuffled."""
    for epoch in count():
        if epoch == 1:
            logger.warning("%s is at its end and is read again", name)
        documents.set_epoch(epoch)
        yield from _pack(documents.iter(_READ_TOGETHER), name=name, **settings)


def _pack(
    batches: Iterable[dict], tokenizer: PreTrainedTokenizerBase, block_size: int, cross_documents: bool, name: str
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the blocks of one pass; what waits for the next batch of documents is shorter than a block."""
    tokens, starts = np.empty(0, np.int32), np.empty(0, bool)  # whether a document starts at a token
    num_documents, num_blocks, end = 0, 0, 0
    index = np.arange(block_size, dtype=np.int32)
    for rows in batches:
        if wrong := [number for number, text in enumerate(rows["text"], num_documents) if not isinstance(text, str)]:
            raise ValueError(f"{name}: document {wrong[0]:,} (from 0) holds no text. Leave it out, or set text_column")
        ids = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [np.asarray([*document, tokenizer.eos_token_id], np.int32) for document in ids]
        tokens = np.concatenate([tokens[end:], *pieces])
        starts = np.concatenate([starts[end:], *(np.arange(len(piece)) == 0 for piece in pieces)])
        end = len(tokens) // block_size * block_size
        for start in range(0, end, block_size):
            block = slice(start, start + block_size)
            positions = index - np.maximum.accumulate(np.where(starts[block], index, 0))  # a block's start counts as one
            yield {"input_ids": tokens[block]} | ({} if cross_documents else {"position_ids": positions})
        num_documents, num_blocks = num_documents + len(pieces), num_blocks + end // block_size
    if num_blocks == 0:
        raise ValueError(
            f"{name} is too short for one block: {len(tokens):,} tokens in {num_documents:,} documents, block_size "
            f"{block_size:,}. Give more text or a smaller block_size"
        )


def text_hash(blocks: Dataset) -> str:
    """Return the SHA-256 of a dataset's token blocks: equal for equal text, tokenizer and packing."""
    digest = hashlib.sha256()
    for block in blocks.with_format("numpy").iter(batch_size=1):
        digest.update(np.ascontiguousarray(block["input_ids"], dtype=np.int32).tobytes())
    return digest.hexdigest()
