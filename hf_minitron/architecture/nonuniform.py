"""Layers of different sizes: what a config says of them, which rows some layers lack, and whether a class holds them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedConfig

from hf_minitron import axes
from hf_minitron.architecture.config import text_config
from hf_minitron.architecture.family import Family
from hf_minitron.architecture.outline import Outline, outline
from hf_minitron.errors import one_line
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.modeling.layer_schemas import FFN, HEADS, KV_HEADS
from hf_minitron.modeling.layer_schemas import LIST_OF as LARGEST
from hf_minitron.modeling.modeling_pruned import ATTENTION, MLP, norms_of
from hf_minitron.shape import Shape
from hf_minitron.sizes import BY_LAYER, selected

# A sublayer by the axis that is 0 where it is absent, and the kind of the layers that have one where some lack it.
SUBLAYERS = {"heads": ATTENTION, "ffn": MLP}
KINDS = {"heads": "attention_layers", "ffn": "mlp_layers"}
# transformers' key for what single layers have of their own.
PER_LAYER = "per_layer_config"
LIST_OF = {"heads": HEADS, "kv_heads": KV_HEADS, "ffn": FFN}


def sizes_by_layer(config: PreTrainedConfig, keys: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Read the sizes of a config whose layers differ in some; nothing of others.

    Args:
        config (`PreTrainedConfig`): Of the text model.
        keys (`Mapping[str, str]`): Axis to its key in `config.json`.
    """
    if isinstance(config, PrunedConfig):
        return selected(
            {axis: tuple(getattr(config, LIST_OF[axis])) for axis in LIST_OF if axis in keys}, range(config.num_hidden_layers)
        )
    if listed := sizes_in_lists(config, keys):
        return selected(listed, range(config.num_hidden_layers))
    if not config.is_heterogeneous:
        return {}
    layers = list(config.per_layer_config)
    known = [axis for axis in BY_LAYER if axis in keys and hasattr(layers[0], keys[axis])]
    return selected({axis: tuple(getattr(own, keys[axis]) for own in layers) for axis in known}, range(len(layers)))


