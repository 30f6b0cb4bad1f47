"""Teacher-generated data: batched generation, and which texts are kept.

A batch depends on its number and the seed alone, so any process can make any batch.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

NGRAM = 10  # tokens


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel, starts: Sequence[Sequence[int]], config: GenerationConfig, seed: int
) -> list[list[int]]:
    """Continue some starts, of any lengths, and return the new ids of each, without end tokens and padding.

    Args:
        model (`PreTrainedModel`): In eval mode.
        starts (`Sequence[Sequence[int]]`): Ids, one list per text.
        config (`GenerationConfig`): From `sampling`.
        seed (`int`): Of this batch.
    """
    torch.manual_seed(seed)
    ends = set(config.eos_token_id or ())
    return [row[:-1] if row and row[-1] in ends else row for row in continued(model, starts, config)]


def continued(
    model: PreTrainedModel, starts: Sequence[Sequence[int]], config: GenerationConfig, **more: Any
) -> list[list[int]]:
    """Continue some starts, of any lengths, and return the new ids of each, up to an end token and with it.

    Args:
        model (`PreTrainedModel`): In eval mode.
        starts (`Sequence[Sequence[int]]`): Ids, one list per text.
        config (`GenerationConfig`): From `sampling`.
        **more: Passed to `generate`.
    """
    length = max(map(len, starts))
    ids = torch.full((len(starts), length), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, start in enumerate(starts):  # padded on the left: what is generated follows the start
        ids[row, length - len(start) :] = torch.tensor(start)
        mask[row, length - len(start) :] = 1
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    out = model.generate(**inputs, generation_config=config, **more)
    ends = set(config.eos_token_id or ())
    new = []
    for row in out[:, length:].tolist():
        end = next((position + 1 for position, token in enumerate(row) if token in ends), len(row))
        new.append(row[:end])
    return new


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Turn dropout off while a model writes, and give it back its mode and the settings that `sampling` replaces."""
    own, training = model.generation_config, model.training
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def sampling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> GenerationConfig:
    """Return how to sample: these settings, and none of those that the checkpoint brings along.

    Args:
        model (`PreTrainedModel`): Its generation config may name more end tokens.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its end token ends a text.
        max_new_tokens (`int`): Tokens per text.
        temperature (`float`): Divides the logits; 0 takes the most probable token.
        top_p (`float`): Share of probability to sample from.
        top_k (`int`): Tokens to sample from; 0 for all.
    """
    ends, (end, pad) = model.generation_config.eos_token_id, (None, None)
    if tokenizer is not None:
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = {end, *(ends if isinstance(ends, list) else [ends])} - {None}
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    settings = {"max_new_tokens": max_new_tokens, "use_cache": True, "eos_token_id": sorted(ends) or None, **sampled}
    # what is unset here would be read from the model's own
    model.generation_config = GenerationConfig(**settings)
    model.generation_config.pad_token_id = next((token for token in (pad, end, *sorted(ends)) if token is not None), 0)
    return model.generation_config


def repeated_share(ids: Sequence[int], size: int = NGRAM) -> float:
    """Return the share of tokens that lie in an n-gram which has occurred before, each token counted once.

    The rule of Gopher (2112.11446, table A1: at most 0.10 of the characters in repeated 10-grams of words), on tokens: it holds
    for every language, and for a loop of one sign.
    """
    seen, repeated = set(), [False] * len(ids)
    for start in range(len(ids) - size + 1):
        gram = tuple(ids[start : start + size])
        if gram in seen:
            repeated[start : start + size] = [True] * size
        seen.add(gram)
    return sum(repeated) / max(len(ids), 1)


@dataclass
class Sieve:
    """Says which texts are kept, in the order in which they come, and counts.

    Args:
        min_tokens (`int`): Fewer new tokens are too short.
        max_repeated (`float`): More than this share of repeated n-grams is degenerate (`repeated_share`).
    """

    min_tokens: int
    max_repeated: float
    documents: int = 0
    tokens: int = 0
    rejected: Counter = field(default_factory=lambda: Counter(long=0, empty=0, short=0, repetitive=0, duplicate=0))
    _seen: set[bytes] = field(default_factory=set)

    def keeps(self, text: str, new_ids: Sequence[int] | None, tokens: int) -> bool:
        """Return whether a text is kept.

        Args:
            text (`str`): The whole text.
            new_ids (`Sequence[int]` or `None`): The ids that were generated; `None` where the prompt was too long.
            tokens (`int`): How many tokens the text counts when it is kept.
        """
        reason = self._reason(text, new_ids)
        if reason:
            self.rejected[reason] += 1
            return False
        self._seen.add(_fingerprint(text))
        self.documents, self.tokens = self.documents + 1, self.tokens + tokens
        return True

    def _reason(self, text: str, new_ids: Sequence[int] | None) -> str | None:
        if new_ids is None:
            return "long"
        if not new_ids or not text.strip():
            return "empty"
        if len(new_ids) < self.min_tokens:
            return "short"
        if repeated_share(new_ids) > self.max_repeated:
            return "repetitive"
        return "duplicate" if _fingerprint(text) in self._seen else None


def _fingerprint(text: str) -> bytes:
    """Return a hash that does not depend on case, white space and Unicode's several ways to write a sign."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(normal.encode()).digest()
