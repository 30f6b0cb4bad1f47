"""Training text from one source or several, mixed by tokens: what the `text` of a recipe says, read and made into blocks.

All blocks hold as many tokens and every block is of one source, so shares of blocks are shares of tokens. Sources take turns
rather than being drawn, so at any point every source is within about a block of its share. (`interleave_datasets` of
`datasets` draws: 5 % of 60 blocks would be 3 give or take 1.7.)
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from hf_minitron.data.encoding import has_labels
from hf_minitron.data.formats import files_in
from hf_minitron.data.packing import check_documents, check_one_block, token_blocks
from hf_minitron.data.shards import read_blocks
from hf_minitron.data.texts import check_text, load_text

logger = logging.getLogger(__name__)

# Of a folder of blocks of several sources: which block of all stands in each row.
ROWS = "rows.npy"
# What the table of a source may say.
KEYS = ("weight", "split", "column", "data_files")


@dataclass(frozen=True)
class Source:
    """A text and its weight in the mixture.

    Args:
        name (`str`): A path or a Hub id, as for `load_text`.
        weight (`float`, *optional*, defaults to 1): Its share of the tokens, in proportion to the others' weights.
        split (`str`, *optional*, defaults to `"train"`): Split of a Hub dataset.
        column (`str`, *optional*, defaults to `"text"`): The column that holds the text.
    """

    name: str
    weight: float = 1.0
    split: str = "train"
    column: str = "text"


def read_sources(text: str | Mapping, split: str = "train", column: str = "text") -> list[Source]:
    """Read what a recipe says about its text.

    Args:
        text (`str` or `Mapping`): One source; or a table of several to their weights, `{"a.jsonl": 0.7, "b.jsonl": 0.3}`. A
            source with its own split or column has a table as well: `{"weight": 0.3, "split": "test", "column": "body"}`;
            `data_files` is a pattern of files in a folder or a dataset of the Hub.
        split (`str`, *optional*, defaults to `"train"`): Split of the others.
        column (`str`, *optional*, defaults to `"text"`): Column of the others.

    Raises:
        ValueError: naming the source, for a weight that is not a number above zero, or an unknown key.
    """
    if isinstance(text, str):
        text = {text: 1.0} if text else {}
    if not text:
        raise ValueError("text is missing: a file, a dataset's Hub id, or a table of several to their weights")
    sources = []
    for name, value in text.items():
        given = dict(value) if isinstance(value, Mapping) else {"weight": value}
        unknown = [key for key in given if key not in KEYS]
        if unknown:
            raise ValueError(f"text: {name}: {unknown[0]!r} is none of {', '.join(KEYS)}")
        files = given.pop("data_files", None)
        source = Source(
            str(name) if files is None else files_in(str(name), files), **{"split": split, "column": column, **given}
        )
        number = isinstance(source.weight, int | float) and not isinstance(source.weight, bool)
        if "weight" not in given or not number or not 0 < source.weight < math.inf:
            raise ValueError(f"text: {name}: weight {given.get('weight')!r} is not a number above zero")
        if not isinstance(source.split, str) or not isinstance(source.column, str):
            raise ValueError(f"text: {name}: split {source.split!r} and column {source.column!r} must be text")
        sources.append(source)
    return sources


def check_sources(sources: Sequence[Source], block_size: int, max_tokens: int | None = None) -> None:
    """Refuse a source that cannot be read, is too short for one block or would give none, without reading it."""
    for source in sources:
        check_text(source.name, block_size)
        check_one_block(source.name, block_size, max_tokens)
    if max_tokens is not None:
        wanted, waiting = max_tokens // block_size, dict(enumerate(sources))
        for number in islice(_turns(_shares(sources)), wanted):
            waiting.pop(number, None)
            if not waiting:
                return
        name = next(iter(waiting.values())).name
        raise ValueError(f"{name} would give none of {wanted:,} blocks: give it more weight, or want more")


def least_blocks(sources: Sequence[Source]) -> int:
    """Return how many blocks of a mixture there must be for every source to give one."""
    waiting = set(range(len(sources)))
    for count, number in enumerate(_turns(_shares(sources)), 1):
        waiting.discard(number)
        if not waiting:
            return count


def mixed_blocks(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_tokens: int | None = None,
    seed: int | None = None,
    streaming: bool = False,
    cross_documents: bool = True,
    add_bos_token: bool | None = None,
    folder: Path | None = None,
) -> Dataset:
    """Load sources and pack them into blocks, each source as `token_blocks` does.

    A source that ends before its share is reached is read again, with a warning that names it. Without `max_tokens` nothing is
    read twice: blocks end where the first source would have to be.

    Args:
        sources (`Sequence[Source]`): What to mix, from `read_sources`.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
        block_size (`int`): Tokens per block.
        max_tokens (`int`, *optional*): Tokens wanted.
        seed (`int`, *optional*): Shuffle the documents of every source with it.
        streaming (`bool`, *optional*, defaults to `False`): Read sources as far as needed, rather than fetch and convert all.
        cross_documents (`bool`, *optional*, defaults to `True`): As for `token_blocks`; `add_bos_token` (`bool`) too.
        folder (`Path`, *optional*): Where to write the blocks, see `read_mixture`; in memory when left out.

    Returns:
        `Dataset`: One block per row, the same for the same arguments.

    Raises:
        ValueError: naming the source, when it lacks its column or is too short for one block.

    Example:

    ```python
    >>> sources = read_sources({"train.jsonl": 0.8, "code.jsonl": {"weight": 0.2, "column": "content"}})  # or of the Hub
    >>> blocks = mixed_blocks(sources, tokenizer, block_size=256, seed=0, streaming=True)
    >>> len(blocks[0]["input_ids"])
    256
    ```
    """
    check_sources(sources, block_size, max_tokens)
    order = None
    tokens = [max_tokens if len(sources) == 1 else None] * len(sources)
    if len(sources) > 1 and max_tokens is not None:
        order = np.fromiter(islice(_turns(_shares(sources)), max_tokens // block_size), int)
        tokens = [int(number) * block_size for number in np.bincount(order)]
    texts = [load_text(source.name, source.split, source.column, streaming) for source in sources]
    columns = [check_documents(text, tokenizer, source.name) for text, source in zip(texts, sources, strict=True)]
    labels = True if any(map(has_labels, columns)) else None  # of all, to be rows of one dataset
    parts = []
    for number, (text, source) in enumerate(zip(texts, sources, strict=True)):
        part = (tokenizer, block_size, tokens[number], seed, cross_documents, source.name, add_bos_token, labels)
        parts.append(token_blocks(text, *part, folder and folder / f"{number}"))
    return _mixed(parts, sources, order, folder) if len(parts) > 1 else parts[0]


def _mixed(parts: Sequence[Dataset], sources: Sequence[Source], order: np.ndarray | None, folder: Path | None) -> Dataset:
    """Return the blocks of several sources, mixed; write down in a folder which stands where."""
    sizes = np.array([len(part) for part in parts])
    rows = _rows(_until_one_ends(_shares(sources), sizes, sources) if order is None else order, sizes, sources)
    if folder:
        np.save(folder / ROWS, rows)
    return concatenate_datasets(parts).select(rows)


def read_mixture(folder: Path) -> Dataset:
    """Return the blocks that `mixed_blocks` has written to a folder, mapped into memory."""
    parts = [read_blocks(folder / f"{number}") for number in range(len([*folder.glob("*/00000.arrow")]))]
    blocks = concatenate_datasets(parts)
    return blocks.select(np.load(folder / ROWS)) if len(parts) > 1 else blocks


def _shares(sources: Sequence[Source]) -> np.ndarray:
    weights = np.array([source.weight for source in sources], float)
    return weights / weights.sum()


def _turns(shares: np.ndarray) -> Iterator[int]:
    """Yield whose turn it is, for ever: of the source that lags most behind its share."""
    taken = np.zeros(len(shares))
    while True:
        number = int(np.argmax(shares * (taken.sum() + 1) - taken))
        taken[number] += 1
        yield number


def _until_one_ends(shares: np.ndarray, sizes: np.ndarray, sources: Sequence[Source]) -> np.ndarray:
    """Return the turns that the sources have blocks for."""
    left, order = sizes.copy(), []
    for number in _turns(shares):
        if left[number] == 0:
            break
        left[number] -= 1
        order.append(number)
    logger.warning("An epoch has %s blocks: %s ends first, of the others %s blocks are left out",
                   f"{len(order):,}", sources[number].name, f"{left.sum():,}")  # fmt: skip
    return np.array(order)


def _rows(order: np.ndarray, sizes: np.ndarray, sources: Sequence[Source]) -> np.ndarray:
    """Return which row of all sources' blocks, one after another, stands at each turn."""
    rows = np.empty_like(order)
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        turns = np.flatnonzero(order == number)
        rows[turns] = sizes[:number].sum() + np.arange(len(turns)) % size
        if len(turns) > size:
            logger.warning("%s is read %.1f times to reach its share of the tokens", source.name, len(turns) / size)
    return rows
