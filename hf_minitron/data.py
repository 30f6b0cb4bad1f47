"""Text to token blocks: the one form in which calibration, distillation and perplexity read text.

Documents are packed one after another with the end token between them and cut into blocks of equal
length, so that no block is padded. Where the tokenizer begins a text with a BOS token, so does every document and every block:
some models (Gemma) read nothing well that does not begin with it. Blocks are made at once, or, of a stream, as they are
asked for.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from math import ceil

import numpy as np
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_minitron.formats import text_files
from hf_minitron.texts import load_text, unreadable

logger = logging.getLogger(__name__)

_READ_TOGETHER = 64  # documents handed to the tokenizer at a time


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
    shuffle_buffer: int = 10_000,
    name: str = "The text",
    add_bos_token: bool | None = None,
) -> Dataset | IterableDataset:
    """Pack documents into token sequences of one length: blocks, or packed sequences.

    Args:
        documents (`Dataset` or `IterableDataset`): One document per row, in a column `text`. Of a stream, blocks are made as
            they are asked for; it never ends: when the documents do, they are read again in another order, so that a Trainer
            sees one long epoch and finds its place in it after an interruption.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's; its end token separates documents.
        block_size (`int`): Tokens per block.
        max_tokens (`int`, *optional*): Stop when this many tokens are packed; all text (a stream: never) when left out.
        seed (`int`, *optional*): Shuffle the documents with it first.
        cross_documents (`bool`, *optional*, defaults to `True`): Whether tokens attend to the documents before theirs in the
            block, as is usual in pretraining (Megatron's default, and so the papers'). Otherwise attention is
            document-masked: every row has `position_ids` that start again at each document, from which Transformers makes
            the mask.
        shuffle_buffer (`int`, *optional*, defaults to 10,000): Documents among which a stream is shuffled; they are in memory.
        name (`str`, *optional*): What errors and warnings call the text.
        add_bos_token (`bool`, *optional*): Whether every document, and every block that begins in the midst of one, begins with
            the BOS token; as the tokenizer itself does when left out.

    Returns:
        `Dataset` or `IterableDataset`: One block per row, `input_ids` of length `block_size`; of the same length `position_ids`
            for document-masked attention, and with BOS tokens `labels`, which are -100 there: a BOS token is not predicted. The
            incomplete last block is left out.

    Raises:
        ValueError: when the text is too short for one block (a stream's: when the first block is asked for).
    """
    wanted = _blocks_wanted(tokenizer, block_size, max_tokens, name)
    settings = {"tokenizer": tokenizer, "block_size": block_size, "cross_documents": cross_documents, "name": name}
    settings["opening"] = [tokenizer.bos_token_id] if adds_bos_token(tokenizer, add_bos_token) else []
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


def _blocks_wanted(tokenizer: PreTrainedTokenizerBase, block_size: int, max_tokens: int | None, name: str) -> int | None:
    if max_tokens is not None and max_tokens < block_size:
        raise ValueError(f"{name}: {max_tokens:,} tokens are not one block of {block_size:,}. Ask for more, or smaller blocks")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path or 'The tokenizer'} has no end token to set between documents: give it one")
    return None if max_tokens is None else max_tokens // block_size


def check_first_block(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_tokens: int | None = None,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
) -> None:
    """Read a text as far as its first block; refuse one of which no block can be made.

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
    files = text_files(source)
    documents = load_text(source, split, column, streaming or files is None)
    if isinstance(documents, Dataset):
        try:
            documents.data.column("text").validate(full=True)  # that it is UTF-8, which nobody has looked at yet
        except ValueError as error:
            raise unreadable(source, error, files) from error
    next(_pack(documents.iter(_READ_TOGETHER), tokenizer, block_size, True, source))
    if not any(text.strip() for rows in documents.iter(_READ_TOGETHER) for text in rows["text"]):
        raise ValueError(f"{source} holds only empty documents. Name another text, or set text_column")


def _again_and_again(documents: IterableDataset, name: str, **settings) -> Iterator[dict[str, np.ndarray]]:
    """Yield the blocks of a stream, pass after pass; every pass has its own order when the stream is shuffled."""
    for epoch in count():
        if epoch == 1:
            logger.warning("%s is at its end and is read again", name)
        documents.set_epoch(epoch)
        yield from _pack(documents.iter(_READ_TOGETHER), name=name, **settings)


def _pack(
    batches: Iterable[dict],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    cross_documents: bool,
    name: str,
    opening: Sequence[int] = (),
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the blocks of one pass; what waits for the next batch of documents is shorter than a block."""
    tokens, starts = np.empty(0, np.int32), np.empty(0, bool)  # whether a document starts at a token
    num_documents, num_blocks, end = 0, 0, 0
    index = np.arange(block_size, dtype=np.int32)
    for rows in batches:
        if wrong := [number for number, text in enumerate(rows["text"], num_documents) if not isinstance(text, str)]:
            raise ValueError(f"{name}: document {wrong[0]:,} (from 0) holds no text. Leave it out, or set text_column")
        ids = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids = [[*opening, *document] if document[:1] != opening else document for document in ids]  # a chat has its own
        pieces = [np.asarray([*document, tokenizer.eos_token_id], np.int32) for document in ids]
        tokens = np.concatenate([tokens[end:], *pieces])
        starts = np.concatenate([starts[end:], *(np.arange(len(piece)) == 0 for piece in pieces)])
        end = 0
        while end < len(tokens):
            added = () if starts[end] else opening  # a block in the midst of a document begins as one
            block = slice(end, end + block_size - len(added))
            if block.stop > len(tokens):
                break
            row, first = np.concatenate([np.asarray(added, np.int32), tokens[block]]), starts[block]
            first = np.concatenate([np.ones(len(added), bool), first])
            positions = index - np.maximum.accumulate(np.where(first, index, 0))  # a block's start counts as one
            labels = {"labels": np.where(first, np.int32(-100), row)} if opening else {}
            yield {"input_ids": row} | ({} if cross_documents else {"position_ids": positions}) | labels
            end, num_blocks = block.stop, num_blocks + 1
        num_documents = num_documents + len(pieces)
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
