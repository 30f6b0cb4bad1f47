"""Text to token blocks: the one form in which calibration, distillation and perplexity read text.

It must not know a model. Documents are packed one after another with the end token between them and cut into blocks of equal
length, so that no block is padded.
"""

import hashlib
import logging
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def check_text(source: str, block_size: int = 1) -> Path | None:
    """Refuse a text that cannot be read or is too short for one block, without reading it.

    Args:
        source (`str`): A path or a Hub id.
        block_size (`int`, *optional*, defaults to 1): Tokens per block.

    Returns:
        `Path` or `None`: The local file; `None` for a Hub id.
    """
    path = Path(source).expanduser()
    if not path.exists() and path.suffix not in _BUILDERS and not source.startswith((".", "/", "~")):
        return None
    if not path.is_file() or path.suffix not in _BUILDERS:
        raise ValueError(f"No text at {source!r}: want a file that ends in {', '.join(_BUILDERS)}, or a dataset's Hub id")
    if path.stat().st_size < block_size:  # a token is at least a byte
        raise ValueError(f"{source} is too short for one block: {path.stat().st_size:,} bytes, block_size {block_size:,}")
    return path


def load_text(source: str, split: str = "train", column: str = "text") -> Dataset:
    """Load documents: a local .jsonl, .json, .parquet, .csv or .txt file, or a dataset on the Hub.

    Args:
        source (`str`): A path, or a Hub id, with a configuration after a colon (`Salesforce/wikitext:wikitext-2-raw-v1`).
        split (`str`, *optional*, defaults to `"train"`): Split of a Hub dataset.
        column (`str`, *optional*, defaults to `"text"`): The column that holds the text.

    Returns:
        `Dataset`: One document per row, in a column `text`.
    """
    path = check_text(source)
    if path is None:
        name, _, configuration = source.partition(":")
        documents = load_dataset(name, configuration or None, split=split)
    else:
        documents = load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
    if column not in documents.column_names:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(documents.column_names)}. Set text_column")
    return documents.select_columns(column).rename_column(column, "text") if column != "text" else documents


def token_blocks(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_tokens: int | None = None,
    seed: int | None = None,
) -> Dataset:
    """Pack documents into blocks of tokens.

    Args:
        documents (`Dataset`): One document per row, in a column `text`.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's; its end token separates documents.
        block_size (`int`): Tokens per block.
        max_tokens (`int`, *optional*): Stop when this many tokens are packed; all text when left out.
        seed (`int`, *optional*): Shuffle the documents with it first.

    Returns:
        `Dataset`: One block per row, `input_ids` of length `block_size`; the incomplete last block is left out.

    Raises:
        ValueError: when the text is too short for one block.
    """
    if seed is not None:
        documents = documents.shuffle(seed=seed)
    wanted = float("inf") if max_tokens is None else max_tokens
    pieces, count = [], 0
    with tqdm(desc="Tokenizing", unit=" documents", total=len(documents), leave=False) as bar:
        for rows in documents.iter(batch_size=64):
            for ids in tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]:
                pieces.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32))
                count += len(pieces[-1])
            bar.update(len(rows["text"]))
            if count >= wanted:
                break
    num_blocks = int(min(count, wanted)) // block_size
    if num_blocks == 0:
        raise ValueError(
            f"Text too short for one block: {count:,} tokens in {len(documents):,} documents, block_size {block_size:,}, "
            f"max_tokens {'unlimited' if max_tokens is None else max_tokens}. Give more text or a smaller block_size"
        )
    if max_tokens is not None and num_blocks < max_tokens // block_size:
        logger.warning("The text holds only %s of the %s tokens asked for", f"{count:,}", f"{max_tokens:,}")
    tokens = np.concatenate(pieces)[: num_blocks * block_size].reshape(num_blocks, block_size)
    return Dataset.from_dict({"input_ids": list(tokens)}).with_format("torch")


def text_hash(blocks: Dataset) -> str:
    """Return the SHA-256 of a dataset's token blocks: equal for equal text, tokenizer and packing."""
    digest = hashlib.sha256()
    for block in blocks.with_format("numpy").iter(batch_size=1):
        digest.update(np.ascontiguousarray(block["input_ids"], dtype=np.int32).tobytes())
    return digest.hexdigest()
