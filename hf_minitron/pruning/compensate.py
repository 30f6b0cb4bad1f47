"""Corrections: what the kept weights can take over from the dropped ones, from statistics of forward passes only.

A correction keeps the student's shape: the result is still a stock checkpoint. It must not know how the plan was made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from hf_minitron import axes
from hf_minitron.families.family import INPUT, OUTPUT, Family
from hf_minitron.families.meta import parameters_of
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
        taps (`Mapping[str, tuple[str, int | None, str]]`): Module to the axis that it reads, its layer, and the name under
            which its moments are stored.
        norms (`frozenset[str]`): The modules among them that are norms.
        biased (`frozenset[str]`): Those that have a bias.
        rows (`Mapping[str, str]`): The teacher's rows.
        plan (`Plan`): What is kept.
        offset (`float`): What the family's norms add to their weights.
        rotation (`Rotation`, *optional*): The basis in which the teacher's tensors are read.
        gaps (`Path`, *optional*): The folder that `read_gaps` wrote.
        ridge (`float`, *optional*, defaults to `RIDGE`): Weight of a projection's change beside its error, relative to the
            mean energy of an input.
    """

    moments: Path
    names: Sequence[str]
    taps: Mapping[str, tuple[str, int | None, str]]
    norms: frozenset[str]
    biased: frozenset[str]
    rows: Mapping[str, str]
    plan: Plan
    offset: float
    rotation: "Rotation | None" = None  # noqa: F821 (stands below this module)
    gaps: Path | None = None
    ridge: float = RIDGE

    def __call__(
        self, name: str, tensor: Tensor, keep: dict[str, Tensor], read: Callable[[str], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Mapping[str, int]]:
        """Return a tensor corrected, what is still to be cut of it, and the sizes of its axes before that.

        Args:
            name (`str`): The teacher's parameter.
            tensor (`Tensor`): Its values.
            keep (`dict[str, Tensor]`): What is kept of every axis where it stands.
            read (`Callable`): Returns another parameter of the teacher.
        """
        sizes, (module, _, kind) = self.plan.before.sizes, name.rpartition(".")
        if "head_residual" in self.names and "heads" in keep:
            tensor = self._with_head_residual(name, tensor, keep["heads"])
        axis = self.taps.get(module, (None,))[0]
        if kind not in ("weight", "bias") or not (axis in keep or self._gap(module)):
            return tensor, keep, sizes
        if module in self.norms:
            return (self._norm(module, tensor, keep) if kind == "weight" else tensor), keep, sizes
        if kind == "bias":
            return (tensor + self._fit(module, read(f"{module}.weight"), keep)[1].to(tensor)), keep, sizes
        dims = axes.parse(self._pattern(name))
        position = dims.index(axes.dim_of(self._pattern(name), axis))
        fitted = self._fit(module, tensor, keep)[0].movedim(-1, position).contiguous()
        left = {other: index for other, index in keep.items() if other != axis}
        return fitted, left, {**sizes, axis: len(keep[axis]) if axis in keep else sizes[axis]}

    def _fit(self, module: str, tensor: Tensor, keep: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a projection's weights for the kept inputs, shape `(out, kept)`, and what its bias gains, shape `(out,)`."""
        axis, layer, stored = self.taps[module]
        pattern = self._pattern(f"{module}.weight")
        dim = axes.dim_of(pattern, axis)
        weight = tensor.movedim(axes.parse(pattern).index(dim), -1)
        kept = axes.dim_index(
            dim, keep if axis in keep else {axis: torch.arange(self.plan.before[axis])}, self.plan.before.sizes
        )
        gap = self._gap(module)
        read = read_moment(self.gaps, layer, module) if gap else self._moment(stored, layer)
        moment, mean = read[:-1].double(), read[-1].double()
        extra = torch.zeros(*weight.shape[:-1], 1, dtype=torch.float64).expand(weight.shape)
        shift = extra[..., 0]
        if gap:
            found = read_moment(self.gaps, layer, module + GAP).double()
            found = found if self.rotation is None else found @ self.rotation.basis
            extra, shift = found[:-1].T, found[-1]
        if "bias" in self.names and module in self.biased:
            moment, extra = moment - torch.outer(mean, mean), extra - torch.outer(shift, mean)
        fitted = weight[:, kept]
        if "least_squares" in self.names or gap:
            fitted = least_squares(weight, moment, kept, self.ridge, extra)
        gain = weight.double() @ mean + shift - fitted.double() @ mean[kept]
        return fitted, gain if "bias" in self.names else torch.zeros_like(gain)

    def _norm(self, module: str, tensor: Tensor, keep: dict[str, Tensor]) -> Tensor:
        _, layer, stored = self.taps[module]
        if "norm_ratio" not in self.names:
            return tensor
        if self.rotation is None:
            energy = read_moment(self.moments, layer, stored)
        else:
            energy = self._moment(f"{stored}{OUTPUT}", layer)[:-1].diagonal()
        ratio = (energy[keep["hidden"]].mean() / energy.mean()).sqrt().to(tensor)
        return (tensor + self.offset) * ratio - self.offset

    def _with_head_residual(self, name: str, tensor: Tensor, kept: Tensor) -> Tensor:
        """Add to query heads that stay what sets them apart from those that go: the weakest stays for the strongest gone."""
        row, indices = axes.match(name, self.rows)
        if axes.parse(self.rows[row])[0] != (("heads", "head_dim"),):
            return tensor
        layer, before = axes.layer_in(indices), self.plan.before
        stored = next(stored for axis, at, stored in self.taps.values() if axis == "heads" and at == layer)
        energy = self._moment(stored, layer)[:-1].diagonal().view(before["heads"], -1).sum(1)
        heads, group = tensor.unflatten(0, (before["heads"], -1)).clone(), before["heads"] // before.kv_groups
        for first in range(0, before["heads"], group):
            order = sorted(range(first, first + group), key=lambda head: float(energy[head]))
            stay, go = ([h for h in order if (h in kept) == staying] for staying in (True, False))
            if stay:
                for weak, strong in zip(stay, reversed(go), strict=False):
                    heads[weak] += heads[weak] - tensor.unflatten(0, (before["heads"], -1))[strong]
        return heads.flatten(0, 1)

    def _moment(self, stored: str, layer: int | None) -> Tensor:
        """Return E[x xᵀ] and E[x] (the last row) of a projection's input."""
        found = read_moment(self.moments, layer, stored)
        turned = self.rotation is not None and stored.endswith(OUTPUT)
        return self.rotation.moment(stored.removesuffix(OUTPUT), found) if turned else found

    def _gap(self, module: str) -> bool:
        """Return whether it was read what the layers that were dropped behind a module's layer added."""
        axis, layer, _ = self.taps.get(module, (None, None, ""))
        wanted = self.gaps is not None and axis == "ffn" and "layer_merge" in self.names
        return wanted and moments_path(self.gaps, layer).is_file()

    def _pattern(self, name: str) -> str:
        return self.rows[axes.match(name, self.rows)[0]]


def corrections_for(
    config: PreTrainedConfig,
    family: Family,
    plan: Plan,
    moments: Path,
    names: Sequence[str] = DEFAULT_CORRECTIONS,
    rotation: "Rotation | None" = None,  # noqa: F821
    gaps: Path | None = None,
) -> Corrections:
    """Return the corrections of a plan, refusing moments that lack something before any weight is read."""
    check_names(names)
    projections = corrected_modules(config, family)
    norms = {module: ("hidden", layer, module) for layer, module in family.taps_of(config)["hidden"]}
    taps = norms | projections
    taps |= {alias: taps[module] for module in taps for alias in _aliases(family, module)}
    if names:
        _check_moments(moments, plan, norms, projections)
    biased = frozenset(module for module in taps if f"{module}.bias" in parameters_of(config))
    rows = family.stored_rows(family.rows_of(config))
    return Corrections(
        moments, names, taps, frozenset(norms), biased, rows, plan, family.norm_offset_of(config), rotation, gaps
    )


def corrected_modules(config: PreTrainedConfig, family: Family) -> dict[str, tuple[str, int | None, str]]:
    """Return the projections that can be corrected: the axis that each reads, its layer, where its moments are stored."""
    found = {
        module: (axis, layer, module)
        for axis, places in family.taps_of(config).items()
        if axis in ("ffn", "dense_ffn", "shared_ffn", "heads")
        for layer, module in places
        if not module.endswith(".experts")
    }
    return found | {module: ("hidden", *place) for module, place in family.readers_of(config).items()}


def _check_moments(moments: Path, plan: Plan, norms: Mapping[str, tuple], projections: Mapping[str, tuple]) -> None:
    """Refuse moments that lack something, or are those of another model."""
    wanted: dict[int | None, dict[str, int]] = {}
    for _, layer, stored in [*norms.values(), *projections.values()]:
        wanted.setdefault(layer, {})[stored] = 1 if stored in norms else 2
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
