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
from hf_minitron.architecture.config import text_config
from hf_minitron.architecture.nonuniform import sizes_in_lists
from hf_minitron.checkpoint.tensors import Tensors
from hf_minitron.plan import Plan, make_nonuniform_plan
from hf_minitron.pruning.allocate import allocate
from hf_minitron.pruning.reconstruction import RIDGE, least_squares, solver_device
from hf_minitron.ranking import best_in_layer
from hf_minitron.shape import Shape
from hf_minitron.sizes import BY_LAYER
from hf_minitron.statistics import Statistics


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
    steps: int = 8,
    ridge: float = RIDGE,
) -> dict[tuple[str, int], list[Choice]]:
    """Return, for the MLP and the attention of every layer, the sizes that it may have and what each loses.

    Args:
        tensors (`Tensors`): The teacher's; of a model without experts.
        statistics (`Statistics`): Importance of every index, and moments.
        steps (`int`, *optional*, defaults to 8): Widths of an MLP, evenly spaced, beside none.
        ridge (`float`, *optional*, defaults to `RIDGE`): That of the corrections.

    Returns:
        `dict`: `("ffn", layer)` and `("heads", layer)` to choices, the smallest first.
    """
    architecture = tensors.architecture
    before, scores, moments = architecture.shape, statistics.scores, statistics.moments
    curves: dict[tuple[str, int], list[Choice]] = {}
    listed = _listed(architecture)
    places = [(axis, layer, name) for axis in listed or ("heads", "ffn") for layer, name in architecture.taps(axis)]
    for axis, layer, name in tqdm(places, desc="Error curves", unit="sublayer"):
        position, dim = architecture.weights[name].dim_of(axis)
        moment = moments[name][:-1].to(solver_device(), torch.float64)
        weight = tensors.read(f"{name}.weight").to(moment).movedim(position, -1)
        whole = ((weight @ moment) * weight).sum()
        own = before.of_layer(layer)
        every = _sizes(own, axis, steps)
        choices = [] if listed else [Choice(dict.fromkeys(every[0], 0), 1.0)]
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
        sublayer_parameters(architecture, {axis: sizes[axis] for axis in part if axis in sizes})
        for part in (("heads", "kv_heads"), ("ffn",))
    )


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
        `dict[str, list[int]]`: `heads`, `kv_heads` and `ffn`, for `make_nonuniform_plan`.
    """
    # what a removal seems to gain is noise, but it always costs a little
    worth = {(axis, layer): max(float(sublayer_costs[axis][layer]), 1e-6) for axis, layer in curves}
    options = {
        place: [(sublayer_parameters(architecture, choice.sizes), choice.relative_error * worth[place]) for choice in choices]
        for place, choices in curves.items()
    }
    shape, listed = architecture.shape, _listed(architecture)
    if listed:  # the rest stays as it is
        parameters -= sum(
            sublayer_parameters(architecture, {axis: own[axis] for axis in ("heads", "kv_heads") if axis in own})
            for own in map(shape.at, range(shape["layers"]))
        )
    chosen = allocate(options, parameters)
    sizes: dict[str, list[int]] = {axis: [0] * shape["layers"] for axis in listed or BY_LAYER if axis in shape.sizes}
    for (axis, layer), place in chosen.items():
        for key, size in curves[axis, layer][place].sizes.items():
            sizes[key][layer] = size
    return sizes


def nonuniform_plan(
    tensors: Tensors,
    statistics: Statistics,
    parameters: int,
) -> Plan:
    """Return the plan with the least expected loss among those whose sublayers have at most so many parameters."""
    curves, architecture = error_curves(tensors, statistics), tensors.architecture
    sizes = allocate_layers(curves, statistics.sublayer_costs, architecture, parameters)
    return make_nonuniform_plan(statistics.scores, architecture.shape, sizes)


def _listed(architecture: Architecture) -> tuple[str, ...]:
    """Return the axes whose sizes the stock class lists by layer, which are the only ones that may differ then."""
    return tuple(sizes_in_lists(text_config(architecture.config), architecture.family.config_keys))


def _sizes(before: Shape, axis: str, steps: int) -> list[dict[str, int]]:
    """Return the sizes that a sublayer may have beside none: even steps of an MLP; fewer KV groups, or fewer heads in each."""
    if axis == "ffn":
        return [{"ffn": before["ffn"] * step // steps} for step in range(1, steps + 1)]
    group, groups = before["heads"] // before.kv_groups, before.kv_groups
    pairs = {(n * group, n) for n in range(1, groups + 1)} | {(groups * n, groups) for n in range(1, group + 1)}
    if "kv_heads" not in before.sizes:
        return [{"heads": heads} for heads in sorted({heads for heads, _ in pairs})]
    return [{"heads": heads, "kv_heads": kv_heads} for heads, kv_heads in sorted(pairs)]
