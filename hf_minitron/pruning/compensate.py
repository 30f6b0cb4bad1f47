"""Corrections: what the kept weights can take over from the dropped ones, from statistics of forward passes only.

A correction keeps the student's shape: the result is still a stock checkpoint. It must not know how the plan was made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from hf_minitron import axes
from hf_minitron.families.family import Family
from hf_minitron.plan import Plan

# What a norm gives is stored beside what it is given, under the norm's name and this.
OUTPUT = ".output"

CORRECTIONS = {
    "least_squares": "projections map the inputs that are kept as near as they can to what they gave for all",
    "norm_ratio": "the weights of norms allow for the energy of the hidden channels that are gone",
}


@dataclass(frozen=True)
class Corrections:
    """The corrections of one pruning, made tensor by tensor.

    Args:
        moments (`Path`): The folder that `calibrate(..., moments=...)` wrote.
        names (`Sequence[str]`): Which of `CORRECTIONS`.
        taps (`Mapping[str, tuple[str, int | None, str]]`): Module to the axis that it reads, its layer, and the module by whose
            name its moments are stored.
        norms (`frozenset[str]`): The modules among them that are norms.
        plan (`Plan`): What is kept.
        offset (`float`): What the family's norms add to their weights.
        ridge (`float`, *optional*, defaults to 0.1): Weight of a projection's change beside its error, relative to the mean
            energy of an input. On SmolLM2-135M, 0.001 to 0.1 are alike on text like the calibration's, but on other text only
            0.1 and more help (benchmarks/corrections.py).
    """

    moments: Path
    names: Sequence[str]
    taps: Mapping[str, tuple[str, int | None, str]]
    norms: frozenset[str]
    plan: Plan
    offset: float
    ridge: float = 0.1

    def __call__(
        self, name: str, pattern: str, tensor: Tensor, keep: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Mapping[str, int]]:
        """Return a tensor corrected, what is still to be cut of it, and the sizes of its axes before that.

        Args:
            name (`str`): The teacher's parameter.
            pattern (`str`): Its axes.
            tensor (`Tensor`): Its values.
            keep (`dict[str, Tensor]`): What is kept of every axis where it stands.
        """
        module, sizes = name.removesuffix(".weight"), self.plan.before.sizes
        axis, layer, stored = self.taps.get(module, (None, None, ""))
        if axis not in keep or not name.endswith(".weight"):
            return tensor, keep, sizes
        if module in self.norms and "norm_ratio" in self.names:
            energy = self._read(stored, layer)
            ratio = (energy[keep["hidden"]].mean() / energy.mean()).sqrt().to(tensor)
            return (tensor + self.offset) * ratio - self.offset, keep, sizes
        if module not in self.norms and "least_squares" in self.names:
            dims = axes.parse(pattern)
            position = dims.index(axes.dim_of(pattern, axis))
            kept = axes.dim_index(dims[position], {axis: keep[axis]}, sizes)
            corrected = least_squares(tensor.movedim(position, -1), self._read(stored, layer)[:-1], kept, self.ridge)
            left = {other: index for other, index in keep.items() if other != axis}
            return corrected.movedim(-1, position).contiguous(), left, {**sizes, axis: len(keep[axis])}
        return tensor, keep, sizes

    def _read(self, module: str, layer: int | None) -> Tensor:
        with safe_open(moments_path(self.moments, layer), framework="pt") as file:
            return file.get_tensor(module)


def corrections_for(
    config: PreTrainedConfig, family: Family, plan: Plan, moments: Path, names: Sequence[str] = tuple(CORRECTIONS)
) -> Corrections:
    """Return the corrections of a plan, refusing moments that lack something before any weight is read."""
    taps = {
        module: (axis, layer, module)
        for axis, places in family.taps_of(config).items()
        if axis in ("ffn", "dense_ffn", "shared_ffn", "heads", "hidden")
        for layer, module in places
        if not module.endswith(".experts")
    }
    norms = frozenset(module for module, (axis, *_) in taps.items() if axis == "hidden")
    taps |= {module: ("hidden", layer, f"{norm}{OUTPUT}") for module, (layer, norm) in family.readers_of(config).items()}
    taps |= {alias: taps[module] for module in taps for alias in _aliases(family, module)}
    check_names(names)
    for layer in {layer for _, layer, _ in taps.values()}:
        if names and not moments_path(moments, layer).is_file():
            raise ValueError(f"Corrections need {moments_path(moments, layer)}, which is missing: score with moments: true")
    return Corrections(moments, names, taps, norms, plan, family.norm_offset)


def _aliases(family: Family, module: str) -> list[str]:
    """Return the names under which a checkpoint may store a module."""
    found = axes.match(f"{module}.weight", family.rows)
    stored = family.stored.get(found[0], ()) if found else ()
    return [row.format_map(found[1]).removesuffix(".weight") for row in stored]


def check_names(names: Sequence[str]) -> None:
    """Refuse a correction that does not exist."""
    unknown = [name for name in names if name not in CORRECTIONS]
    if unknown:
        raise ValueError(f"corrections: {unknown[0]!r} is none of {', '.join(CORRECTIONS)}")


def moments_path(folder: Path, layer: int | None) -> Path:
    """Return the file that holds the moments of a layer, or of what lies outside of the layers."""
    return folder / ("outside.safetensors" if layer is None else f"layer-{layer:05}.safetensors")


def least_squares(weight: Tensor, moment: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Map the kept inputs of a projection as near as possible to what it gave for all of them.

    Minimises E|W x - W' x_kept|² + ridge · mean(E x_kept²) · |W' - W_kept|² in float64: a large ridge gives plain slicing.

    Args:
        weight (`Tensor` of shape `(out, in)`): The projection.
        moment (`Tensor` of shape `(in, in)`): E[x xᵀ] of its inputs.
        kept (`Tensor` of shape `(kept,)`): The inputs that stay.
        ridge (`float`): As above.

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
    update = torch.cholesky_solve(missing.T, torch.linalg.cholesky(inner)).T
    return (wide[:, kept] + update).to(weight.dtype)
