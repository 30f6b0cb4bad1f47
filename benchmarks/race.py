"""The arithmetic of the race: how many tokens one recipe needs for the quality that another has with all of its tokens.

Pure functions on what `models.py` has measured. A point is one recipe with one budget of tokens: an array of seeds x documents,
the negative log-likelihood of every document in nats. A recipe's curve is its mean loss (log perplexity), over the seeds,
against the logarithm of the tokens, straight between points. The tokens it needs for a quality are where it first reaches it.
Intervals are percentiles of a bootstrap that draws documents, the same for all points, and seeds, each point its own.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

RESAMPLES = 1999
LEVEL = 0.95
PUBLISHED = "published"
# tokens to the losses of a recipe's documents on a text, of shape (seeds, documents)
Curve = Mapping[int, np.ndarray]


def tokens_needed(tokens: np.ndarray, losses: np.ndarray, wanted: float) -> float:
    """Return the tokens with which a curve first reaches a loss.

    The fewest that were measured where it is there from the start: a bound. Infinity where it is never reached: nothing is
    extrapolated.

    Args:
        tokens (`np.ndarray` of shape `(points,)`): Ascending.
        losses (`np.ndarray` of shape `(points,)`): At these tokens.
        wanted (`float`): The loss to reach.
    """
    reached = np.flatnonzero(losses <= wanted)
    if not len(reached):
        return math.inf
    after = reached[0]
    if after == 0:
        return float(tokens[0])
    before = after - 1
    share = (losses[before] - wanted) / (losses[before] - losses[after])
    return float(np.exp(np.log(tokens[before]) + share * np.log(tokens[after] / tokens[before])))


def resampled(curve: Curve, lengths: np.ndarray, draws: np.ndarray, generator: np.random.Generator) -> dict[int, np.ndarray]:
    """Return every point's mean loss per token: first as it was measured, then of every draw of documents and seeds.

    Args:
        curve (`Curve`): The points.
        lengths (`np.ndarray` of shape `(documents,)`): Tokens of every document.
        draws (`np.ndarray` of shape `(resamples, documents)`): How often each document was drawn.
        generator (`np.random.Generator`): Draws the seeds.
    """
    found = {}
    for tokens, losses in curve.items():
        seeds = len(losses)
        of_draws = (draws @ losses.T) / (draws @ lengths)[:, None]
        chosen = generator.integers(seeds, size=(len(draws), seeds))
        means = np.take_along_axis(of_draws, chosen, axis=1).mean(1)
        found[tokens] = np.concatenate([[losses.sum(1).mean() / lengths.sum()], means])
    return found


def answers(curves: Mapping[str, Curve], lengths: np.ndarray, budgets: Iterable[int], seed: int = 0) -> dict[str, list[dict]]:
    """Return what the race answers on one text.

    Args:
        curves (`Mapping[str, Curve]`): The recipes by name, `published` among them.
        lengths (`np.ndarray` of shape `(documents,)`): Tokens of every document.
        budgets (`Iterable[int]`): Those of the published recipe that are asked about.
        seed (`int`, *optional*, defaults to 0): Of the resampling.

    Returns:
        `dict`: `curves`, the perplexity of every point; `rows`, the `fraction` of the published recipe's tokens that another
            needs for its quality; `equal_tokens`, the ratio of the perplexities at the same tokens. All with the ends of their
            intervals, `low` and `high`, and `seeds`; what is not reached is `None`.
    """
    generator = np.random.default_rng(seed)
    documents = len(lengths)
    draws = generator.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)
    losses = {name: resampled(curve, lengths, draws, generator) for name, curve in curves.items()}
    seeds = {name: {tokens: len(of) for tokens, of in curve.items()} for name, curve in curves.items()}
    found: dict[str, list[dict]] = {"curves": [], "rows": [], "equal_tokens": []}
    for name, points in losses.items():
        for tokens, values in sorted(points.items()):
            facts = {"budget": tokens, "shape": name, "seeds": seeds[name][tokens]}
            found["curves"].append({**facts, **_interval("perplexity", np.exp(values))})
    published = losses.get(PUBLISHED, {})
    for name, points in losses.items():
        order = sorted(points)
        for budget in sorted(set(budgets) & published.keys()) if points and name != PUBLISHED else ():
            wanted, tokens = published[budget], np.array(order)
            by_draw = np.stack([points[each] for each in order], axis=1)
            needed = [tokens_needed(tokens, row, value) for row, value in zip(by_draw, wanted, strict=True)]
            facts = {"budget": budget, "shape": name, "seeds": seeds[PUBLISHED][budget]}
            found["rows"].append({**facts, **_interval("fraction", np.array(needed) / budget)})
            if budget in points:
                ratio = np.exp(points[budget] - wanted)
                least = min(facts["seeds"], seeds[name][budget])
                found["equal_tokens"].append({**facts, "seeds": least, **_interval("ratio", ratio)})
    return found


def _interval(name: str, values: np.ndarray) -> dict[str, Any]:
    """Return the first value, which was measured, and percentiles of the others."""
    ends = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    low, high = np.quantile(values[1:], ends, method="nearest")
    return {key: float(value) if math.isfinite(value) else None
            for key, value in {name: values[0], "low": low, "high": high}.items()}  # fmt: skip
