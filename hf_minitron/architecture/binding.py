"""Binding a family to a model: which row every parameter matches, the size of every axis, and what fits no row."""

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from hf_minitron import axes
from hf_minitron.architecture.config import text_config
from hf_minitron.architecture.family import FAMILIES, Family
from hf_minitron.architecture.nonuniform import sizes_by_layer
from hf_minitron.architecture.outline import Outline
from hf_minitron.architecture.refused import MISSING
from hf_minitron.architecture.vision import Tower
from hf_minitron.shape import Shape
from hf_minitron.sizes import AXES, largest

LONGEST = 260  # characters of what a refusal lists, beside the rest of five lines
# The axes that a norm inside of attention or an MLP may see.
INNER = {"heads", "kv_heads", "ffn"}

# Name of a parameter to its row, and what the placeholders of the row stand for.
Matches = Mapping[str, tuple[str, dict[str, int]]]


@dataclass(frozen=True)
class Parameter:
    """One parameter, or a part of it that checkpoints store by itself.

    Args:
        name (`str`): Its full name.
        shape (`tuple[int, ...]`): Its shape.
        row (`str`): The row of the family that it matches.
        pattern (`str`): The axes of its dimensions.
        indices (`Mapping[str, int]`): What the placeholders of the row stand for.
        role (`str`): What it does, see `hf_minitron.architecture.roles`.
        module (`str`): The module in memory that it belongs to.
        kind (`str`): Its name in that module, such as `weight`.
    """

    name: str
    shape: tuple[int, ...]
    row: str
    pattern: str
    indices: Mapping[str, int]
    role: str
    module: str
    kind: str

    @classmethod
    def of(cls, family: Family, name: str, shape: tuple[int, ...], row: str, indices: Mapping[str, int]) -> "Parameter":
        """Return a parameter that matches a row of a family."""
        module, _, kind = name.rpartition(".")
        return cls(name, shape, row, family.rows[row], indices, family.role(row), module, kind)

    @property
    def dims(self) -> tuple[axes.Dim, ...]:
        """The axes of every dimension."""
        return axes.parse(self.pattern)

    @property
    def layer(self) -> int | None:
        """The layer; `None` outside of the layers."""
        return axes.layer_index(self.indices)

    @property
    def expert(self) -> int | None:
        """The expert of a part that belongs to one."""
        return self.indices.get("experts")

    def dim_of(self, axis: str) -> tuple[int, axes.Dim]:
        """Return the position and the axes of the dimension that holds an axis."""
        return next((at, dim) for at, dim in enumerate(self.dims) if axis in axes.dim_names(dim))


@dataclass(frozen=True)
class Read:
    """What a module is given: the axis of its input, its layer, and the name under which moments of that input are stored.

    `<norm>.output` and `<projection>.input` name the normalised hidden states; of a projection of other axes it is the module.
    """

    axis: str
    layer: int | None
    moment: str


def within(family: Family, tower: Tower, model: Outline) -> Family:
    """Return the family of a vision-language model: that of its text model, under its prefix, and a row for all else."""
    prefix = f"{tower.prefix}."

    def moved(row: str) -> str:
        return re.sub(r"^model\.", prefix, row)

    rows = {moved(row): pattern for row, pattern in family.rows.items()}
    outside = {
        name: _filled(axes.match(name, tower.rows), tower.rows, shape)
        for name, shape in model.parameters.items()
        if not name.startswith(prefix) and not axes.match(name, rows)
    }
    return replace(
        family,
        rows=rows | outside,
        norms=tuple(map(moved, family.norms)),
        stored={moved(row): {moved(part): p for part, p in parts.items()} for row, parts in family.stored.items()},
        fixed={**family.fixed, **tower.fixed},
        tower=tower,
        outside=outside,
    )


