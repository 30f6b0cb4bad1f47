"""The student's config: whether a class of Transformers holds a shape, and which shapes near it do.

A shape is held when the class makes exactly the parameters that pruning will give; nothing else is known about classes.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture, Parameter
from hf_minitron.architecture.config import PRUNED_VOCAB, NewIds, model_type_of, named_ids, pruned_vocab, text_config, with_text
from hf_minitron.architecture.layer_settings import layer_settings
from hf_minitron.architecture.nonuniform import PER_LAYER, per_layer_config, pruned_config, sizes_in_lists
from hf_minitron.architecture.outline import outline
from hf_minitron.architecture.rotary import FullRotary
from hf_minitron.architecture.vision import Tower
from hf_minitron.errors import one_line
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.plan import Plan, stand_in
from hf_minitron.shape import Shape, ShapeError
from hf_minitron.sizes import SIZES_OF


def check_target(architecture: Architecture, after: Shape) -> None:
    """Refuse a shape that no stock class holds, naming the nearest that its class does.

    Raises:
        ShapeError: with the class, its reason, and legal sizes (Llama, for one, insists that hidden divides by heads).
    """
    student_config(architecture, stand_in(architecture.shape, after))


def student_config(architecture: Architecture, plan: Plan) -> PreTrainedConfig:
    """Return the student's config: the teacher's with the new sizes, `head_dim` written out, layer lists cut.

    The teacher's class when it holds the shape, else one with equal logits that does (`Family.fallback_config`);
    `PrunedConfig` when layers differ.

    Args:
        architecture (`Architecture`): The teacher's.
        plan (`Plan`): What is kept.

    Raises:
        ShapeError: when no class holds the shape.
    """
    for axis, reason in architecture.family.fixed.items():
        stays = set(architecture.shape.layer_kinds.get(axis, ())) <= set(plan.kept_layers)
        if not stays or axis in plan.after.sizes and plan.after[axis] != plan.before[axis]:
            raise ShapeError(f"{axis}: cannot be cut in a {architecture.config.model_type}: {reason}")
    tokens, around = _new_tokens(architecture, plan)
    student, reason = _try_config(architecture, plan.after, plan.kept_layers, tokens, around)
    if student is None and plan.by_layer:
        if why := architecture.not_nonuniform:
            kind = model_type_of(architecture.config)
            raise ShapeError(f"Layers of a {kind} cannot differ in size: {why}. Give all of them the same sizes")
        student, reason = _try_config(architecture, plan.after, plan.kept_layers, tokens, pruned=True)
    elif student is None and architecture.family.fallback_config:
        student, _ = _try_config(architecture, plan.after, plan.kept_layers, _fallback(architecture) | tokens, around)
    if student is None:
        raise ShapeError(_advice(architecture, plan.after, reason))
    return student


def _fallback(architecture: Architecture) -> dict[str, object]:
    """Return the changes to a config that give the family's other class."""
    family, config = architecture.family, text_config(architecture.config)
    rotary = FullRotary.of(config, architecture.shape["head_dim"]) if family.fallback_rows else None
    full = {"rope_parameters": dict(rotary.parameters), "partial_rotary_factor": 1.0} if rotary else {}
    return {**family.fallback_config, **full}


def _new_tokens(architecture: Architecture, plan: Plan) -> tuple[dict[str, object], dict[str, object]]:
    """Return what the student's config says of tokens, that of its text model and, of a composite one, what stands around it.

    Until a plan says which of them stay, those that the config names do, and the first ones.
    """
    before, after = plan.before.sizes.get("vocab"), plan.after.sizes.get("vocab")
    if before == after:
        return {}, {}
    config, text = architecture.config, text_config(architecture.config)
    named = {index for index in named_ids(config.to_dict()) if index < before}
    if after < len(named):
        raise ShapeError(
            f"vocab: {after:,} is fewer than the {len(named):,} tokens that the config names, which stay; use more"
        )
    stays = plan.keep.get("vocab") or sorted([*named, *(index for index in range(before) if index not in named)][:after])
    new = NewIds(stays, before)
    if gone := [index for index in sorted(named) if new(index) is None]:
        raise ShapeError(f"vocab: the plan drops token {gone[0]}, which the config names (eos_token_id and the like); keep it: "
                         "token_scores(..., named=named_ids(config.to_dict()))")  # fmt: skip
    changes = new.changes(text.to_dict()) | {PRUNED_VOCAB: new.mark(pruned_vocab(config))}
    return changes, {} if text is config else new.changes(config.to_dict())


