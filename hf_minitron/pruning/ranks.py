"""Cuts of the ranks of multi-head latent attention: the narrow rows that queries, keys and values are made of.

A rank has no channels of its own that could be scored: any basis of it computes the same. So both factors are written in one
whose first directions give most of the output, and the others go; the second factor is fitted by least squares. Between the
factors stands an RMS norm of the narrow row. Its root mean square is that of the kept directions then: on average it is put
right by the norm's weight, and what is left differs from token to token.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_minitron.architecture.architecture import Architecture, Parameter
from hf_minitron.checkpoint.checkpoint import TensorSpec
from hf_minitron.checkpoint.tensors import Tensors
from hf_minitron.plan import RANKS, Plan
from hf_minitron.pruning.reconstruction import RIDGE
from hf_minitron.statistics import Moments

# Share of a row's largest energy below which a direction has none but rounding.
NO_ENERGY = 1e-9


@dataclass(frozen=True)
class _Factors:
    """A rank's two factors in a new basis.

    Args:
        basis (`Tensor` of shape `(rank, kept)`): The kept directions, orthonormal; float64.
        after (`Mapping[str, Tensor]`): Projection that reads the rank to its fitted weight, `(out, kept)`.
        scale (`float`): The weight of the norm between them.
    """

    basis: Tensor
    after: Mapping[str, Tensor]
    scale: float


def factors(before: Tensor, norm: Tensor, after: Mapping[str, Tensor], kept: int, moment: Tensor | None = None) -> _Factors:
    """Choose the directions of a rank that stay, and fit what reads them.

    Args:
        before (`Tensor` of shape `(rank, in)`): The weight that gives the row.
        norm (`Tensor` of shape `(rank,)`): What the norm multiplies it by.
        after (`Mapping[str, Tensor]`): The weights that read it, each `(out, rank)`.
        kept (`int`): How many directions stay.
        moment (`Tensor` of shape `(in, in)`, *optional*): E[x xᵀ] of the input; without it every input counts alike.
    """
    energy = before @ before.T if moment is None else before @ moment @ before.T
    energy = energy * (len(energy) / energy.trace())  # of the row divided by its root mean square, as if that were one number
    readers = {name: weight * norm for name, weight in after.items()}
    given = sum(weight.T @ weight for weight in readers.values())
    values, vectors = torch.linalg.eigh(energy)
    root = vectors * values.clamp(min=0).sqrt()
    largest = torch.linalg.eigh(root.T @ given @ root)[1].flip(1)[:, :kept]
    used = vectors[:, -max(kept, int((values > NO_ENERGY * values.max()).sum())) :]  # all that the row ever is
    basis = torch.linalg.qr(used @ (used.T @ given @ root @ largest) if used.shape[1] > kept else used)[0]
    inside = basis.T @ energy @ basis
    ridge = RIDGE * inside.diagonal().mean() * torch.eye(kept, dtype=inside.dtype)
    fitted = {
        name: weight @ basis + torch.linalg.solve(inside + ridge, basis.T @ energy @ (weight - weight @ basis @ basis.T).T).T
        for name, weight in readers.items()
    }
    return _Factors(basis, fitted, float((inside.trace() / kept).sqrt()))


@dataclass(frozen=True)
class RankTensors:
    """The teacher's tensors with ranks in new bases, of which a plan keeps the first directions.

    Args:
        tensors (`Tensors`): The teacher's.
        plan (`Plan`): What is kept.
        moments (`Moments`, *optional*): `statistics.moments`.
    """

    tensors: Tensors
    plan: Plan
    moments: Moments | None
    _found: dict[tuple[str, int], _Factors] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        """The teacher's."""
        return self.tensors.architecture

    def names(self) -> Iterable[str]:
        """Return the teacher's names."""
        return self.tensors.names()

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a tensor."""
        return self.tensors.spec(name)

    def read(self, name: str) -> Tensor:
        """Return a tensor; of one with a rank only the kept directions are more than zeros."""
        parameter, tensor = self.architecture.stored[name], self.tensors.read(name)
        axis = next((axis for axis in RANKS if axis in self.plan.keep and _has(parameter, axis)), None)
        if axis is None or parameter.layer not in self.plan.kept_layers:
            return tensor
        found, size = self._factors(axis, parameter.layer), self.plan.before[axis]
        kept = found.basis.shape[1]
        made = torch.zeros(tensor.shape, dtype=torch.float64)
        if len(parameter.dims) == 2 and _has(parameter, axis, 1):
            made[:, :kept] = found.after[name]
        elif parameter.pattern == axis and parameter.module not in self._givers(axis, parameter.layer):
            made[:kept] = found.scale
        else:
            made[:kept] = found.basis.T @ tensor[:size].cpu().double()
            made[size:] = tensor[size:]
        return made.to(tensor)

    def _givers(self, axis: str, layer: int) -> dict[str, Parameter]:
        """Return the projections whose outputs are the rank, with their weights."""
        weights = self.architecture.weights
        return {n: p for n, p in weights.items() if p.layer == layer and len(p.dims) == 2 and _has(p, axis, 0)}

    def _factors(self, axis: str, layer: int) -> _Factors:
        """Return a rank's factors, made once."""
        if (axis, layer) in self._found:
            return self._found[axis, layer]
        (first,) = self._givers(axis, layer).values()
        every = [p for p in self.architecture.parameters.values() if p.layer == layer and _has(p, axis)]
        norm = next(p for p in every if p.pattern == axis and p.module != first.module)
        after = {p.name: self._float(p.name) for p in every if len(p.dims) == 2 and _has(p, axis, 1)}
        before, moment = self._float(first.name)[: self.plan.before[axis]], None
        if self.moments and first.module in self.architecture.reads:
            stored = self.moments[self.architecture.reads[first.module].moment].cpu().double()
            moment, bias = stored[:-1], f"{first.module}.bias"
            if bias in self.architecture.parameters:  # a bias is the weight of an input that is always one
                before = torch.cat([before, self._float(bias)[: len(before), None]], 1)
                moment = torch.cat([torch.cat([moment, stored[-1:]]), torch.cat([stored[-1], stored.new_ones(1)])[:, None]], 1)
        kept = len(self.plan.keep[axis][self.plan.kept_layers.index(layer)])
        self._found[axis, layer] = factors(before, self._float(norm.name), after, kept, moment)
        return self._found[axis, layer]

    def _float(self, name: str) -> Tensor:
        return self.tensors.read(name).cpu().double()


def _has(parameter: Parameter, axis: str, position: int | None = None) -> bool:
    """Return whether a parameter, or its dimension at a position, holds an axis."""
    dims = parameter.dims if position is None else parameter.dims[position : position + 1]
    return any(axis in term for dim in dims for term in dim)
