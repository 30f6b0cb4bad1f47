"""Sizes of axes: which axes there are, what groups of heads and routers need, and sizes that differ from layer to layer."""

import itertools
import math
from collections.abc import Mapping, Sequence

# The axes of the vocabulary, in the order in which they are shown. `ffn` is the inner width of the MLP, of every routed expert
# in a mixture of experts; `dense_ffn` that of a mixture's plain layers, `shared_ffn` that of its shared experts; `ssm_heads`
# are those of Mamba and the value heads of linear attention, `conv_channels` what a short convolution mixes; `kv_rank` and
# `q_rank` the narrow rows of multi-head latent attention.
AXES = ("layers", "hidden", "ffn", "dense_ffn", "shared_ffn", "experts", "heads", "kv_heads", "ssm_heads", "conv_channels",
        "head_dim", "kv_rank", "q_rank", "vocab")  # fmt: skip

# 2407.14679, section 2: depth (layers) and width (the others). `head_dim` stays as it is.
CUTTABLE = tuple(axis for axis in AXES if axis != "head_dim")

# Heads that share something: every group keeps as many of its own.
GROUPS = {"heads": ("kv_heads", "KV"), "ssm_heads": ("ssm_groups", "SSM")}

# Axes whose size may differ from layer to layer: those of each sublayer, by the axis that is 0 where it is absent.
SIZES_OF = {"heads": ("heads", "kv_heads"), "ffn": ("ffn",)}
BY_LAYER = tuple(axis for sizes in SIZES_OF.values() for axis in sizes)

# What the rows of a matrix divide by in quantized formats, and what a format does with others.
QUANTIZED = {
    32: "cannot be quantized to GGUF's Q8_0 and K-quants or by MLX",
    256: "cannot be a K-quant of GGUF (Q4_K_M takes Q5_0 in its place)",
}

LayerSizes = Mapping[str, Sequence[int]]


def selected(by_layer: LayerSizes, kept: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the sizes in some layers only; nothing where these do not differ and lack nothing."""
    found = {axis: tuple(sizes[layer] for layer in kept) for axis, sizes in by_layer.items()}
    return found if any(len(set(sizes)) > 1 or 0 in sizes for sizes in found.values()) else {}


def largest(by_layer: LayerSizes) -> dict[str, int]:
    """Return the largest size of every axis."""
    return {axis: max(sizes) for axis, sizes in by_layer.items()}


def limited(own: Mapping[str, int], limits: Mapping[str, int]) -> dict[str, int]:
    """Return a layer's sizes where none may be larger than a limit; every KV head keeps as many query heads.

    Example:

    ```python
    >>> limited({"heads": 4, "kv_heads": 2, "ffn": 40}, {"heads": 4, "kv_heads": 1, "ffn": 48})
    {'heads': 2, 'kv_heads': 1, 'ffn': 40}
    ```
    """
    sizes = {axis: min(own[axis], limits[axis]) for axis in BY_LAYER if axis in own}
    if sizes.get("kv_heads"):
        kept, group = sizes["kv_heads"], own["heads"] // own["kv_heads"]
        sizes["heads"] = kept * min(group, max(1, limits["heads"] // kept))
    return sizes


def head_problems(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Say which heads of a cut do not divide over what they share."""
    problems = []
    for axis, (inside, name) in GROUPS.items():
        if axis not in before:
            continue
        groups = after.get(inside, after[axis] if axis == "heads" else 1)
        group = before[axis] // (before.get(inside, before[axis]) if axis == "heads" else groups)
        if after[axis] % groups or after[axis] // groups > group:
            legal = ", ".join(str(groups * n) for n in range(1, group + 1))
            more = f", or cut {inside} as well" if inside in CUTTABLE else ""
            what = inside.removeprefix("ssm_").replace("kv_", "")
            problems.append(f"{axis}: {after[axis]} do not divide over {groups} {name} {what}; every {name} group keeps "
                            f"the same 1 to {group} of its {group} heads. Use one of {legal}{more}")  # fmt: skip
    return problems


def number_problems(axis: str, size: object, most: int) -> list[str]:
    """Say why something is no size of an axis that has so many entries; nothing where it is one."""
    if isinstance(size, Sequence | Mapping) and not isinstance(size, str):
        why = "no class holds layers with different numbers of them" if axis == "experts" else "a cut has one for all layers"
        return [f"{axis}: {size!r} is a size for each layer, but {why}; give one size from 1 to {most}"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        return [f"{axis}: {size!r} is not a whole number from 1 to {most}"]
    if size > most:
        return [f"{axis}: {size} is larger than the model's {most}; pruning only makes a model smaller"]
    return []


def divisor_problems(axis: str, size: int, most: int, divisor: int) -> list[str]:
    """Say which sizes near one are multiples of a divisor; nothing where it is one itself."""
    if size % divisor == 0:
        return []
    near = sorted({n for n in (size // divisor * divisor, -(-size // divisor) * divisor) if 0 < n <= most})
    return [f"{axis}: {size} is not a multiple of {divisor}; nearest: {', '.join(map(str, near))} (or change multiple_of)"]


def not_quantized(size: int, unit: int, most: float = math.inf) -> str:
    """Say what quantized formats do with a size that one of `QUANTIZED` does not divide, and which sizes near it do.

    Example:

    ```python
    >>> not_quantized(504, 256)[-16:]
    ' take 256 or 512'
    ```
    """
    near = " or ".join(str(n) for n in (size // unit * unit, size // unit * unit + unit) if 0 < n <= most)
    return f"{size} does not divide by {unit}, so weights with rows of it {QUANTIZED[unit]}: take {near}"


def expert_problems(sizes: Mapping[str, int]) -> list[str]:
    """Say what a router cannot do with a number of experts."""
    if "experts" not in sizes:
        return []
    groups, per_token = sizes.get("expert_groups", 1), sizes["experts_per_token"]
    in_reach = sizes.get("groups_per_token", 1) / groups  # a router with groups looks into some of them only

    def fits(experts: int) -> bool:  # it ranks its groups by their two best experts
        return experts % groups == 0 and experts * in_reach >= per_token and (groups == 1 or experts >= 2 * groups)

    if fits(sizes["experts"]):
        return []
    least = next(n for n in itertools.count(groups, groups) if fits(n))
    step = f", a multiple of {groups}" if groups > 1 else ""
    return [
        f"experts: {sizes['experts']} cannot serve a router that sends every token to {per_token} of them; "
        f"use {least} or more{step}"
    ]