def text_alone(architecture: Architecture) -> tuple[PreTrainedConfig, dict[str, str]]:
    """Return the config of a vision-language model's text model as a causal language model of its own, and the names of its
    parameters to those that they have in it.

    Raises:
        ShapeError: for a model that is none, or whose text model no class holds.
    """
    tower, kind = architecture.family.tower, architecture.config.model_type
    if tower is None:
        raise ShapeError(f"text_only: model type {kind!r} is a language model of text alone already; leave it out")
    if "experts" in architecture.shape.sizes:
        raise ShapeError(f"The text model of {kind!r} cannot be saved alone (text_only): it is a mixture, whose experts "
                         "checkpoints of the text class hold otherwise. Keep it whole")  # fmt: skip
    text = copy.deepcopy(text_config(architecture.config).to_dict()) | tower.text
    text["tie_word_embeddings"] = architecture.config.tie_word_embeddings
    if rope := text.get("rope_parameters"):  # of text, all three positions of a token are one
        text["rope_parameters"] = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    names = {
        name: re.sub(rf"^{re.escape(tower.prefix)}\.", "model.", name)
        for name in architecture.parameters
        if architecture.parameters[name].row not in architecture.family.outside
    }
    try:
        config = CONFIG_MAPPING[text["model_type"]]
        known = {"head_dim", PER_LAYER, *(config.attribute_map or {}), *(field.name for field in dataclasses.fields(config))}
        config = config.from_dict({key: value for key, value in text.items() if key in known})
        made = outline(config)
    except Exception as error:  # config classes and modules raise their own kinds
        raise ShapeError(f"The text model of {kind!r} cannot be saved alone (text_only): {one_line(error)}. Keep it "
                         "whole") from error  # fmt: skip
    expected = {new: architecture.parameters[name].shape for name, new in names.items()}
    if wrong := [name for name in {**expected, **made.parameters} if expected.get(name) != made.parameters.get(name)]:
        raise ShapeError(f"The text model of {kind!r} cannot be saved alone (text_only): {type(config).__name__} does not hold "
                         f"{wrong[0]!r}. Keep it whole")  # fmt: skip
    config.architectures, config.dtype = [made.class_name], architecture.config.dtype
    return config, names


def stock_config(
    architecture: Architecture,
    after: Shape,
    layers: Sequence[int],
    more: Mapping[str, object] = MappingProxyType({}),
    around: Mapping[str, object] = MappingProxyType({}),
) -> PreTrainedConfig:
    """Return the config of a stock class with the sizes of a shape, whether that holds it or not.

    Args:
        architecture (`Architecture`): The teacher's.
        after (`Shape`): The student's shape.
        layers (`Sequence[int]`): The teacher's layers that stay.
        more (`Mapping`, *optional*): Further changes; with a `model_type`, of another class than the teacher's.
        around (`Mapping`, *optional*): Changes to what stands around the text model's config in a composite one.
    """
    config, changes = architecture.config, {**_changes(architecture, after, layers), **more}
    nonuniform = isinstance(config, PrunedConfig)
    own = CONFIG_MAPPING[config.stock_model_type] if nonuniform else type(text_config(config))
    kind = CONFIG_MAPPING[changes["model_type"]] if "model_type" in changes else own
    changes = {(kind.attribute_map or {}).get(key, key): value for key, value in changes.items()}
    if nonuniform:
        return config.to_stock(**changes)
    tower = architecture.family.tower or Tower("", {})
    return with_text(config, changes, {key: after[axis] for key, axis in tower.follows.items()} | around)


def _changes(architecture: Architecture, after: Shape, layers: Sequence[int]) -> dict[str, object]:
    """Return what a student's text config has of its own."""
    family, config = architecture.family, text_config(architecture.config)
    changes = {key: after[axis] for axis, key in family.config_keys.items() if axis in after.sizes and isinstance(key, str)}
    changes |= {
        key: axes.dim_size(axes.parse(size)[0], after.sizes) for key, size in family.follows.items() if hasattr(config, key)
    }
    changes |= per_layer_config(config, family.config_keys, architecture.shape, after, layers)
    return changes | layer_settings(config, architecture.shape, layers) | family.settings


def _try_config(
    architecture: Architecture,
    after: Shape,
    layers: Sequence[int],
    more: Mapping[str, object] = MappingProxyType({}),
    around: Mapping[str, object] = MappingProxyType({}),
    pruned: bool = False,
) -> tuple[PreTrainedConfig | None, str]:
    """Return the config of a shape when its class makes exactly the parameters that pruning will give, else why not.

    The class is the model's own, that of the model type in `more`, or a `PrunedConfig`.
    """
    family = architecture.family
    try:
        if pruned:
            student = pruned_config(architecture.config, {**_changes(architecture, after, layers), **more}, after)
        else:
            student = stock_config(architecture, after, layers, more, around)
        made = outline(student)
    except Exception as error:  # config classes and modules raise their own kinds
        return None, one_line(error)
    student.name_or_path = ""  # not the folder that the teacher was loaded from
    if made.class_name != architecture.outline.class_name:
        student.architectures = [made.class_name]
    renamed = family.fallback_rows if "model_type" in more else {}
    found, expected = made.parameters, _expected(architecture, after, layers, renamed)
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if not wrong:
        return student, ""
    return None, f"it would make {wrong[0]!r} of shape {found.get(wrong[0])}, not {expected.get(wrong[0])}"


