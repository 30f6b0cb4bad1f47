"""Text to token blocks: the one form in which calibration, distillation and perplexity read text.

Documents are packed one after another with the end token between them and cut into blocks of equal
length, so that no block is padded. Where the tokenizer begins a text with a BOS token, so does every document and every block:
some models (Gemma) read nothing well that does not begin with it. Blocks are made once and mapped into memory: any row is read
at once, so training goes on at any step without reading what was before.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_minitron.data.encoding import Encoder, Refused, Tokens, check_encoder, has_labels, id_dtype, kind_of, small_dtype
from hf_minitron.data.formats import text_files
from hf_minitron.data.shards import blocks_of, tables_of, write_blocks
from hf_minitron.data.texts import load_utf8

logger = logging.getLogger(__name__)

_READ_TOGETHER = 64  # documents handed to the tokenizer at a time
_FEW, _FEW_TOKENS = 20_000, 5_000_000  # documents, and tokens, that one process makes as fast as several
_STREAMS = 16  # processes that read a stream, at most
_BUFFER = {"buffer_size": 10_000}  # documents among which a stream is shuffled


def adds_bos_token(tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None = None) -> bool:
    """Return whether a text begins with the BOS token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        add_bos_token (`bool`, *optional*): Whether it shall; as the tokenizer itself does when left out.

    Raises:
        ValueError: when it shall, and the tokenizer has none.
    """
    if add_bos_token and tokenizer.bos_token_id is None:
        raise ValueError(f"add_bos_token: true, but {tokenizer.name_or_path or 'the tokenizer'} has no BOS token; leave it out")
    if add_bos_token is not None:
        return add_bos_token
    whole, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return tokenizer.bos_token_id is not None and whole[: len(plain) + 1] == [tokenizer.bos_token_id, *plain]


def token_blocks(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_tokens: int | None = None,
    seed: int | None = None,
    cross_documents: bool = True,
    name: str = "The text",
    add_bos_token: bool | None = None,
    labels: bool | None = None,
    folder: Path | None = None,
) -> Dataset:
    """Pack documents into token sequences of one length: blocks, or packed sequences.

    Many documents are tokenized by one process for each core, those of a stream while they are read. Token ids take two bytes,
    or four where the vocabulary has more than 65,536.

    Args:
        documents (`Dataset` or `IterableDataset`): One document per row, from `load_text`. A stream is read as far as needed.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's; its end token separates documents.
        block_size (`int`): Tokens per block.
        max_tokens (`int`, *optional*): Stop when this many tokens are packed; all text when left out.
        seed (`int`, *optional*): Shuffle the documents with it first: all of them; of a stream its files, and 10,000 documents
            at a time.
        cross_documents (`bool`, *optional*, defaults to `True`): Whether tokens attend to the documents before theirs in the
            block, as is usual in pretraining (Megatron's default, and so the papers'). Otherwise attention is
            document-masked: every row has `position_ids` that start again at each document, from which Transformers makes
            the mask.
        name (`str`, *optional*): What errors and warnings call the text.
        add_bos_token (`bool`, *optional*): Whether every document, and every block that begins in the midst of one, begins with
            the BOS token; as the tokenizer itself does when left out.
        labels (`bool`, *optional*): Whether rows have `labels`, -100 at tokens that are not predicted; when left out, where
            there are such: BOS tokens, and what is no answer in a chat.
        folder (`Path`, *optional*): Where to write the blocks, as Arrow files that are mapped into memory; in memory when left
            out.

    Returns:
        `Dataset`: One block per row, `input_ids` of length `block_size`; of the same length `position_ids` for document-masked
            attention, and `labels`. The incomplete last block is left out.

    Raises:
        ValueError: when the text is too short for one block.
    """
    wanted = _blocks_wanted(tokenizer, block_size, max_tokens, name)
    opening = [tokenizer.bos_token_id] if adds_bos_token(tokenizer, add_bos_token) else []
    columns = check_documents(documents, tokenizer, name)
    if seed is not None:
        documents = documents.shuffle(seed=seed, **_BUFFER if isinstance(documents, IterableDataset) else {})
    batches = _encoded(documents, Encoder(tokenizer, opening), _readers(documents, max_tokens))
    number = None if isinstance(documents, IterableDataset) else ceil(len(documents) / _READ_TOGETHER)
    packing = {"block_size": block_size, "cross_documents": cross_documents, "opening": opening, "name": name}
    packing["labels"] = bool(opening) or has_labels(columns) if labels is None else labels
    with tqdm(batches, "Tokenizing", number, unit=" documents", unit_scale=_READ_TOGETHER, leave=False) as batches:
        tables = tables_of(_pack(batches, **packing), wanted)
        blocks = write_blocks(folder, tables) if folder else blocks_of(tables)
    if wanted is not None and len(blocks) < wanted:
        logger.warning("%s holds only %s of the %s blocks asked for", name, f"{len(blocks):,}", f"{wanted:,}")
    return blocks.with_format("torch")


def check_one_block(name: str, block_size: int, max_tokens: int | None) -> None:
    """Refuse to want less of a text than one block."""
    if max_tokens is not None and max_tokens < block_size:
        raise ValueError(f"{name}: {max_tokens:,} tokens are not one block of {block_size:,}. Ask for more, or smaller blocks")


def _blocks_wanted(tokenizer: PreTrainedTokenizerBase, block_size: int, max_tokens: int | None, name: str) -> int | None:
    check_one_block(name, block_size, max_tokens)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path or 'The tokenizer'} has no end token to set between documents: give it one")
    return None if max_tokens is None else max_tokens // block_size


def bytes_per_token(
    tokenizer: PreTrainedTokenizerBase, block_size: int, cross_documents: bool, add_bos_token: bool | None = None
) -> int:
    """Return the bytes that blocks take for a token of text, with arguments as for `token_blocks`: id, position and label."""
    positions = 0 if cross_documents else np.dtype(small_dtype(block_size)).itemsize
    return np.dtype(id_dtype(tokenizer)).itemsize + positions + 4 * adds_bos_token(tokenizer, add_bos_token)


def check_documents(documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Return the columns of documents; refuse a tokenizer that cannot read what they hold."""
    row = next(iter(documents.with_format(None)), {})
    columns = documents.column_names or list(row)
    check_encoder(columns, row, tokenizer, name)
    return columns


