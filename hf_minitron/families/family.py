"""`Family`: the axis map of a model type, and what it says about one config.

It must not read weights: a model's parameter names and shapes come from building it on the meta device.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_minitron import axes
from hf_minitron.families import gpt, llama, moe
from hf_minitron.families.config import not_a_language_model, one_line
from hf_minitron.shape import AXES, Shape


@dataclass(frozen=True)
class Family:
    """The axis map of a group of model types.

    Args:
        rows (`Mapping[str, str]`): Full parameter name (placeholders such as `{layers}` for axes in the name) to pattern. May
            list more than one model has. An axis that no config key gives is fixed: its size is read off the parameters.
        taps (`Mapping[str, tuple[str, ...]]`): Axis to the modules where its activations are read.
        readers (`Mapping[str, tuple[str, ...]]`): Norm to the projections that read what it gives.
        attention (`Mapping[str, tuple[str, ...]]`): `query`, `key` and `value`, to the modules that give them.
        plain_stream (`bool`): Whether all norms are RMS norms that stand before attention and MLP, both of which are added to
            the residual stream as they are; rotating it and merging layers take that for granted.
        config_keys (`Mapping[str, str]`): Axis to its key in `config.json`.
        stored (`Mapping[str, Mapping[str, str]]`): Rows whose parameters have other names on disk, to the rows they have there.
        follows (`Mapping[str, str]`): Further keys of `config.json`, to the axis whose size they repeat.
        inexact (`Mapping[str, str]`): Axis to the reason why cutting it changes more than masking it would.
        inexact_if (`Mapping[str, tuple[str, str]]`): The same, where a key of `config.json` is true: axis to key and reason.
        norm_offset (`float`): What the norms add to their stored weights.
        held_by (`Mapping`): Changes to `config.json` that give a class with equal logits and fewer limits on shapes.
    """

    rows: Mapping[str, str]
    taps: Mapping[str, tuple[str, ...]]
    config_keys: Mapping[str, str]
    stored: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    inexact: Mapping[str, str] = field(default_factory=dict)
    inexact_if: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    norm_offset: float = 0.0
    held_by: Mapping[str, object] = field(default_factory=dict)
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attention: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    plain_stream: bool = False

    def shape_of(self, config: PreTrainedConfig) -> Shape:
        """Read the size of every axis from a config, and of fixed axes from the shapes of the parameters."""
        found = {axis: _read(config, key) for axis, key in self.config_keys.items()}
        sizes = {axis: size for axis, size in found.items() if type(size) is int}
        used, indices = [], {}
        for name, shape in parameters_of(config).items():
            if matched := axes.match(name, self.rows):
                used.append((axes.parse(self.rows[matched[0]]), shape))
                for axis, index in matched[1].items():
                    indices.setdefault(axis, set()).add(index)
        sizes |= {axis: len(indices[axis]) for axis in ("dense_layers", "moe_layers") if axis in indices}
        for _ in range(3):  # a size that is solved may help to solve another
            for dims, shape in used:
                for dim, size in zip(dims, shape, strict=False):
                    if solved := axes.unknown_size(dim, size, sizes):
                        sizes.setdefault(*solved)
        present = {"layers", *indices}.union(*(axes.dim_names(dim) for dims, _ in used for dim in dims))
        return Shape({axis: size for axis, size in sizes.items() if axis in present or axis not in AXES})

    def rows_of(self, config: PreTrainedConfig) -> dict[str, str]:
        """Return the rows that a model of this config has; refuse it when a parameter fits none.

        Raises:
            AxisError: naming the first of the parameters that `misfits` lists.
        """
        problems = list(self.misfits(config).values())
        if problems:
            shown = ", ".join(problems[:3])
            if len(problems) > 3:
                shown += f" and {len(problems) - 3} more (Family.misfits lists them)"
            known = config.model_type in FAMILIES
            supported = f"Supported model types: {', '.join(sorted(FAMILIES))}; for another one"
            raise axes.AxisError(
                f"The axis map does not cover {'this variant of ' if known else ''}model type {config.model_type!r}: {shown}. "
                f"{'Choose another checkpoint of it, or' if known else supported + ','} add a table to hf_minitron/families/ "
                "(docs/families.md)"
            )
        matched = (axes.match(name, self.rows) for name in parameters_of(config))
        used = {row for row, _ in matched}
        return {row: pattern for row, pattern in self.rows.items() if row in used}

    def misfits(self, config: PreTrainedConfig) -> dict[str, str]:
        """Return what is wrong with each parameter that has no row, or another shape than its row says; empty if none is."""
        sizes, problems = self.shape_of(config).sizes, {}
        for name, shape in parameters_of(config).items():
            found, like = axes.match(name, self.rows), re.sub(r"\.\d+\.", ".{layers}.", name, count=1)
            names = set().union(*map(axes.dim_names, axes.parse(self.rows[found[0]]))) if found else set()
            if found is None:
                problems[like] = f"{like!r} (shape {shape}) has no row"
            elif names - sizes.keys():
                missing = ", ".join(sorted(names - sizes.keys()))
                problems[like] = f"{like!r} (shape {shape}) has a size that neither config nor shape gives: {missing}"
            elif shape != (expected := axes.tensor_shape(self.rows[found[0]], sizes)):
                problems[like] = f"{like!r} has shape {shape}, but its row {self.rows[found[0]]!r} means {expected}"
        return problems

    def inexact_of(self, config: PreTrainedConfig) -> dict[str, str]:
        """Return the axes of a model whose cut changes more than masking would, with the reasons."""
        return dict(self.inexact) | {axis: why for axis, (key, why) in self.inexact_if.items() if getattr(config, key, False)}

    def stored_rows(self, rows: Mapping[str, str]) -> dict[str, str]:
        """Return rows as they are in memory and as they may be named on disk."""
        return {**rows, **{name: pattern for row in rows for name, pattern in self.stored.get(row, {}).items()}}

    def taps_of(self, config: PreTrainedConfig) -> dict[str, list[tuple[int | None, str]]]:
        """Return the taps that a model of this config has: by axis, the layer (`None` outside of the layers) and the module."""
        taps = {axis: [place for row in rows for place in self._places(config, row)] for axis, rows in self.taps.items()}
        return {axis: places for axis, places in taps.items() if places}

    def readers_of(self, config: PreTrainedConfig) -> dict[str, tuple[int | None, str]]:
        """Return the projections that read hidden channels through a norm, a tied head too: to each its layer and the norm."""
        found = {}
        for norm, readers in self.readers.items():
            norms = dict(self._places(config, norm))
            for layer, module in [place for reader in readers for place in self._places(config, reader)]:
                if layer in norms:
                    found[module] = (layer, norms[layer])
        return found

    def norms_of(self, config: PreTrainedConfig) -> tuple[list[str], list[str], str | None]:
        """Return the norms that attention reads, those that MLPs read (the same where both read one), and the last norm.

        The lists are empty for a family whose norms stand elsewhere.
        """
        rows = [norm for norm in self.readers if axes.placeholders(norm)]
        places = [[name for _, name in self._places(config, row)] for row in rows[:1] + rows[-1:]]
        last = [name for norm in self.readers if norm not in rows for _, name in self._places(config, norm)]
        return *(places or ([], [])), last[0] if last else None

    def attention_of(self, config: PreTrainedConfig) -> dict[str, list[tuple[str, axes.Dim]]]:
        """Return the modules that give queries, keys and values, one per layer, and the pattern of what they give."""
        found = {}
        for part, modules in self.attention.items():
            places = sorted(place for module in modules for place in self._places(config, module))
            rows = [(name, self.rows[axes.match(f"{name}.weight", self.rows)[0]]) for _, name in places]
            found[part] = [(name, axes.dim_of(pattern, "head_dim")) for name, pattern in rows]
        return {part: places for part, places in found.items() if places}

    def _places(self, config: PreTrainedConfig, row: str) -> list[tuple[int | None, str]]:
        """Return layer and name of the modules of a model that a row of names stands for."""
        modules = _meta(type(config), config.to_json_string(use_diff=False)).modules
        layers = range(_read(config, self.config_keys["layers"])) if axes.placeholders(row) else [None]
        places = [(layer, row.format_map(dict.fromkeys(axes.placeholders(row), layer))) for layer in layers]
        return [place for place in places if place[1] in modules]


LLAMA = Family(
    llama.LLAMA_ROWS, llama.LLAMA_TAPS, llama.CONFIG_KEYS, readers=llama.LLAMA_READERS, attention=llama.LLAMA_ATTENTION
)
PLAIN = replace(LLAMA, plain_stream=True)
MOE = Family(
    moe.MOE_ROWS,
    moe.MOE_TAPS,
    moe.QWEN_MOE_KEYS,
    moe.STORED,
    readers=moe.MOE_READERS,
    attention=llama.LLAMA_ATTENTION,
)
FULL_WIDTH_NORM = "queries and keys are normalised over all their heads together, fewer of them after the cut"
SCALED_EMBEDDING = "the embedding is multiplied by the square root of hidden, which becomes smaller with the cut"
GEMMA = {"inexact": {"hidden": SCALED_EMBEDDING}, "norm_offset": 1.0}

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(llama.LLAMA_MODEL_TYPES, LLAMA),
    **dict.fromkeys(llama.PLAIN_STREAM_MODEL_TYPES, PLAIN),
    # LlamaConfig insists that hidden divides by heads; Mistral's class does not, and is the same where there is no bias
    "llama": replace(PLAIN, held_by={"model_type": "mistral", "sliding_window": None}),
    **dict.fromkeys(llama.PARALLEL_MODEL_TYPES, replace(LLAMA, readers=llama.PARALLEL_READERS)),
    "gemma": replace(PLAIN, **GEMMA),
    **dict.fromkeys(llama.GEMMA_MODEL_TYPES, replace(LLAMA, readers=llama.GEMMA_READERS, **GEMMA)),
    "nemotron": replace(LLAMA, norm_offset=1.0),
    "olmo2": replace(
        LLAMA,
        rows=llama.OLMO2_ROWS,
        readers=llama.HEAD_READERS,  # its norms stand behind attention and MLP
        inexact=dict.fromkeys(("heads", "kv_heads"), FULL_WIDTH_NORM),
    ),
    "stablelm": replace(LLAMA, config_keys=llama.STABLELM_KEYS),
    "gpt2": Family(
        gpt.GPT2_ROWS,
        gpt.GPT2_TAPS,
        gpt.GPT2_KEYS,
        inexact_if=gpt.GPT2_INEXACT,
        readers=gpt.GPT2_READERS,
        attention=gpt.GPT2_ATTENTION,
    ),
    "gpt_neox": Family(
        gpt.GPT_NEOX_ROWS,
        gpt.GPT_NEOX_TAPS,
        gpt.GPT_NEOX_KEYS,
        gpt.GPT_NEOX_STORED,
        readers=gpt.GPT_NEOX_READERS,
        attention=gpt.GPT_NEOX_ATTENTION,
    ),
    "opt": Family(
        gpt.OPT_ROWS,
        gpt.OPT_TAPS,
        gpt.OPT_KEYS,
        follows=gpt.OPT_FOLLOWS,
        readers=gpt.OPT_READERS,
        attention=gpt.OPT_ATTENTION,
    ),
    "mixtral": replace(MOE, config_keys=moe.MIXTRAL_KEYS, stored=moe.MIXTRAL_STORED),
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "gpt_oss": replace(MOE, rows=moe.GPT_OSS_ROWS, config_keys=moe.MIXTRAL_KEYS, stored={}),
    "deepseek_v3": Family(
        moe.DEEPSEEK_ROWS, moe.MOE_TAPS, moe.DEEPSEEK_KEYS, moe.STORED, moe.DEEPSEEK_FOLLOWS, readers=moe.MOE_READERS
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a config. An unknown model type is tried as Llama-style; what no row fits is refused.

    Raises:
        AxisError: for what is no causal language model of text, or has a parameter without a row or with another shape than its
            row says.
    """
    if problem := not_a_language_model(config, FAMILIES):
        raise axes.AxisError(problem)
    family = FAMILIES.get(config.model_type, LLAMA)
    family.rows_of(config)
    return family


