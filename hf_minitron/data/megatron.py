"""Megatron's indexed datasets: `.bin` holds the tokens of all documents, `.idx` where each begins. Nothing is copied."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

MAGIC = b"MMIDIDX\x00\x00"
# The codes of the index for the types of a token.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def read_megatron(tokens: Path, index: Path) -> Dataset:
    """Return the documents of an indexed dataset, one per row, as `input_ids`, mapped into memory.

    Args:
        tokens (`Path`): The `.bin` file.
        index (`Path`): The `.idx` file.

    Raises:
        ValueError: for another format or version, or files that do not belong together.
    """
    raw = index.read_bytes()
    if not raw.startswith(MAGIC):
        raise ValueError(f"{index.name} is not an index of Megatron: it does not begin with {MAGIC[:7].decode()}")
    version, code = int.from_bytes(raw[9:17], "little"), raw[17] if len(raw) > 17 else 0
    if version != 1 or code not in DTYPES:
        raise ValueError(f"{index.name} is of version {version} with tokens of type {code}; read are version 1 and the whole "
                         f"numbers {', '.join(map(str, DTYPES))}")  # fmt: skip
    num_sequences, num_documents = (int.from_bytes(raw[at : at + 8], "little") for at in (18, 26))
    size = 34 + 12 * num_sequences + 8 * num_documents
    if len(raw) < size:
        raise ValueError(f"{index.name} is cut off: {len(raw):,} bytes of {size:,}")
    lengths = np.frombuffer(raw, "<i4", num_sequences, 34)
    begins = np.frombuffer(raw, "<i8", num_sequences, 34 + 4 * num_sequences)
    documents = np.frombuffer(raw, "<i8", num_documents, 34 + 12 * num_sequences)  # the sequence with which each begins
    dtype, ends = np.dtype(DTYPES[code]), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if not np.array_equal(begins, ends[:-1] * dtype.itemsize) or tokens.stat().st_size != ends[-1] * dtype.itemsize:
        raise ValueError(f"{index.name} counts {ends[-1]:,} tokens of {dtype.itemsize} bytes, and {tokens.name} has "
                         f"{tokens.stat().st_size:,} bytes: they are not of one dataset, or one is cut off")  # fmt: skip
    if not ends[-1]:
        raise ValueError("it is empty")
    values = pa.Array.from_buffers(pa.from_numpy_dtype(dtype), ends[-1], [None, pa.py_buffer(np.memmap(tokens, dtype, "r"))])
    rows = pa.LargeListArray.from_arrays(pa.array(ends[documents]), values)
    return Dataset(pa.table({"input_ids": rows}), fingerprint=f"megatron-{tokens.stat().st_mtime_ns}")  # of no content
