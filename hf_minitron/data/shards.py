"""Blocks on disk: Arrow files of a limited size, mapped into memory, of which a row is read when it is asked for."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, count
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import generate_random_fingerprint

SHARD_BYTES = 2**30
TABLE_TOKENS = 2**22  # of a file's part that is written at once


def tables_of(batches: Iterable[Mapping[str, np.ndarray]], rows: int | None = None) -> Iterator[pa.Table]:
    """Yield blocks as tables, of which few hold many.

    Args:
        batches (`Iterable[Mapping[str, np.ndarray]]`): Arrays of shape `(blocks, block_size)` by column.
        rows (`int`, *optional*): Stop after so many; all when left out.
    """
    parts, size, left = [], 0, np.inf if rows is None else rows
    for batch in batches:
        batch = {name: values[: int(min(left, len(values)))] for name, values in batch.items()}
        parts.append(pa.table({name: pa.FixedSizeListArray.from_arrays(v.ravel(), v.shape[1]) for name, v in batch.items()}))
        size += batch["input_ids"].size
        left -= len(batch["input_ids"])
        if size >= TABLE_TOKENS:
            yield pa.concat_tables(parts).combine_chunks()
            parts, size = [], 0
        if left <= 0:
            break
    if parts:
        yield pa.concat_tables(parts).combine_chunks()


def blocks_of(tables: Iterable[pa.Table]) -> Dataset:
    """Return tables of blocks as a dataset in memory."""
    table = pa.concat_tables(tables)
    return Dataset(table, fingerprint=generate_random_fingerprint())  # rather than that of all the table holds


def write_blocks(folder: Path, tables: Iterable[pa.Table], shard_bytes: int = SHARD_BYTES) -> Dataset:
    """Write tables of blocks to a folder, and return them as `read_blocks` does."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = iter(tables)
    for number in count():
        if (first := next(tables, None)) is None:
            return read_blocks(folder)
        with pa.OSFile(str(folder / f"{number:05}.arrow"), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
            for table in chain([first], tables):
                writer.write_table(table)
                if file.tell() >= shard_bytes:
                    break


def read_blocks(folder: Path) -> Dataset:
    """Return the blocks of a folder, mapped into memory."""
    return concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))]).with_format("torch")
