"""Corrections: what the kept weights can take over from the dropped ones, from statistics of forward passes only.

A correction keeps the student's shape: the result is still a stock checkpoint. It must not know how the plan was made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hf_minitron import axes
from hf_minitron.architecture.architecture import INPUT, OUTPUT, Architecture, Parameter, Read
from hf_minitron.plan import Plan

# Beside a module's moments: what dropped layers added. (A norm's are energies of what it is given.)
GAP = ".gap"

CORRECTIONS = {
    "least_squares": "projections map the inputs that are kept as near as they can to what they gave for all",
    "bias": "projections that have a bias give what they gave on average",
    "norm_ratio": "the weights of norms allow for the energy of the hidden channels that are gone",
    "layer_merge": "the MLP before dropped layers adds what it can of what they added (another pass over the text)",
    "head_residual": "query heads that stay lean away from those that go (2407.14679, section 2.3)",
    "rotation": "hidden channels are principal components of the stream before they are cut (unties the head, a matrix more)",
}
# What helps on text of the calibration's domain and of another one (benchmarks/corrections.py), and costs no parameter.
DEFAULT_CORRECTIONS = ("least_squares", "bias", "norm_ratio")

# On SmolLM2-135M, 0.001 to 0.1 are alike on text like the calibration's, but on other text only 0.1 and more help.
RIDGE = 0.1


@dataclass(frozen=True)
class Corrections:
    """The corrections of one pruning, made tensor by tensor.

    Args:
        moments (`Path`): The folder that `calibrate(..., moments=...)` wrote.
        names (`Sequence[str]`): Which of `CORRECTIONS`.
        architecture (`Architecture`): The teacher's.
        plan (`Plan`): What is kept.
        rotation (`Rotation`, *optional*): The basis in which the teacher's tensors are read.
        gaps (`Path`, *optional*): The folder that `read_gaps` wrote.
        ridge (`float`, *optional*, defaults to `RIDGE`): Weight of a projection's change beside its error, relative to the
            mean energy of an input.
    """

    moments: Path
    names: Sequence[str]
    architecture: Architecture
    plan: Plan
    rotation: "Rotation | None" = None  # noqa: F821 (stands below this module)
    gaps: Path | None = None
    ridge: float = RIDGE

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
        sizes = self.plan.before.sizes
        if "head_residual" in self.names and "heads" in keep:
            tensor = self._with_head_residual(parameter, tensor, keep["heads"])
        if parameter.role == "norm":
            return (self._norm(parameter, tensor, keep) if "hidden" in keep else tensor), keep, sizes
        source = self.architecture.reads.get(parameter.module)
        if source is None or parameter.kind not in ("weight", "bias") or not (source.axis in keep or self._gap(source)):
            return tensor, keep, sizes
        if parameter.kind == "bias":
            weight = self.architecture.weights[parameter.module]
            return (tensor + self._fit(weight, source, read(weight.name), keep)[1].to(tensor)), keep, sizes
        position, _ = parameter.dim_of(source.axis)
        fitted = self._fit(parameter, source, tensor, keep)[0].movedim(-1, position).contiguous()
        left = {axis: index for axis, index in keep.items() if axis != source.axis}
        return fitted, left, {**sizes, source.axis: len(keep[source.axis]) if source.axis in keep else sizes[source.axis]}

    def _fit(self, parameter: Parameter, source: Read, tensor: Tensor, keep: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a projection's weights for the kept inputs, shape `(out, kept)`, and what its bias gains, shape `(out,)`."""
        axis, (position, dim) = source.axis, parameter.dim_of(source.axis)
        weight = tensor.movedim(position, -1)
        kept = axes.dim_index(
            dim, keep if axis in keep else {axis: torch.arange(self.plan.before[axis])}, self.plan.before.sizes
        )
        gap = self._gap(source)
        read = read_moment(self.gaps, source.layer, source.moment) if gap else self._moment(source)
        moment, mean = read[:-1].double(), read[-1].double()
        extra = torch.zeros(*weight.shape[:-1], 1, dtype=torch.float64).expand(weight.shape)
        shift = extra[..., 0]
        if gap:
            found = read_moment(self.gaps, source.layer, source.moment + GAP).double()
            found = found if self.rotation is None else found @ self.rotation.basis
            extra, shift = found[:-1].T, found[-1]
        if "bias" in self.names and f"{parameter.module}.bias" in self.architecture.parameters:
            moment, extra = moment - torch.outer(mean, mean), extra - torch.outer(shift, mean)
        fitted = weight[:, kept]
        if "least_squares" in self.names or gap:
            fitted = least_squares(weight, moment, kept, self.ridge, extra)
        gain = weight.double() @ mean + shift - fitted.double() @ mean[kept]
        return fitted, gain if "bias" in self.names else torch.zeros_like(gain)

    def _norm(self, parameter: Parameter, tensor: Tensor, keep: dict[str, Tensor]) -> Tensor:
        if "norm_ratio" not in self.names or parameter.kind != "weight":
            return tensor
        if self.rotation is None:
            energy = read_moment(self.moments, parameter.layer, parameter.module)
        else:
            energy = self._moment(Read("hidden", parameter.layer, f"{parameter.module}{OUTPUT}"))[:-1].diagonal()
        ratio, offset = (energy[keep["hidden"]].mean() / energy.mean()).sqrt().to(tensor), self.architecture.norm_offset
        return (tensor + offset) * ratio - offset

    def _with_head_residual(self, parameter: Parameter, tensor: Tensor, kept: Tensor) -> Tensor:
        """Add to query heads that stay what sets them apart from those that go: the weakest stays for the strongest gone."""
        if parameter.dims[0] != (("heads", "head_dim"),):
            return tensor
        before = self.plan.before
        source = next(r for r in self.architecture.reads.values() if (r.axis, r.layer) == ("heads", parameter.layer))
        energy = self._moment(source)[:-1].diagonal().view(before["heads"], -1).sum(1)
        heads, group = tensor.unflatten(0, (before["heads"], -1)).clone(), before["heads"] // before.kv_groups
        for first in range(0, before["heads"], group):
            order = sorted(range(first, first + group), key=lambda head: float(energy[head]))
            stay, go = ([h for h in order if (h in kept) == staying] for staying in (True, False))
            if stay:
                for weak, strong in zip(stay, reversed(go), strict=False):
                    heads[weak] += heads[weak] - tensor.unflatten(0, (before["heads"], -1))[strong]
        return heads.flatten(0, 1)

    def _moment(self, source: Read) -> Tensor:
        """Return E[x xᵀ] and E[x] (the last row) of a projection's input."""
        found, (norm, dot, side) = read_moment(self.moments, source.layer, source.moment), source.moment.rpartition(".")
        return self.rotation.moment(norm, found) if self.rotation is not None and dot + side == OUTPUT else found

    def _gap(self, source: Read) -> bool:
        """Return whether it was read what the layers that were dropped behind a module's layer added."""
        wanted = self.gaps is not None and source.axis == "ffn" and "layer_merge" in self.names
        return wanted and moments_path(self.gaps, source.layer).is_file()