@dataclass(frozen=True)
class _Meta:
    """What building a model without weights tells: its parameters' shapes, its modules' names, its class and base's name."""

    parameters: Mapping[str, tuple[int, ...]]
    modules: frozenset[str]
    class_name: str
    prefix: str


def parameters_of(config: PreTrainedConfig) -> Mapping[str, tuple[int, ...]]:
    """Return name and shape of every parameter and stored buffer of a model, without its weights; tied ones once."""
    return _meta(type(config), config.to_json_string(use_diff=False)).parameters


def class_name(config: PreTrainedConfig) -> str:
    """Return the name of the causal language model that a config makes."""
    return _meta(type(config), config.to_json_string(use_diff=False)).class_name


def base_prefix(config: PreTrainedConfig) -> str:
    """Return the name of the model without its head inside the model: `model`, `transformer`."""
    return _meta(type(config), config.to_json_string(use_diff=False)).prefix


def _read(config: PreTrainedConfig, key: str) -> object:
    try:
        return getattr(config, key, None)
    except Exception:  # a size that differs by layer, which transformers does not let be read at once
        return None


def _float(content: dict) -> object:
    """Return infinity and NaN for what Transformers writes in their place; JSON has neither."""
    return float(content["__float__"]) if content.keys() == {"__float__"} else content


@lru_cache(maxsize=64)
def _meta(kind: type[PreTrainedConfig], content: str) -> _Meta:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(content, object_hook=_float)))
    except Exception as error:  # config classes and modules raise their own kinds
        raise axes.AxisError(f"A {kind.__name__} does not make a causal language model ({one_line(error)})") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = model.state_dict().keys()
    shapes |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in stored}
    modules = frozenset(name for name, _ in model.named_modules())
    return _Meta(shapes, modules, type(model).__name__, model.base_model_prefix)
