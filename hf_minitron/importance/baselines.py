"""Baselines that look at no activation: the size of the weights, and chance. The papers' claims stand beside them.

They are for comparing: on SmolLM2-135M, weight magnitude is about as bad as chance (benchmarks/claims.py).
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_minitron import axes
from hf_minitron.architecture.architecture import Parameter
from hf_minitron.checkpoint.tensors import tensors_of


def magnitude(model: PreTrainedModel | str | Path, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the L2 norm of all weights that carry an index, in the shape of other scores.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): The model, or its folder.
        scores (`Mapping[str, Tensor]`): Scores by axis, whose shapes (and NaN for what is absent) the result has.
    """
    tensors = tensors_of(model)
    squares = {axis: torch.zeros_like(score) for axis, score in scores.items()}
    for name in tensors.names():
        tensor, parameter = tensors.read(name).cpu(), tensors.architecture.stored[name]
        indices, layer, names = parameter.indices, parameter.layer, [axes.dim_names(dim) for dim in parameter.dims]
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
                sizes = tensors.architecture.shape.at(layer)
                _add_squares(total[..., : sizes[axis]], tensor, parameter, axis, sizes)
    return {axis: total.sqrt() + 0 * scores[axis] for axis, total in squares.items()}


def chance(model: PreTrainedModel | str | Path, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return uniform random numbers in the shape of other scores; `torch.manual_seed` makes them repeatable."""
    return {axis: torch.rand(score.shape) + 0 * score for axis, score in scores.items()}


def _add_squares(total: Tensor, tensor: Tensor, parameter: Parameter, axis: str, sizes: Mapping[str, int]) -> None:
    """Add the squares of a tensor, summed over all of its dimensions but an axis (and the experts where `total` has them)."""
    position, dim = parameter.dim_of(axis)
    kept = {position} | ({0} if total.dim() == 2 else set())
    others = [at for at in range(tensor.dim()) if at not in kept]
    squares = tensor.float().square()
    squares, labels = squares.sum(others) if others else squares, axes.labels(dim, axis, sizes)
    total.index_add_(-1, labels[labels >= 0], squares[..., labels >= 0])


BASELINES: dict[str, Callable] = {"magnitude": magnitude, "random": chance}
