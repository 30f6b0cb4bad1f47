"""Baselines that look at no activation: the size of the weights, and chance. The papers' claims stand beside them.

They are for comparing: on SmolLM2-135M, weight magnitude is about as bad as chance (benchmarks/claims.py).
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_minitron import axes
from hf_minitron.checkpoint import Checkpoint, resolve
from hf_minitron.families.family import family_of
from hf_minitron.families.meta import parameters_of
from hf_minitron.pruning.prune import stored_names


def magnitude(model: PreTrainedModel | str | Path, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the L2 norm of all weights that carry an index, in the shape of other scores.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): The model, or its folder.
        scores (`Mapping[str, Tensor]`): Scores by axis, whose shapes (and NaN for what is absent) the result has.
    """
    config = model.config if isinstance(model, PreTrainedModel) else AutoConfig.from_pretrained(resolve(model))
    family = family_of(config)
    rows, sizes = family.stored_rows(family.rows_of(config)), family.shape_of(config).sizes
    squares = {axis: torch.zeros_like(score) for axis, score in scores.items()}
    for name, tensor in _tensors(model):
        row, indices = axes.match(name, rows)
        layer, names = axes.layer_in(indices), [axes.dim_names(dim) for dim in axes.parse(rows[row])]
        for axis, total in squares.items():
            if axis != "hidden":
                if layer is None:
                    continue
                total = total[layer]
            if total.dim() == 2 and "experts" in indices:  # channels of an expert that is stored by itself
                total = total[indices["experts"]]
            if axis == "layers":
                total += tensor.float().square().sum()
            elif axis in indices:  # an expert that is stored by itself
                total[indices[axis]] += tensor.float().square().sum()
            elif any(axis in found for found in names):
                _add_squares(total, tensor, rows[row], axis, sizes)
    return {axis: total.sqrt() + 0 * scores[axis] for axis, total in squares.items()}


def chance(model: PreTrainedModel | str | Path, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return uniform random numbers in the shape of other scores; `torch.manual_seed` makes them repeatable."""
    return {axis: torch.rand(score.shape) + 0 * score for axis, score in scores.items()}


def _tensors(model: PreTrainedModel | str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield full name and values of every tensor."""
    if isinstance(model, PreTrainedModel):
        own = parameters_of(model.config)  # stored buffers too, a tied head once
        yield from ((name, tensor.cpu()) for name, tensor in model.state_dict().items() if name in own)
        return
    checkpoint, config = Checkpoint(resolve(model)), AutoConfig.from_pretrained(resolve(model))
    for stored, name in stored_names(checkpoint, config, family_of(config)).items():
        yield name, checkpoint.read(stored)


def _add_squares(total: Tensor, tensor: Tensor, pattern: str, axis: str, sizes: Mapping[str, int]) -> None:
    """Add the squares of a tensor, summed over all of its dimensions but an axis (and the experts where `total` has them)."""
    dims = axes.parse(pattern)
    position = next(at for at, dim in enumerate(dims) if axis in axes.dim_names(dim))
    kept = {position} | ({0} if total.dim() == 2 else set())
    others = [at for at in range(tensor.dim()) if at not in kept]
    squares = tensor.float().square()
    total.index_add_(-1, axes.labels(dims[position], axis, sizes), squares.sum(others) if others else squares)


BASELINES: dict[str, Callable] = {"magnitude": magnitude, "random": chance}