def _filled(match: tuple[str, dict] | None, rows: Mapping[str, str], shape: tuple[int, ...]) -> str:
    """Return a pattern with the sizes of the dimensions that stay as they are."""
    tokens = rows[match[0]].split() if match else ["_"] * len(shape)
    return " ".join(str(size) if token == "_" else token for token, size in zip(tokens, shape, strict=True))


def inner_norms(parameters: Iterable[Parameter]) -> dict[str, Parameter]:
    """Return the weights of the norms that see all heads or FFN channels of a layer together, by their modules."""
    vectors = (p for p in parameters if p.kind == "weight" and len(p.dims) == 1 and p.role != "norm")
    return {p.module: p for p in vectors if INNER & axes.dim_names(p.dims[0])}


def match_rows(family: Family, model: Outline) -> Matches:
    """Return the row of every parameter that has one."""
    config = text_config(model.config)
    kinds = {kind: (getattr(config, key, None), values) for kind, (key, values) in family.kinds.items()}

    def of_kind(places: Mapping[str, int]) -> bool:
        found = ((kinds[place], layer) for place, layer in places.items() if place in kinds)
        return all((entries[layer] if entries else None) in values for (entries, values), layer in found)

    found = {name: next((m for m in axes.matches(name, family.rows) if of_kind(m[1])), None) for name in model.parameters}
    return {name: match for name, match in found.items() if match}


def shape_of(family: Family, model: Outline, matches: Matches) -> Shape:
    """Read the size of every axis from a config, and of fixed axes from the shapes of the parameters."""
    keys = {axis: key for axis, key in family.config_keys.items() if axis not in family.from_parameters}
    config = text_config(model.config)
    found = {axis: _read(config, key) if isinstance(key, str) else key for axis, key in keys.items()}
    sizes = {axis: size for axis, size in found.items() if type(size) is int}
    used, indices = [], {}
    for name, (row, places) in matches.items():
        used.append((axes.parse(family.rows[row]), model.parameters[name]))
        for axis, index in places.items():
            indices.setdefault(axis, set()).add(index)
    kinds = {kind: tuple(sorted(found)) for kind, found in indices.items() if kind.endswith("_layers")}
    listed = {kind: getattr(config, key, None) or () for kind, (key, _) in family.kinds.items()}
    listed = {kind: tuple(at for at, own in enumerate(listed[kind]) if own in family.kinds[kind][1]) for kind in listed}
    kinds = {kind: layers for kind, layers in listed.items() if layers} | kinds
    by_layer = {} if family.head_sizes else sizes_by_layer(config, keys)  # there kinds of layers differ, by the tables
    sizes |= largest(by_layer)
    sizes |= {kind: len(layers) for kind, layers in kinds.items()}
    # placeholders that are no axes: how many tensors a row with them has, which no cut changes
    counts = {axes.placeholders(row): count for row, count in Counter(row for row, _ in matches.values()).items()}
    sizes |= {" ".join(places): count for places, count in counts.items() if not sizes.keys() >= {*places, "layers"}}
    for _ in range(3):  # a size that is solved may help to solve another
        for dims, shape in used:
            for dim, size in zip(dims, shape, strict=False):
                if solved := axes.unknown_size(dim, size, sizes):
                    sizes.setdefault(*solved)
    present = {"layers", *indices}.union(*(axes.dim_names(dim) for dims, _ in used for dim in dims))
    sizes = {axis: size for axis, size in sizes.items() if axis in present or axis not in AXES}
    period = math.lcm(*(getattr(config, key) for key in family.periods))
    if family.periods and sizes["layers"] % period == 0 and sizes["layers"] > period:
        sizes["layer_period"] = period
    # shared experts are one MLP of so many times an expert's width
    coupled = {**family.coupled, **({"shared_ffn": "ffn"} if "shared_experts" in sizes else {})}
    coupled = {axis: leader for axis, leader in coupled.items() if {axis, leader} <= sizes.keys()}
    fixed = {axis: why for axis, why in family.fixed.items() if axis in sizes}
    kept = {
        "reused": family.reused,
        "states": family.states,
        "caches": family.caches,
        "head_sizes": family.head_sizes,
        "by_layer": by_layer,
    }
    return Shape(sizes, kinds, coupled, windows=_windows(config, sizes, kinds), fixed=fixed, **kept)


