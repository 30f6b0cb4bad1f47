"""Targets as shares: `50%` of an axis, or of all parameters, which is cut in hidden and FFN channels."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.student import check_target
from hf_minitron.errors import RecipeError
from hf_minitron.shape import ShapeError
from hf_minitron.stages.target import coarse, suited, teacher

# FFN channels are cut by this power of what hidden channels are cut by: in Llama-3.1-Minitron-4B-Width 9216 of 14336 stay
# beside 3072 of 4096 (2408.11796, table 3).
FFN_POWER = 1.5
CLOSE = 0.1  # a size with a single axis to cut is at most so far from the one that is wanted
TRIED = 50  # shapes near the size, of which a class shall hold one


def share_of(value: object, name: str) -> float:
    """Read a share such as `50%`.

    Raises:
        RecipeError: naming the setting, for what is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    if match is None or not 0 < float(match[1]) <= 100:
        raise RecipeError(f"{name}: {value!r} is not a share such as 50%, above 0 and at most 100%")
    return float(match[1]) / 100


def with_sizes(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe whose target has sizes in place of shares of the model's; the recipe itself where it has none."""
    prune = recipe.get("prune") or {}
    target = prune.get("target")
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
    return math.lcm(groups, shape.unit(axis), multiple_of.get(axis, 1))


def sizes_for(architecture: Architecture, share: float, multiple_of: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the sizes of hidden and FFN channels with which a share of the parameters stays; layers stay too, and so do heads
    where the class holds other hidden sizes with as many heads.

    Args:
        architecture (`Architecture`): The model's.
        share (`float`): Of all parameters.
        multiple_of (`Mapping[str, int]`, *optional*): Divisors of the sizes; what suits GPUs, and quantization, when left out.

    Raises:
        RecipeError: when no class holds a shape near that size.
    """
    shape = architecture.shape
    multiple_of = {axis: coarse(shape[axis]) for axis in ("hidden", "ffn") if axis in shape.sizes} | dict(multiple_of or {})
    wanted = share * shape.num_parameters(architecture.rows)
    for with_heads in (False, True):
        found = sorted(_near(architecture, wanted, multiple_of, with_heads), key=lambda item: item[0])
        for _, sizes in found[:TRIED]:
            try:
                check_target(architecture, shape.cut_to(sizes, multiple_of))
            except ShapeError:
                continue
            return sizes
    raise RecipeError(f"prune.target: {share:.0%} of the parameters cannot be kept by cutting hidden and FFN channels of this "
                      "model alone; give sizes, or a larger share")  # fmt: skip


def _near(
    architecture: Architecture, wanted: float, multiple_of: Mapping[str, int], with_heads: bool
) -> Iterator[tuple[float, dict[str, int]]]:
    """Yield sizes with about so many parameters, and how far their cuts are from what the paper did; with as many heads as fit
    side by side into the hidden size (GPT-2, OPT, Pythia), or with all of them."""
    shape, rows = architecture.shape, architecture.rows
    axes = [axis for axis in ("hidden", "ffn") if axis in shape.sizes and axis not in {**shape.fixed, **shape.coupled}]
    if not axes or with_heads and not ("hidden" in axes and {"heads", "head_dim"} <= shape.sizes.keys()):
        return
    steps, first, last = {axis: _unit(architecture, axis, multiple_of) for axis in axes}, axes[0], axes[-1]
    if with_heads:
        steps["hidden"] = math.lcm(steps["hidden"], shape["head_dim"] * _unit(architecture, "heads", multiple_of))

    def sizes_with(size: int, **more: int) -> dict[str, int]:
        sizes = {first: size} | ({"heads": size // shape["head_dim"]} if with_heads else {}) | more
        return {axis: n for axis, n in sizes.items() if n < shape[axis]}

    def parameters(sizes: Mapping[str, int]) -> int:
        return shape.cut_to(sizes).num_parameters(rows)

    most = shape[first] // steps[first] * steps[first] if with_heads else shape[first]
    for size in range(most, 0, -steps[first]):
        if len(axes) == 1:
            away = abs(parameters(sizes_with(size)) / wanted - 1)
            if away < CLOSE and size < shape[first]:
                yield away, sizes_with(size)
            continue
        few, many = (parameters(sizes_with(size, **{last: steps[last] * n})) for n in (1, shape[last] // steps[last]))
        count = round(1 + (wanted - few) / (many - few) * (shape[last] // steps[last] - 1)) if many > few else 1
        other = steps[last] * count
        if 0 < other <= shape[last] and (sizes := sizes_with(size, **{last: other})):
            yield abs(math.log(size / shape[first]) * FFN_POWER - math.log(other / shape[last])), sizes
