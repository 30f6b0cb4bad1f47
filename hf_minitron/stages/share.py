"""Targets as shares: `50%` of an axis, or of all parameters: hidden and FFN channels are cut, of a mixture its experts."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.student import check_target
from hf_minitron.errors import RecipeError
from hf_minitron.shape import Shape, ShapeError
from hf_minitron.stages.target import EXPERTS, MULTIPLE_OF, UNITS, coarse, suited, teacher

# FFN channels are cut by this power of what another axis is cut by. In Llama-3.1-Minitron-4B-Width 9216 of 14336 stay beside
# 3072 of 4096 hidden channels (2408.11796, table 3). The experts of a mixture are cut first, whole ones.
FFN_POWER = {"hidden": 1.5, "experts": 0.0}
# What stays of an axis at least: half of the experts, as far as REAP has gone (2510.13999); a quarter of the channels.
LEAST = {"experts": 0.5, "hidden": 0.25, "ffn": 0.25}
HEADS = math.log(2)  # heads stay, unless FFN channels were to be cut more than twice as deep as those of the paper
CLOSE = 0.03  # of all parameters: how far from the share that is asked for
TRIED = 50  # shapes near the size, of which a class shall hold one


def share_of(value: object, name: str) -> float:
    """Read a share such as `50%`.

    Raises:
        RecipeError: naming the setting, for what is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    if match is None or not 0 < float(match[1]) <= 100:
        raise RecipeError(f"{name}: {value!r} is not a share such as 50%, above 0 and at most 100%{_meant(value)}")
    return float(match[1]) / 100


def _meant(value: object) -> str:
    """Return the share that a number without a percent sign means, as a hint; nothing for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    share = number * 100 if 0 < number < 1 else number
    return f"; did you mean {share:g}%?" if 1 < share < 100 else ""


def with_sizes(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe whose target has sizes in place of shares of the model's; the recipe itself where it has none."""
    prune = recipe.get("prune") or {}
    target = prune.get("target")
    for name, value in target.items() if isinstance(target, Mapping) else [("", target)]:
        if type(value) is float and 0 < value < 1 or not name and type(value) is int:
            share_of(value, ".".join(filter(None, ("prune.target", str(name)))))  # refused, with the share that it means
    if not isinstance(target, str | Mapping) or not _has_share(target):
        return recipe
    architecture = teacher(str(recipe["model"]), bool(prune.get("dequantize")))
    multiple_of = prune.get("multiple_of", suited(architecture.shape))
    if isinstance(target, str):
        sizes = sizes_for(architecture, share_of(target, "prune.target"), multiple_of)
    else:
        sizes = {axis: _size(architecture, axis, value, multiple_of) for axis, value in target.items()}
    return {**recipe, "prune": {**prune, "target": sizes}}


def _has_share(target: str | Mapping) -> bool:
    values = [target] if isinstance(target, str) else target.values()
    return any(isinstance(value, str) and "%" in value for value in values)


def _size(architecture: Architecture, axis: str, value: object, multiple_of: Mapping[str, int]) -> object:
    """Return the legal size nearest to a share of an axis."""
    shape = architecture.shape
    if not isinstance(value, str) or axis not in shape.sizes:
        return value  # refused where it is used
    unit = _unit(architecture, axis, multiple_of)
    return max(unit, round(share_of(value, f"prune.target.{axis}") * shape[axis] / unit) * unit)


def _unit(architecture: Architecture, axis: str, multiple_of: Mapping[str, int]) -> int:
    shape = architecture.shape
    groups = shape.kv_groups if axis == "heads" and shape["heads"] > shape.kv_groups else 1
    groups = shape.sizes.get("expert_groups", 1) if axis == "experts" else groups
    return math.lcm(groups, shape.unit(axis), multiple_of.get(axis, 1))


