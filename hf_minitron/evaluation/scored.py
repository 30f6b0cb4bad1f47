"""Which tokens of the held-out text are scored: those that are predicted, of chats the answers alone."""

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def plain_blocks(blocks: Dataset) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of blocks as lists, and their labels: the ids themselves where there are none."""
    plain = blocks.with_format(None)
    ids, labels = ([list(map(int, row)) for row in plain[name]] if name in plain.column_names else None
                   for name in ("input_ids", "labels"))  # fmt: skip
    return ids, labels or ids


def of_answers(blocks: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether other tokens than BOS are not predicted: those of a chat that are no answer."""
    pairs = (zip(*pair, strict=True) for pair in zip(blocks, labels, strict=True) if -100 in pair[1])
    return any(label == -100 and token != tokenizer.bos_token_id for pair in pairs for token, label in pair)


def num_scored(labels: Sequence[Sequence[int]]) -> int:
    """Count the tokens of blocks that are predicted: all but the first of each, and those whose label is -100."""
    return sum(label != -100 for row in labels for label in row[1:])


def check_scored(blocks: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> None:
    """Refuse labels that leave nothing to predict.

    Raises:
        ValueError: with the number of tokens.
    """
    if not num_scored(labels):
        raise ValueError(f"none of the {sum(map(len, blocks)):,} tokens of the held-out text is predicted: no answer of the "
                         "assistant begins in them; ask for more tokens")  # fmt: skip
