"""The text that exports are calibrated on and measured on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data import topics

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_minitron.data.mixture import Source, mixed_blocks
from hf_minitron.data.packing import token_blocks
from hf_minitron.evaluation.scored import plain_blocks

BLOCK = 512  # tokens that are read at a time, at most
PYTHON = "Python's documentation"  # which every machine has


@dataclass(frozen=True)
class Texts:
    """What exports are measured on.

    Args:
        name (`str`): What the held-out text is called.
        held_out (`Sequence[Sequence[int]]`): Its token ids, in blocks.
        calibration (`Sequence[Sequence[int]]`): Those of the text that the importance matrix of Q4_K_M is made of; without it
            when empty.
        labels (`Sequence[Sequence[int]]`, *optional*): The held-out blocks with -100 for tokens that are not scored, those of a
            chat that are no answer; all are when left out.
    """

    name: str
    held_out: Sequence[Sequence[int]]
    calibration: Sequence[Sequence[int]] = ()
    labels: Sequence[Sequence[int]] | None = None


def read_blocks(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_tokens: int,
    seed: int = 0,
    add_bos_token: bool | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Return a text's token ids, in blocks of at most `BLOCK`, and these with -100 for tokens that are not predicted.

    Args:
        sources (`Sequence[Source]`): The text; Python's documentation when empty.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        block_size (`int`), max_tokens (`int`), seed (`int`), add_bos_token (`bool`): As for `token_blocks`.
    """
    packing = {"block_size": min(BLOCK, block_size), "max_tokens": max_tokens, "seed": seed, "add_bos_token": add_bos_token}
    if sources:
        blocks = mixed_blocks(sources, tokenizer, **packing)
    else:
        documents = Dataset.from_dict({"text": [topics.topics[name] for name in sorted(topics.topics)]})
        blocks = token_blocks(documents, tokenizer, **packing)
    return plain_blocks(blocks)