def sizes_for(architecture: Architecture, share: float, multiple_of: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return sizes with which about a share of the parameters stays.

    Of hidden and FFN channels, and of heads where the class ties them to hidden; of a mixture's experts, and of their FFN
    channels where that is not enough.

    Args:
        architecture (`Architecture`): The model's.
        share (`float`): Of all parameters; what is found is within `CLOSE` of it.
        multiple_of (`Mapping[str, int]`, *optional*): Divisors of the sizes; what suits GPUs, and quantization, when left out.

    Raises:
        RecipeError: with the nearest share that can be kept, when no class holds a shape near that size.
    """
    multiple_of = divisors(architecture.shape) | dict(multiple_of or {})
    if sizes := _found(architecture, share, multiple_of):
        return sizes
    others = sorted((percent / 100 for percent in range(5, 100, 5)), key=lambda other: abs(other - share))
    near = next((other for other in others if _found(architecture, other, multiple_of)), None)
    axes = _axes(architecture)
    stay = f", of which at least {' and '.join(f'{LEAST[axis]:.0%} of {axis}' for axis in axes)} stay" if axes else ""
    advice = f"take {near:.0%}, or give sizes, of layers too" if near else "give sizes"
    raise RecipeError(f"prune.target: {100 * share:g}% of this model's parameters cannot be kept by cutting "
                      f"{' and '.join(axes) or 'width'}{stay}; {advice}")  # fmt: skip


def divisors(shape: Shape) -> dict[str, int]:
    """Return what the sizes that a share of all parameters leads to are multiples of."""
    units = {axis: coarse(shape[axis], EXPERTS if axis == "experts" else UNITS) for axis in LEAST if axis in shape.sizes}
    return {axis: max(unit, MULTIPLE_OF.get(axis, 1)) for axis, unit in units.items()}


def _found(architecture: Architecture, share: float, multiple_of: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes with about a share of the parameters that a class holds; none where there are none."""
    shape = architecture.shape
    best, nearest = {}, math.inf
    for with_heads in (False, True):
        for away, _, sizes in sorted(_near(architecture, share, multiple_of, with_heads), key=lambda item: item[:2])[:TRIED]:
            if away + with_heads * HEADS >= nearest:
                break
            try:
                check_target(architecture, shape.cut_to(sizes, multiple_of))
            except ShapeError:
                continue
            best, nearest = sizes, away
            break
    return best


def _axes(architecture: Architecture) -> list[str]:
    """Return the axes that a share of all parameters is cut in, of which there are one or two."""
    shape = architecture.shape
    free = [axis for axis in LEAST if axis in shape.sizes and axis not in {**shape.fixed, **shape.coupled}]
    return [axis for axis in free if not (axis == "hidden" and "experts" in free)]


def _near(
    architecture: Architecture, share: float, multiple_of: Mapping[str, int], with_heads: bool
) -> Iterator[tuple[float, float, dict[str, int]]]:
    """Yield how far sizes are from the cuts of the papers, how far from the share, and the sizes.

    With as many heads as fit side by side into the hidden size (GPT-2, OPT, Pythia), or with all of them.
    """
    shape, rows, axes = architecture.shape, architecture.rows, _axes(architecture)
    if not axes or with_heads and not ("hidden" in axes and {"heads", "head_dim"} <= shape.sizes.keys()):
        return
    steps, first, last = {axis: _unit(architecture, axis, multiple_of) for axis in axes}, axes[0], axes[-1]
    if with_heads:
        steps["hidden"] = math.lcm(steps["hidden"], shape["head_dim"] * _unit(architecture, "heads", multiple_of))

    def sizes_with(size: int, **more: int) -> dict[str, int]:
        sizes = {first: size} | ({"heads": size // shape["head_dim"]} if with_heads else {}) | more
        return {axis: n for axis, n in sizes.items() if n < shape[axis]}

    def kept(sizes: Mapping[str, int]) -> float:
        try:
            return shape.cut_to(sizes).num_parameters(rows) / shape.num_parameters(rows)
        except ShapeError:  # too few experts for the router
            return math.inf

    def solved(size: int) -> dict[str, int]:
        top = shape[last] // steps[last]
        few, many = (kept(sizes_with(size, **{last: steps[last] * n})) for n in (least[last], top))
        count = round(least[last] + (share - few) / (many - few) * (top - least[last])) if many > few else top
        return {last: steps[last] * min(max(count, least[last]), top)}

    least = {axis: math.ceil(LEAST[axis] * shape[axis] / steps[axis]) for axis in axes}
    most = shape[first] // steps[first] * steps[first] if with_heads else shape[first]
    power = FFN_POWER[first] if len(axes) == 2 else 0.0
    for size in range(most, least[first] * steps[first] - 1, -steps[first]):
        for more in ({}, solved(size)) if len(axes) == 2 else ({},):
            sizes = sizes_with(size, **more)
            if sizes and (off := abs(kept(sizes) - share)) <= CLOSE:
                deep = math.log(more.get(last, shape[last]) / shape[last])
                yield abs(math.log(size / shape[first]) * power - deep), off, sizes