def corrections_for(
    architecture: Architecture,
    plan: Plan,
    moments: Path,
    names: Sequence[str] = DEFAULT_CORRECTIONS,
    rotation: "Rotation | None" = None,  # noqa: F821
    gaps: Path | None = None,
) -> Corrections:
    """Return the corrections of a plan, refusing moments that lack something before any weight is read."""
    check_names(names)
    if names:
        _check_moments(moments, plan, architecture)
    return Corrections(moments, names, architecture, plan, rotation, gaps)


def _check_moments(moments: Path, plan: Plan, architecture: Architecture) -> None:
    """Refuse moments that lack something, or are those of another model."""
    wanted: dict[int | None, dict[str, int]] = {}
    for layer, norm in architecture.taps("hidden"):
        wanted.setdefault(layer, {})[norm] = 1
    for read in architecture.reads.values():
        wanted.setdefault(read.layer, {})[read.moment] = 2
    for layer, names in wanted.items():
        path, found = moments_path(moments, layer), {}
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        else:
            raise ValueError(f"Corrections need {path}, which is missing: score with moments: true")
        hidden = plan.before["hidden"]
        for name, dims in names.items():
            shape = found.get(name)
            wrong = shape is None or len(shape) != dims or (name.endswith((INPUT, OUTPUT)) or dims == 1) and shape[-1] != hidden
            if wrong:
                what = "none" if shape is None else f"those of shape {tuple(shape)}"
                raise ValueError(f"Corrections need the moments of {name!r}, and {path} has {what}: score this model again")


def check_names(names: Sequence[str]) -> None:
    """Refuse a correction that does not exist."""
    unknown = [name for name in names if name not in CORRECTIONS]
    if unknown:
        raise ValueError(f"corrections: {unknown[0]!r} is none of {', '.join(CORRECTIONS)}")


def moments_path(folder: Path, layer: int | None) -> Path:
    """Return the file that holds the moments of a layer, or of what lies outside of the layers."""
    return folder / ("outside.safetensors" if layer is None else f"layer-{layer:05}.safetensors")


def read_moment(folder: Path, layer: int | None, name: str) -> Tensor:
    """Read one tensor of what `calibrate(..., moments=...)` or `read_gaps` wrote."""
    with safe_open(moments_path(folder, layer), framework="pt") as file:
        return file.get_tensor(name)


def least_squares(weight: Tensor, moment: Tensor, kept: Tensor, ridge: float, extra: Tensor | None = None) -> Tensor:
    """Map the kept inputs of a projection as near as possible to what it gave for all of them.

    Minimises E|W x + y - W' x_kept|² + ridge · mean(E x_kept²) · |W' - W_kept|² in float64: a large ridge gives plain slicing.

    Args:
        weight (`Tensor` of shape `(out, in)`): The projection.
        moment (`Tensor` of shape `(in, in)`): E[x xᵀ] of its inputs.
        kept (`Tensor` of shape `(kept,)`): The inputs that stay.
        ridge (`float`): As above.
        extra (`Tensor` of shape `(out, in)`, *optional*): E[y xᵀ] of what shall be given beside; nothing when left out.

    Returns:
        `Tensor` of shape `(out, kept)`: In the weight's dtype.

    Example:

    ```python
    >>> x = torch.randn(100, 8)
    >>> x[:, 1] = x[:, 0]  # the dropped input repeats a kept one
    >>> least_squares(torch.ones(1, 8), x.T @ x / 100, torch.tensor([0, 2, 3, 4, 5, 6, 7]), 1e-9)[0, 0]
    tensor(2.)
    ```
    """
    moment, wide = moment.double(), weight.double()
    dropped = torch.ones(len(moment), dtype=torch.bool)
    dropped[kept] = False
    inner = moment[kept][:, kept]
    inner.diagonal().add_(ridge * inner.diagonal().mean().clamp(min=1e-30))
    missing = wide[:, dropped] @ moment[dropped][:, kept]  # what the dropped inputs gave, as the kept ones see it
    if extra is not None:
        missing = missing + extra[:, kept]
    update = torch.cholesky_solve(missing.T, torch.linalg.cholesky(inner)).T
    return (wide[:, kept] + update).to(weight.dtype)