def _windows(config: PreTrainedConfig, sizes: Mapping[str, int], kinds: Mapping[str, Sequence[int]]) -> tuple[int | None, ...]:
    """Return how many tokens the attention of each layer sees and keeps: `None` for all, 0 where there is none."""
    window = _read(config, "sliding_window") or _read(config, "attention_chunk_size")
    types = _read(config, "layer_types") or ["sliding_attention" if window else "full_attention"] * sizes["layers"]
    attention = kinds.get("attention_layers", range(sizes["layers"]) if "heads" in sizes else ())
    narrow = {layer for layer, kind in enumerate(types) if window and kind in ("sliding_attention", "chunked_attention")}
    return tuple((window if layer in narrow else None) if layer in attention else 0 for layer in range(sizes["layers"]))


def misfits(family: Family, model: Outline, matches: Matches, shape: Shape) -> dict[str, str]:
    """Return what is wrong with each parameter that has no row, or another shape than its row says; empty if none is."""
    problems = {}
    counts = Counter(row for row, _ in matches.values() if axes.placeholders(row) == ("layers",))
    for row, count in counts.items():
        if count < shape["layers"]:
            problems[row] = f"{row!r} stands in {count} of {shape['layers']} layers, but its row means all"
    for name, size in model.parameters.items():
        row, like = matches.get(name, (None,))[0], re.sub(r"\.\d+\.", ".{layers}.", name, count=1)
        names = set().union(*map(axes.dim_names, axes.parse(family.rows[row]))) if row else set()
        if row is None:
            problems[like] = f"{like!r} (shape {size}) has no row"
        elif names - shape.sizes.keys():
            missing = ", ".join(sorted(names - shape.sizes.keys()))
            problems[like] = f"{like!r} (shape {size}) has a size that neither config nor shape gives: {missing}"
        elif size != (expected := axes.tensor_shape(family.rows[row], shape.at(axes.layer_index(matches[name][1])))):
            problems[like] = f"{like!r} has shape {size}, but its row {family.rows[row]!r} means {expected}"
    return problems


def check_missing(model_type: str, families: Container[str]) -> None:
    """Refuse a model type of which it is known why it has no table; once it has one, it is as any other.

    Raises:
        AxisError: with what is missing.
    """
    if model_type in MISSING and model_type not in families:
        raise axes.AxisError(
            f"Model type {model_type!r} cannot be pruned: {MISSING[model_type]}. Choose a model type that docs/families.md "
            "lists, or write a family and register_family it (Architecture.bind(config).misfits lists the rows that it needs)"
        )


def advice(model_type: str, problems: Sequence[str]) -> str:
    """Say what a model type's parameters have that the families do not cover."""
    few = [problem for at, problem in enumerate(problems[:3]) if at == 0 or sum(map(len, problems[: at + 1])) < LONGEST]
    shown = ", ".join(few)
    if len(problems) > len(few):
        shown += f" and {len(problems) - len(few)} more (Architecture.bind(config).misfits lists them)"
    known = model_type in FAMILIES
    choose = "Choose another checkpoint of it" if known else "Choose a model type that docs/families.md lists"
    return (
        f"The axis map does not cover {'this variant of ' if known else ''}model type {model_type!r}: {shown}. {choose}, or "
        "write a family and register_family it (docs/families.md)"
    )


def _read(config: PreTrainedConfig, key: str) -> object:
    """Return a config's entry; of one that lists the same for every layer, that."""
    try:
        value = getattr(config, key, None)
    except Exception:  # a size that differs by layer, which transformers does not let be read at once
        return None
    return value[0] if isinstance(value, list) and value == value[:1] * len(value) else value