def check_first_block(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_tokens: int | None = None,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
) -> str:
    """Read a text as far as its first block, and return what it holds, of `ENCODERS`; refuse one of which no block can be made.

    A local text that will not be streamed is converted as a whole, which `datasets` keeps: nothing is read twice. Of one on the
    Hub only the first documents are fetched.

    Args:
        source (`str`): As for `load_text`.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
        block_size (`int`): Tokens per block.
        max_tokens (`int`, *optional*): Tokens wanted.
        split (`str`, *optional*, defaults to `"train"`): Split of a Hub dataset.
        column (`str`, *optional*, defaults to `"text"`): The column that holds the text.
        streaming (`bool`, *optional*, defaults to `False`): Whether it will be streamed.

    Raises:
        ValueError: in one line, with the line of the file where it is broken.
    """
    _blocks_wanted(tokenizer, block_size, max_tokens, source)
    documents = load_utf8(source, split, column, streaming or text_files(source) is None)
    kind = kind_of(check_documents(documents, tokenizer, source))
    next(_pack(_encoded(documents, Encoder(tokenizer, [])), block_size, True, source))
    if kind == "text" and not any(text.strip() for rows in documents.iter(_READ_TOGETHER) for text in rows["text"]):
        raise ValueError(f"{source} holds only empty documents. Name another text, or set text_column")
    return kind