def _expected(
    architecture: Architecture, after: Shape, layers: Sequence[int], parts: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of the student, of some rows of their parts."""
    expected = {}
    for parameter in architecture.parameters.values():
        indices = parameter.indices
        places = {
            axis: layers.index(i) if axes.axis_of_placeholder(axis) == "layers" and i in layers else i
            for axis, i in indices.items()
        }
        dropped = any(
            i not in layers if axes.axis_of_placeholder(axis) == "layers" else i >= after.sizes.get(axis, i + 1)
            for axis, i in indices.items()
        )
        if not dropped and not _lacks(architecture, after, parameter, places):
            rows = parts.get(parameter.row, {parameter.row: parameter.pattern})
            sizes = after.at(axes.layer_index(places))
            expected |= {row.format_map(places): axes.tensor_shape(pattern, sizes) for row, pattern in rows.items()}
    return expected


def _lacks(architecture: Architecture, after: Shape, parameter: Parameter, places: Mapping[str, int]) -> bool:
    """Return whether a student's layer has no such sublayer as a parameter is of."""
    return bool(after.by_layer) and after.at(axes.layer_index(places)).get(architecture.sublayer(parameter)) == 0


def _advice(architecture: Architecture, after: Shape, reason: str) -> str:
    """Say why a shape is refused and which near ones are not."""
    hidden, heads, step = after["hidden"], after["heads"], after.sizes.get("head_dim", 1)
    before, name = architecture.shape, type(text_config(architecture.config)).__name__
    group = heads // after.kv_groups
    if all(after[axis] == before[axis] for axis in ("hidden", "heads")):
        return f"{name} refuses {after.axes}: {reason}"
    near = [(n, heads) for n in range(hidden - hidden % heads, 0, -heads)[:3]]
    near += [(n, heads) for n in range(hidden - hidden % heads + heads, before["hidden"] + 1, heads)[:3]]
    near += [(h * step, h) for h in range(group, before["heads"] + 1, group)]
    legal = []
    for n, h in sorted(set(near), key=lambda pair: (abs(pair[0] - hidden) + abs(pair[1] - heads) * step, pair)):
        target = {"hidden": n, "heads": h} | ({"kv_heads": h // group} if "kv_heads" in before.sizes else {})
        target |= {axis: n * before[axis] // before["hidden"] for axis, leader in before.coupled.items() if leader == "hidden"}
        same = (n, h) == (before["hidden"], before["heads"])
        if same or len(legal) == 2 or any(target[axis] > before[axis] or target[axis] < 1 for axis in target):
            continue
        if _try_config(architecture, Shape({**after.sizes, **target, "layers": 1}), [0])[0] is not None:
            kv = f" and kv_heads={h // group}" if target.get("kv_heads", after.kv_groups) != after.kv_groups else ""
            legal.append(f"hidden={n} with heads={h}{kv}")
    advice = f"Nearest that it holds: {', '.join(legal)}" if legal else "No hidden size fits; change heads"
    return f"{name} refuses hidden={hidden} with heads={heads}: {reason}. {advice}"


def axes_by_layer(architecture: Architecture, wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the axes whose sizes are chosen for every layer: `heads`, with its KV heads, and `ffn`, or what of them is wanted.

    Args:
        architecture (`Architecture`): The teacher's.
        wanted (`Sequence[str]`, *optional*): Some of them; all that the student's class holds when left out.

    Raises:
        ValueError: for an axis that the class has one size of.
    """
    held = listed_by_layer(architecture) or tuple(SIZES_OF)
    if wanted is None:
        return held
    if not wanted or any(axis not in held for axis in wanted):
        raise ValueError(f"{list(wanted)}: sizes of a {architecture.config.model_type} that may differ by layer are those of "
                         f"{', '.join(held)}; name one or more, or none to choose all")  # fmt: skip
    return tuple(axis for axis in held if axis in wanted)


def listed_by_layer(architecture: Architecture) -> tuple[str, ...]:
    """Return the axes whose sizes the stock class lists by layer, which are the only ones that may differ then."""
    return tuple(sizes_in_lists(text_config(architecture.config), architecture.family.config_keys))
