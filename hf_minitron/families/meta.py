"""What a config makes, by building its model on the meta device: parameter names and shapes, no weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_minitron import axes
from hf_minitron.families.config import one_line


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


def modules_of(config: PreTrainedConfig) -> frozenset[str]:
    """Return the names of a model's modules."""
    return _meta(type(config), config.to_json_string(use_diff=False)).modules


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