def _readers(documents: Dataset | IterableDataset, max_tokens: int | None) -> int:
    """Return how many processes read and tokenize, 0 where this one does.

    Those of a stream share its files, so their number decides the order of the documents: it is the same on every machine.
    """
    if isinstance(documents, IterableDataset):
        return min(documents.num_shards, _STREAMS) if documents.num_shards > 1 else 0
    few = len(documents) <= _FEW or (max_tokens is not None and max_tokens <= _FEW_TOKENS)
    return 0 if few or not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))


def _encoded(documents: Dataset | IterableDataset, encoder: Encoder, readers: int = 0) -> Iterator[Tokens | Refused]:
    """Yield the tokens of some documents at a time, in order."""
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if readers else threads or "true"  # processes have no threads beside them
    try:
        how = {
            "collate_fn": encoder,
            "num_workers": readers,
            "generator": torch.Generator(),
        }  # nobody's random numbers are drawn
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more than there are cores
            batches = iter(DataLoader(documents.with_format(None), _READ_TOGETHER, **how))
        yield from batches
    except ValueError as error:  # of another process it comes with where that was
        raise ValueError(str(error).strip().rpartition("\nValueError: ")[2]) from error
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        os.environ.update({} if threads is None else {"TOKENIZERS_PARALLELISM": threads})


def _pack(
    batches: Iterable[Tokens | Refused],
    block_size: int,
    cross_documents: bool,
    name: str,
    opening: Sequence[int] = (),
    labels: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield some blocks at a time, `(blocks, block_size)` each; what waits for more documents is shorter than one."""
    rest, num_documents, num_blocks = None, 0, 0
    index = np.arange(block_size)
    for batch in batches:
        if isinstance(batch, Refused):
            raise ValueError(f"{name}: document {num_documents + batch.number:,} (from 0) {batch.reason}")
        num_documents += batch.starts.sum()
        tokens = batch if rest is None else Tokens(*map(np.concatenate, zip(rest, batch, strict=True)))
        begins, end = _begins(tokens.starts, block_size, len(opening))
        rest = Tokens(*(part[end:] for part in tokens))
        if not len(begins):
            continue
        added = np.where(tokens.starts[begins], 0, len(opening))  # a block in the midst of a document begins as one
        places = np.maximum(begins[:, None] + index - added[:, None], 0)
        ids, first, learnt = (part[places] for part in tokens)
        ids[added > 0, : len(opening)] = opening
        learnt[added > 0, : len(opening)] = False
        first[:, 0] = True  # a block's start counts as one
        blocks = {"input_ids": ids}
        if not cross_documents:
            positions = index - np.maximum.accumulate(np.where(first, index, 0), axis=1)
            blocks["position_ids"] = positions.astype(small_dtype(block_size))
        yield blocks | ({"labels": np.where(learnt, ids.astype(np.int32), np.int32(-100))} if labels else {})
        num_blocks += len(begins)
    if num_blocks == 0:
        raise ValueError(
            f"{name} is too short for one block: {0 if rest is None else len(rest.ids):,} tokens in {num_documents:,} "
            f"documents, block_size {block_size:,}. Give more text or a smaller block_size"
        )


def _begins(starts: np.ndarray, block_size: int, opening: int) -> tuple[np.ndarray, int]:
    """Return where blocks begin among some tokens, and where the last one ends.

    One that begins in the midst of a document holds fewer of them by the tokens that open it.
    """
    if not opening:
        number = len(starts) // block_size
        return np.arange(number) * block_size, number * block_size
    begins, begin, at_start = [], 0, starts.tolist()
    while begin < len(at_start) and (end := begin + block_size - (0 if at_start[begin] else opening)) <= len(at_start):
        begins.append(begin)
        begin = end
    return np.array(begins, int), begin


def text_hash(blocks: Dataset) -> str:
    """Return the SHA-256 of a dataset's token blocks: equal for equal text, tokenizer and packing."""
    digest = hashlib.sha256()
    for block in blocks.with_format("numpy").iter(batch_size=1):
        digest.update(np.ascontiguousarray(block["input_ids"], dtype=np.int32).tobytes())
    return digest.hexdigest()
