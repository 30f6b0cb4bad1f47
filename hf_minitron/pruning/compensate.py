"""Corrections: least-squares reconstruction and its like, which change the kept weights by statistics of forward passes.

A correction keeps the student's shape: the result is still a stock checkpoint.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hf_minitron import axes
from hf_minitron.architecture.architecture import INPUT, OUTPUT, Architecture, Parameter, Read
from hf_minitron.architecture.binding import inner_norms
from hf_minitron.plan import Plan
from hf_minitron.pruning.reconstruction import RIDGE, factorised, solver_device
from hf_minitron.statistics import Moments, Residuals

CORRECTIONS = {
    "least_squares": "least-squares reconstruction of every projection whose inputs are cut",
    "bias": "biases keep the mean output of projections",
    "norm_ratio": "the weights of norms are scaled by the share of energy that the kept channels or heads have",
    "layer_merge": "the MLP before dropped layers is fitted to give their residuals, too (another pass over the text)",
    "rotation": "hidden channels are principal components of the stream before they are cut (unties the head, a matrix more)",
}
# What helps on text of the calibration's domain and of another one (benchmarks/corrections.py), and costs no parameter.
DEFAULT_CORRECTIONS = ("least_squares", "bias", "norm_ratio")


@dataclass(frozen=True)
class Corrections:
    """The corrections of one pruning, made tensor by tensor.

    A moment is read, and factorised, once for all that read the same input (q, k, v and their biases), and then forgotten.

    Args:
        moments (`Moments`): `statistics.moments`.
        names (`Sequence[str]`): Which of `CORRECTIONS`.
        architecture (`Architecture`): The teacher's.
        plan (`Plan`): What is kept.
        rotation (`Rotation`, *optional*): The basis in which the teacher's tensors are read.
        residuals (`Residuals`, *optional*): What `read_residuals` measured.
        ridge (`float`, *optional*, defaults to `RIDGE`): Weight of a projection's change beside its error, relative to the
            mean energy of an input.
    """

    moments: Moments
    names: Sequence[str]
    architecture: Architecture
    plan: Plan
    rotation: "Rotation | None" = None  # noqa: F821 (stands below this module)
    residuals: Residuals | None = None
    ridge: float = RIDGE
    _threads: int = field(default_factory=torch.get_num_threads)  # a thread that makes tensors to be written has but one
    _inputs: dict[str, Tensor] = field(default_factory=dict)  # moments with their means
    _solvers: dict[tuple[str, bool], Callable] = field(default_factory=dict)  # by moment, and whether a bias takes up the means
    _fits: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(
        self, parameter: Parameter, tensor: Tensor, keep: dict[str, Tensor], read: Callable[[str], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Mapping[str, int]]:
        """Return a tensor corrected, what is still to be cut of it, and the sizes of its axes before that.

        Args:
            parameter (`Parameter`): The teacher's parameter.
            tensor (`Tensor`): Its values.
            keep (`dict[str, Tensor]`): What is kept of every axis where it stands.
            read (`Callable`): Returns another parameter of the teacher by its name.
        """
        try:
            if torch.get_num_threads() == self._threads:
                return self._corrected(parameter, tensor, keep, read)
            with ThreadPoolExecutor(1) as pool:  # called by a thread that writes and computes by itself; a new one has them all
                return pool.submit(self._corrected, parameter, tensor, keep, read).result()
        finally:
            for source in self._sources(parameter):
                self._consumers[source.moment] -= 1
                if not self._consumers[source.moment]:
                    self._inputs.pop(source.moment, None)
                    for centred in (False, True):
                        self._solvers.pop((source.moment, centred), None)

    def _corrected(
        self, parameter: Parameter, tensor: Tensor, keep: dict[str, Tensor], read: Callable[[str], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Mapping[str, int]]:
        sizes, source = self.plan.before.at(parameter.layer), self.architecture.reads.get(parameter.module)
        if parameter.role == "norm" or parameter.module in self._inner_norms:
            return self._norm(parameter, tensor, keep), keep, sizes
        if source is None or parameter.kind not in ("weight", "bias") or not (source.axis in keep or self._merges(source)):
            return tensor, keep, sizes
        weight = self.architecture.weights[parameter.module]
        shifts = self._shifts(weight)
        if not shifts and (parameter.kind == "bias" or not self._fits_weights(source)):
            return tensor, keep, sizes
        if weight.module in self._fits:
            fitted, gain = self._fits.pop(weight.module)
        else:
            values = tensor if parameter.kind == "weight" else read(weight.name)
            fitted, gain = self._fit(weight, source, values, keep)
            if shifts:
                self._fits[weight.module] = fitted, gain  # for the bias, or for the weight after it
        if parameter.kind == "bias":
            return tensor + gain.to(tensor), keep, sizes
        position, _ = weight.dim_of(source.axis)
        left = {axis: index for axis, index in keep.items() if axis != source.axis}
        size = len(keep[source.axis]) if source.axis in keep else sizes[source.axis]
        return fitted.movedim(-1, position).contiguous(), left, {**sizes, source.axis: size}

    def _shifts(self, weight: Parameter) -> bool:
        """Return whether a projection has a bias that takes up a part of the correction."""
        return "bias" in self.names and f"{weight.module}.bias" in self.architecture.parameters

    def _fits_weights(self, source: Read) -> bool:
        """Return whether the weights for kept inputs are fitted, not only sliced."""
        return "least_squares" in self.names or self._merges(source)

    def _fit(self, weight: Parameter, source: Read, tensor: Tensor, keep: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return a projection's weights for the kept inputs, shape `(out, kept)`, and what its bias gains, shape `(out,)`."""
        position, dim = weight.dim_of(source.axis)
        tensor, shifts = tensor.movedim(position, -1), self._shifts(weight)
        sizes = self.plan.before.at(source.layer)
        every = {source.axis: torch.arange(sizes[source.axis])}
        kept = axes.dim_index(dim, keep if source.axis in keep else every, sizes)
        stored = self._input(source)
        mean, extra, shift = stored[-1].double(), None, 0
        if self._merges(source):
            added = self.residuals.added[source.moment].to(mean)
            added = added if self.rotation is None else added @ self.rotation.basis.to(mean)
            extra, shift = added[:-1].T, added[-1]
            extra = (extra - torch.outer(shift, mean) if shifts else extra).to(stored)
        if self._fits_weights(source):
            fitted = self._solver(source, kept, shifts)(tensor.to(stored.device), extra).to(tensor)
        else:
            fitted = tensor[:, kept.to(tensor.device)]
        gain = tensor.to(mean) @ mean + shift - fitted.to(mean) @ mean[kept] if shifts else None
        return fitted, gain

    def _solver(self, source: Read, kept: Tensor, centred: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Return what fits weights to an input, factorised once; `centred` where a bias takes up the means."""
        key = source.moment, centred
        if key not in self._solvers:
            moment, mean = self._input(source)[:-1], self._input(source)[-1]
            self._solvers[key] = factorised(moment, kept, self.ridge, mean if centred else None)
        return self._solvers[key]

    def _input(self, source: Read) -> Tensor:
        """Return E[x xᵀ] and, as the last row, E[x] of what a projection is given, as they are stored."""
        if source.moment not in self._inputs:
            norm, dot, side = source.moment.rpartition(".")
            found = (self.residuals.inputs if self._merges(source) else self.moments)[source.moment]
            if self.rotation is not None and dot + side == OUTPUT:
                found = self.rotation.moment(norm, found)
            self._inputs[source.moment] = found.to(solver_device())
        return self._inputs[source.moment]

    def _sources(self, parameter: Parameter) -> list[Read]:
        """Return the moments that a parameter is corrected by."""
        found = []
        if parameter.role == "norm" and self.rotation is not None:
            found.append(Read("hidden", parameter.layer, f"{parameter.module}{OUTPUT}"))
        if parameter.kind in ("weight", "bias") and parameter.module in self.architecture.reads:
            found.append(self.architecture.reads[parameter.module])
        return found

    @cached_property
    def _inner_norms(self) -> Mapping[str, Parameter]:
        return inner_norms(self.architecture.parameters.values())

    @cached_property
    def _consumers(self) -> Counter:
        """How many parameters are still to be corrected by each moment."""
        return Counter(read.moment for parameter in self.architecture.parameters.values() for read in self._sources(parameter))

    def _norm(self, parameter: Parameter, tensor: Tensor, keep: dict[str, Tensor]) -> Tensor:
        kept = axes.dim_index(parameter.dims[0], keep, self.plan.before.at(parameter.layer))
        if "norm_ratio" not in self.names or parameter.kind != "weight" or kept is None:
            return tensor
        if self.rotation is None or parameter.role != "norm":
            energy = self.moments[parameter.module]
        else:
            (source,) = self._sources(parameter)
            energy = self._input(source)[:-1].diagonal()
        ratio, offset = (energy[kept].mean() / energy.mean()).sqrt().to(tensor), self.architecture.norm_offset
        return (tensor + offset) * ratio - offset

    def _merges(self, source: Read) -> bool:
        """Return whether a projection takes over what dropped layers added."""
        return self.residuals is not None and "layer_merge" in self.names and source.moment in self.residuals.added


def corrections_for(
    architecture: Architecture,
    plan: Plan,
    moments: Moments,
    names: Sequence[str] = DEFAULT_CORRECTIONS,
    rotation: "Rotation | None" = None,  # noqa: F821
    residuals: Residuals | None = None,
) -> Corrections:
    """Return the corrections of a plan, refusing moments that lack something before any weight is read."""
    check_names(names)
    if names:
        _check_moments(moments, plan, architecture)
    return Corrections(moments, names, architecture, plan, rotation, residuals)


def _check_moments(moments: Moments, plan: Plan, architecture: Architecture) -> None:
    """Refuse moments that lack something, or are those of another model."""
    hidden = plan.before["hidden"]
    wanted = {norm: 1 for _, norm in architecture.taps("hidden")} | {read.moment: 2 for read in architecture.reads.values()}
    inner = {name: norm.shape[0] for name, norm in inner_norms(architecture.parameters.values()).items()}
    for name, dims in (wanted | dict.fromkeys(inner, 1)).items():
        shape, size = moments.shapes.get(name), inner.get(name, hidden)
        if shape is None or len(shape) != dims or (name.endswith((INPUT, OUTPUT)) or dims == 1) and shape[-1] != size:
            what = "none" if shape is None else f"those of shape {shape}"
            raise ValueError(f"Corrections need the moments of {name!r}, and statistics has {what}: score this model again")


def check_names(names: Sequence[str]) -> None:
    """Refuse a correction that does not exist."""
    unknown = [name for name in names if name not in CORRECTIONS]
    if unknown:
        raise ValueError(f"corrections: {unknown[0]!r} is none of {', '.join(CORRECTIONS)}")