def sizes_in_lists(config: PreTrainedConfig, keys: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the sizes that a config lists with an item for every layer (Gemma 3n's widths of MLPs)."""
    listed = () if config.is_heterogeneous else BY_LAYER  # one says it otherwise
    found = {axis: getattr(config, keys[axis], None) for axis in listed if isinstance(keys.get(axis), str)}
    return {axis: tuple(sizes) for axis, sizes in found.items() if isinstance(sizes, list)}


@lru_cache(maxsize=64)
def sublayers(model: Outline) -> dict[str, str]:
    """Return the parts of a layer that go with its attention (`heads`) or its MLP (`ffn`), to that: these, and their norms."""
    parts = model.parts("layers.0")
    return {part: axis for axis, name in SUBLAYERS.items() for part in (name, *norms_of(parts, name))}


def sublayer_of(model: Outline, name: str) -> str | None:
    """Return the axis of the sublayer that a parameter goes with, by its name; `None` of neither."""
    _, in_layers, inside = name.partition(f"{model.prefix}.layers.".lstrip("."))
    return sublayers(model).get(inside.split(".")[1]) if in_layers and "." in inside else None


def without_sublayers(family: Family, model: Outline) -> Family:
    """Return the family of a nonuniform model: rows of its attention, and of its MLP, are those of the layers that have one."""
    if not isinstance(model.config, PrunedConfig):
        return family
    lacking = [axis for axis in SUBLAYERS if not all(getattr(model.config, LIST_OF[axis]))]
    kinds = {part: KINDS[axis] for part, axis in sublayers(model).items() if axis in lacking}

    def moved(row: str) -> str:
        part = re.search(r"layers\.{layers}\.(\w+)", row)
        return row.replace("{layers}", f"{{{kinds[part[1]]}}}") if part and part[1] in kinds else row

    rows = {moved(row): pattern for row, pattern in family.rows.items()}
    return replace(family, rows=rows, norms=tuple(map(moved, family.norms)))


def not_nonuniform(family: Family, model: Outline, shape: Shape, parameters: Mapping[str, Any]) -> str:
    """Say why layers of a model cannot differ in size; empty when they can: when its class makes them so.

    Args:
        family (`Family`): Its family.
        model (`Outline`): The model.
        shape (`Shape`): Its shape.
        parameters (`Mapping[str, Parameter]`): Its parameters by name.
    """
    if shape.by_layer and isinstance(model.config, PrunedConfig):
        return ""
    if family.tower:
        return "they stand in a larger model"
    if sizes_in_lists(text_config(model.config), family.config_keys):
        return ""
    if "experts" in shape.sizes:
        return "they are mixtures, and PrunedConfig lists no number or width of experts by layer"
    if shape.layer_kinds:
        return "they are of several kinds, and PrunedConfig lists sizes of attention and MLPs only"
    if missing := [axis for axis in ("heads", "ffn") if axis not in shape.sizes or axis in {**shape.coupled, **shape.fixed}]:
        return f"{missing[0]} is none of their own sizes"
    if missing := [part for part in SUBLAYERS.values() if part not in model.parts("layers.0")]:
        return f"they have no {missing[0]}"
    last = shape["layers"] - 1
    group, kept = shape["heads"] // shape.kv_groups, max(1, shape.kv_groups // 2)
    own = {"heads": kept * group, "kv_heads": kept, "ffn": max(1, shape["ffn"] // 2)}
    whole = {"heads": shape["heads"], "kv_heads": shape.kv_groups, "ffn": shape["ffn"]}
    by_layer = {axis: (*[size] * last, own[axis]) for axis, size in whole.items()}
    trial = replace(shape, by_layer=by_layer)
    try:
        config = PrunedConfig.from_stock(model.config, **{LIST_OF[axis]: list(sizes) for axis, sizes in by_layer.items()})
        made = outline(config).parameters
    except Exception as error:  # config classes and modules raise their own kinds
        return one_line(error)
    expected = {name: axes.tensor_shape(own.pattern, trial.at(own.layer)) for name, own in parameters.items()}
    wrong = [name for name in {**expected, **made} if expected.get(name) != made.get(name)]
    return f"their class makes {wrong[0]!r} of shape {made.get(wrong[0])}, not {expected.get(wrong[0])}" if wrong else ""


def norms_elsewhere(model: Outline, reads: Mapping[str, Sequence[str]]) -> str:
    """Say which norm of a model serves another sublayer than its name tells, with which it would go; empty when none does.

    Args:
        model (`Outline`): The model.
        reads (`Mapping[str, Sequence[str]]`): Module to the modules whose output it is given, of a `Trace`.
    """
    for module, givers in reads.items():
        for norm in givers:
            own, other = sublayer_of(model, norm), sublayer_of(model, module)
            part = norm.rpartition(".")[2]
            if part not in SUBLAYERS.values() and own is not None and other not in (None, own):
                return f"{part} serves {SUBLAYERS[other]}, too, or alone"
    return ""


def per_layer_config(
    config: PreTrainedConfig, keys: Mapping[str, str], before: Shape, after: Shape, layers: Sequence[int]
) -> dict[str, dict[int, dict[str, Any]]]:
    """Return transformers' `per_layer_config` of a student: what single layers have beside their sizes, and their new sizes;
    these in a list where the config has one.

    Args:
        config (`PreTrainedConfig`): The teacher's, of its text model.
        keys (`Mapping[str, str]`): Axis to its key in `config.json`.
        before (`Shape`): The teacher's shape.
        after (`Shape`): The student's shape.
        layers (`Sequence[int]`): The teacher's layers that stay.
    """
    listed = sizes_in_lists(config, keys)
    sized = [keys[axis] for axis in {**before.by_layer, **after.by_layer}]
    every = {int(layer): own for layer, own in config.to_dict().get(PER_LAYER, {}).items()}
    found = {}
    for new, old in enumerate(layers):
        own = {key: value for key, value in every.get(old, {}).items() if key not in sized}
        sizes = {axis: sizes[new] for axis, sizes in after.by_layer.items() if axis not in listed}
        found[new] = own | {keys[axis]: size for axis, size in sizes.items() if size != after[axis]}
    changes = {keys[axis]: list(after.by_layer[axis]) for axis in listed if axis in after.by_layer}
    own = {layer: own for layer, own in found.items() if own}
    return changes | ({PER_LAYER: own} if every or own else {})


def pruned_config(config: PreTrainedConfig, changes: Mapping[str, Any], after: Shape) -> PrunedConfig:
    """Return the config of a student whose layers differ.

    Args:
        config (`PreTrainedConfig`): The teacher's.
        changes (`Mapping[str, Any]`): What the student's stock class has of its own.
        after (`Shape`): The student's shape.
    """
    changes = {key: value for key, value in changes.items() if key not in (PER_LAYER, *LARGEST)}
    every = {axis: list(after.by_layer.get(axis, after.by_layer["heads"])) for axis in LIST_OF}
    return PrunedConfig.from_stock(config, **changes, **{LIST_OF[axis]: sizes for axis, sizes in every.items()})
