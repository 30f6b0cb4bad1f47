"""Sizes that differ from layer to layer: what every size of a layer's MLP and attention would cost, and the best for a budget.

An error curve says the relative error of a projection's output at several sizes after least squares; removing the whole
sublayer tells what that output is worth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.student import axes_by_layer, listed_by_layer
from hf_minitron.checkpoint.tensors import Tensors
from hf_minitron.plan import Plan, make_nonuniform_plan
from hf_minitron.pruning.allocate import allocate
from hf_minitron.pruning.reconstruction import RIDGE, least_squares, solver_device
from hf_minitron.ranking import best_in_layer
from hf_minitron.shape import Shape
from hf_minitron.sizes import SIZES_OF
from hf_minitron.statistics import Statistics

STEPS = 8  # widths of an MLP that are tried, beside none


@dataclass(frozen=True)
class Choice:
    """One size of one sublayer.

    Args:
        sizes (`Mapping[str, int]`): `ffn`, or `heads` and `kv_heads`; 0 for none.
        relative_error (`float`): Share of the projection's output energy that is missing, from 0 to 1.
    """

    sizes: Mapping[str, int]
    relative_error: float


def error_curves(
    tensors: Tensors,
    statistics: Statistics,
    steps: int = STEPS,
    ridge: float = RIDGE,
    by_layer: Sequence[str] | None = None,
) -> dict[tuple[str, int], list[Choice]]:
    """Return, for the MLP and the attention of every layer, the sizes that it may have and what each loses.

    Args:
        tensors (`Tensors`): The teacher's; of a model without experts.
        statistics (`Statistics`): Importance of every index, and moments.
        steps (`int`, *optional*, defaults to 8): Widths of an MLP, evenly spaced, beside none.
        ridge (`float`, *optional*, defaults to `RIDGE`): That of the corrections.
        by_layer (`Sequence[str]`, *optional*): As for `axes_by_layer`.

    Returns:
        `dict`: `("ffn", layer)` and `("heads", layer)` to choices, the smallest first.
    """
    architecture = tensors.architecture
    before, scores, moments = architecture.shape, statistics.scores, statistics.moments
    curves: dict[tuple[str, int], list[Choice]] = {}
    chosen = axes_by_layer(architecture, by_layer)
    places = [(axis, layer, name) for axis in chosen for layer, name in architecture.taps(axis)]
    for axis, layer, name in tqdm(places, desc="Error curves", unit="sublayer"):
        position, dim = architecture.weights[name].dim_of(axis)
        moment = moments[name][:-1].to(solver_device(), torch.float64)
        weight = tensors.read(f"{name}.weight").to(moment).movedim(position, -1)
        whole = ((weight @ moment) * weight).sum()
        own = before.of_layer(layer)
        every = _sizes(own, axis, steps)
        choices = [] if listed_by_layer(architecture) else [Choice(dict.fromkeys(every[0], 0), 1.0)]
        for sizes in every:
            kept = best_in_layer(scores, before, layer, sizes)
            index = axes.dim_index(dim, {axis: torch.tensor(kept[axis])}, own.sizes)
            rest = weight.clone()
            rest[:, index] -= least_squares(weight, moment, index, ridge)
            choices.append(Choice(sizes, (((rest @ moment) * rest).sum() / whole).clamp(min=0).item()))
        curves[axis, layer] = choices
    return curves


def sublayer_parameters(architecture: Architecture, sizes: Mapping[str, int]) -> int:
    """Count the parameters of a sublayer, its norm included.

    Args:
        architecture (`Architecture`): The teacher's.
        sizes (`Mapping[str, int]`): `ffn`, or `heads` and `kv_heads`; 0 for none.
    """
    axis, every = "ffn" if "ffn" in sizes else "heads", {**architecture.shape.sizes, **sizes}
    if not sizes[axis]:
        return 0
    first, _ = architecture.taps(axis)[0]  # a layer that has one
    parts = [p for p in architecture.parameters.values() if p.layer == first and architecture.sublayer(p) == axis]
    return sum(math.prod(axes.tensor_shape(parameter.pattern, every)) for parameter in parts)


def layer_parameters(architecture: Architecture, sizes: Mapping[str, int]) -> int:
    """Count the parameters of a layer, both of its sublayers, with the sizes that `sizes` has."""
    return sum(
        sublayer_parameters(architecture, {axis: sizes[axis] for axis in part if axis in sizes}) for part in SIZES_OF.values()
    )


def least_parameters(architecture: Architecture, by_layer: Sequence[str]) -> int:
    """Count the parameters of all layers that no choice of sizes by layer takes away."""
    shape, absent = architecture.shape, not listed_by_layer(architecture)

    def least(own: Mapping[str, int], axis: str) -> Mapping[str, int]:
        if axis not in by_layer:
            return {key: own[key] for key in SIZES_OF[axis] if key in own}
        return {axis: 0 if absent else own[axis] // STEPS}

    layers = map(shape.at, range(shape["layers"]))
    return sum(sublayer_parameters(architecture, least(own, axis)) for own in layers for axis in SIZES_OF)


def allocate_layers(
    curves: Mapping[tuple[str, int], Sequence[Choice]],
    sublayer_costs: Mapping[str, Tensor],
    architecture: Architecture,
    parameters: int,
) -> dict[str, list[int]]:
    """Spend a budget of parameters so that the losses add up to the least.

    What a size costs in quality is taken as the relative error times what the whole sublayer is worth.

    Args:
        curves (`Mapping`): From `error_curves`.
        sublayer_costs (`Mapping[str, Tensor]`): `heads` and `ffn`, from `statistics.sublayer_costs`.
        architecture (`Architecture`): The teacher's.
        parameters (`int`): Budget for all sublayers together: the body without the last norm.

    Returns:
        `dict[str, list[int]]`: `heads`, `kv_heads` and `ffn`, those of `curves`, for `make_nonuniform_plan`.
    """
    # what a removal seems to gain is noise, but it always costs a little
    worth = {(axis, layer): max(float(sublayer_costs[axis][layer]), 1e-6) for axis, layer in curves}
    options = {
        place: [(sublayer_parameters(architecture, choice.sizes), choice.relative_error * worth[place]) for choice in choices]
        for place, choices in curves.items()
    }
    shape, by_layer = architecture.shape, {axis for axis, _ in curves}
    fixed = [part for axis, part in SIZES_OF.items() if axis not in by_layer]
    for own in map(shape.at, range(shape["layers"])):  # what stays as it is
        parameters -= sum(
            sublayer_parameters(architecture, {axis: own[axis] for axis in part if axis in own}) for part in fixed
        )
    chosen = allocate(options, parameters)
    differing = [key for axis in by_layer for key in SIZES_OF[axis] if key in shape.sizes]
    sizes: dict[str, list[int]] = {axis: [0] * shape["layers"] for axis in differing}
    for (axis, layer), place in chosen.items():
        for key, size in curves[axis, layer][place].sizes.items():
            sizes[key][layer] = size
    return sizes


def nonuniform_plan(
    tensors: Tensors,
    statistics: Statistics,
    parameters: int,
    by_layer: Sequence[str] | None = None,
) -> Plan:
    """Return the plan with the least expected loss among those whose sublayers have at most so many parameters.

    Args:
        tensors (`Tensors`): The teacher's; of a model without experts.
        statistics (`Statistics`): Importance, moments and sublayer costs.
        parameters (`int`): Of all sublayers together.
        by_layer (`Sequence[str]`, *optional*): As for `axes_by_layer`.
    """
    curves, architecture = error_curves(tensors, statistics, by_layer=by_layer), tensors.architecture
    sizes = allocate_layers(curves, statistics.sublayer_costs, architecture, parameters)
    return make_nonuniform_plan(statistics.scores, architecture.shape, sizes)


def _sizes(before: Shape, axis: str, steps: int) -> list[dict[str, int]]:
    """Return the sizes that a sublayer may have beside none: even steps of an MLP; fewer KV groups, or fewer heads in each."""
    if axis == "ffn":
        return [{"ffn": before["ffn"] * step // steps} for step in range(1, steps + 1)]
    group, groups = before["heads"] // before.kv_groups, before.kv_groups
    pairs = {(n * group, n) for n in range(1, groups + 1)} | {(groups * n, groups) for n in range(1, group + 1)}
    if "kv_heads" not in before.sizes:
        return [{"heads": heads} for heads in sorted({heads for heads, _ in pairs})]
    return [{"heads": heads, "kv_heads": kv_heads} for heads, kv_heads in sorted(pairs)]
