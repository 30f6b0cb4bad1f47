"""`Family`: the axis map of a model type, what it says about one config, and the student's config.

It must not read weights: a model's parameter names and shapes come from building it on the meta device.
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_minitron import axes
from hf_minitron.families import llama
from hf_minitron.plan import Plan
from hf_minitron.shape import Shape, ShapeError


@dataclass(frozen=True)
class Family:
    """The axis map of a group of model types.

    Args:
        rows (`Mapping[str, str]`): Full parameter name (placeholders such as `{layers}` for axes in the name) to pattern.
        taps (`Mapping[str, tuple[str, ...]]`): Axis to the modules where its activations are read.
        config_keys (`Mapping[str, str]`): Axis to its key in `config.json`.
        layer_lists (`tuple[str, ...]`): Keys of `config.json` that hold one entry per layer.
    """

    rows: Mapping[str, str]
    taps: Mapping[str, tuple[str, ...]]
    config_keys: Mapping[str, str]
    layer_lists: tuple[str, ...]

    def shape_of(self, config: PreTrainedConfig) -> Shape:
        """Read the size of every axis from a config."""
        sizes = {axis: getattr(config, key, None) for axis, key in self.config_keys.items()}
        if sizes["head_dim"] is None:
            sizes["head_dim"] = sizes["hidden"] // sizes["heads"]
        if sizes["kv_heads"] is None:
            sizes["kv_heads"] = sizes["heads"]
        return Shape(sizes)

    def rows_of(self, config: PreTrainedConfig) -> dict[str, str]:
        """Return the rows that a model of this config has; refuse it when a parameter fits none.

        Raises:
            AxisError: naming each parameter without a row or with another shape than its row says.
        """
        sizes = self.shape_of(config).sizes
        used, problems = set(), {}
        for name, parameter in _meta_model(config).named_parameters():
            found = axes.match(name, self.rows)
            shape, like = tuple(parameter.shape), re.sub(r"\.\d+\.", ".{layers}.", name)
            if found is None:
                problems[like] = f"{like!r} (shape {shape}) has no row"
            elif shape != (expected := axes.tensor_shape(self.rows[found[0]], sizes)):
                problems[like] = f"{like!r} has shape {shape}, but its row {self.rows[found[0]]!r} means {expected}"
            else:
                used.add(found[0])
        if problems:
            raise axes.AxisError(
                f"The axis map does not cover model type {config.model_type!r}:\n  "
                + "\n  ".join(problems.values())
                + "\nEvery parameter needs one row with one axis per dimension. Supported model types: "
                + f"{', '.join(sorted(FAMILIES))}. For another one, add a table to hf_minitron/families/."
            )
        return {row: pattern for row, pattern in self.rows.items() if row in used}


LLAMA = Family(llama.LLAMA_ROWS, llama.LLAMA_TAPS, llama.CONFIG_KEYS, llama.LAYER_LISTS)

FAMILIES: dict[str, Family] = dict.fromkeys(llama.LLAMA_MODEL_TYPES, LLAMA)


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a config. An unknown model type is tried as Llama-style: `rows_of` then accepts or refuses it."""
    family = FAMILIES.get(config.model_type, LLAMA)
    family.rows_of(config)
    return family


def check_target(config: PreTrainedConfig, family: Family, after: Shape) -> None:
    """Refuse a shape that the stock config class does not accept, naming the nearest hidden sizes that it does.

    Raises:
        ShapeError: with the class, its reason, and legal sizes (Llama, for one, insists that hidden divides by heads).
    """
    reason = _refusal(config, family, after)
    if reason is None:
        return
    hidden, full = after["hidden"], family.shape_of(config)["hidden"]
    step = math.gcd(8, hidden)
    candidates = [n for n in range(step, full + 1, step) if n % after["heads"] == 0]
    legal = [n for n in candidates if _refusal(config, family, Shape({**after.sizes, "hidden": n})) is None]
    near = sorted(sorted(legal, key=lambda n: abs(n - hidden))[:2])
    advice = f"Nearest hidden sizes it accepts: {', '.join(map(str, near))}" if near else "No hidden size fits; change heads"
    raise ShapeError(f"{type(config).__name__} refuses hidden={hidden} with heads={after['heads']}: {reason}. {advice}")


def student_config(config: PreTrainedConfig, family: Family, plan: Plan) -> PreTrainedConfig:
    """Return the student's config: the teacher's with the new sizes, `head_dim` written out, layer lists cut.

    Args:
        config (`PreTrainedConfig`): The teacher's config; it stays unchanged.
        family (`Family`): The teacher's family.
        plan (`Plan`): What is kept.
    """
    changes = _changes(family, plan.after)
    for key in family.layer_lists:
        if getattr(config, key, None):
            changes[key] = [getattr(config, key)[layer] for layer in plan.kept_layers]
    student = _with(config, changes)
    student.name_or_path = ""  # not the folder that the teacher was loaded from
    return student


def _changes(family: Family, after: Shape) -> dict:
    return {key: after[axis] for axis, key in family.config_keys.items()}


def _with(config: PreTrainedConfig, changes: dict) -> PreTrainedConfig:
    return type(config).from_dict({**copy.deepcopy(config.to_dict()), **changes})


def _refusal(config: PreTrainedConfig, family: Family, after: Shape) -> str | None:
    lists = {key: getattr(config, key)[: after["layers"]] for key in family.layer_lists if getattr(config, key, None)}
    try:
        _with(config, _changes(family, after) | lists)
    except Exception as error:  # config classes raise their own kinds
        return " ".join(str(error).split())
    return None


def _meta_model(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))
