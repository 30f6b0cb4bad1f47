"""Configs as they are read, those that cannot be pruned, and why."""

import copy
import hashlib
import inspect
import re
import sys
from collections.abc import Container, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import set_zero3_state
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hf_minitron.architecture.vision import TOWERS

TEXT_CONFIG = "text_config"
# The ways of quantizing that are undone on the way.
DEQUANTIZED = ("fp8", "mxfp4")
# Entries of config.json and generation_config.json that hold ids of tokens, one or several.
TOKEN_IDS = re.compile(r"(\w+_)?token_(ids?|index)|(begin_)?suppress_tokens|(bad|force)_words_ids")
# The entry that says which tokens a model has of the one that it was made of: a hash of their ids.
PRUNED_VOCAB = "pruned_vocab"


class NewIds:
    """The ids that tokens have once some are cut; those beyond the vocabulary, which no model has, stay beyond.

    Args:
        ids (`Sequence[int]`): The old ids of the tokens that stay, in their new order.
        size (`int`): Of the vocabulary before.
    """

    def __init__(self, ids: Sequence[int], size: int):
        self.ids, self.size, self._new = ids, size, {old: new for new, old in enumerate(ids)}

    def __call__(self, old: int) -> int | None:
        """Return a token's new id; `None` of one that goes, and what stands for no token as it is."""
        if old < 0:
            return old
        return self._new.get(old) if old < self.size else old - self.size + len(self.ids)

    def changes(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of a config that name tokens, with their new ids."""
        return {key: self._renumbered(value) for key, value in content.items() if TOKEN_IDS.fullmatch(key)}

    def mark(self, before: str | None) -> str:
        """Return the hash of the ids, of a vocabulary that was cut already together with that one's."""
        return hashlib.sha256(f"{before or self.size} {list(self.ids)}".encode()).hexdigest()[:16]

    def _renumbered(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [new for new in map(self._renumbered, value) if new is not None]
        return self(value) if type(value) is int else value


def named_ids(*contents: Mapping[str, Any]) -> set[int]:
    """Return the ids of tokens that configs name, composite ones also in that of their text model."""
    contents = (*contents, *(content[TEXT_CONFIG] for content in contents if content.get(TEXT_CONFIG)))

    def flat(value: Any) -> set[int]:
        if isinstance(value, list | tuple):
            return set().union(*map(flat, value))
        return {value} if type(value) is int and value >= 0 else set()

    return {i for content in contents for key, value in content.items() if TOKEN_IDS.fullmatch(key) for i in flat(value)}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a vision-language model's text model; any other config itself."""
    return config.get_text_config(decoder=True)


def positions_of(config: PreTrainedConfig) -> int:
    """Return how many tokens a model was made for; a number without end where its config does not say."""
    return getattr(text_config(config), "max_position_embeddings", None) or sys.maxsize


def pruned_vocab(config: PreTrainedConfig) -> str | None:
    """Return which tokens a model has of the one that it was cut out of; `None` for all."""
    return getattr(text_config(config), PRUNED_VOCAB, None)


def model_type_of(config: PreTrainedConfig) -> str:
    """Return the model type of a config's text model; of a nonuniform one that of its stock class."""
    return getattr(text_config(config), "stock_model_type", text_config(config).model_type)


def auto_class(config: PreTrainedConfig) -> type:
    """Return the Auto class that loads a model of a config."""
    return AutoModelForImageTextToText if config.model_type in TOWERS else AutoModelForCausalLM


def model_of(config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
    """Return a model of a config with random weights, whole on every process, also in one that trains with ZeRO-3.

    Args:
        config (`PreTrainedConfig`): The config.
        **kwargs: Arguments of `from_config`.
    """
    with set_zero3_state():  # Transformers takes it that its models are sharded already
        return auto_class(config).from_config(config, **kwargs)


def pipeline_tag(config: PreTrainedConfig) -> str:
    """Return the task of a model of a config, by the Hub's name."""
    return "image-text-to-text" if config.model_type in TOWERS else "text-generation"


def with_text(config: PreTrainedConfig, changes: Mapping[str, Any], elsewhere: Mapping[str, Any] = MappingProxyType({})):
    """Return a config with changes, in the text model's where it has one of its own.

    Args:
        config (`PreTrainedConfig`): The config; it stays unchanged.
        changes (`Mapping[str, Any]`): Keys of the text model's config to values.
        elsewhere (`Mapping[str, Any]`, *optional*): Keys of the whole config to values, with dots between levels.
    """
    content = copy.deepcopy(config.to_dict())
    text = content[TEXT_CONFIG] if text_config(config) is not config else content
    text |= changes
    for key, value in elsewhere.items():
        *levels, last = key.split(".")
        reduce(dict.__getitem__, levels, content)[last] = value
    other = text is content and "model_type" in changes
    return (CONFIG_MAPPING[changes["model_type"]] if other else type(config)).from_dict(content)


def special_float(content: dict) -> object:
    """Return infinity and NaN for what Transformers writes in their place; JSON has neither. For `json.loads(object_hook=)`."""
    return float(content["__float__"]) if content.keys() == {"__float__"} else content


def not_a_language_model(config: PreTrainedConfig, supported: Container[str]) -> str | None:
    """Say why a config makes no causal language model of text alone, and what to prune instead; `None` when it makes one.

    Args:
        config (`PreTrainedConfig`): Any config.
        supported (`Container[str]`): The model types that can be pruned.
    """
    kind, text = config.model_type, text_config(config)
    if config.is_encoder_decoder:
        return f"Model type {kind!r} does not make a causal language model, but an encoder and a decoder; choose another one"
    if kind in TOWERS:
        return None
    if text is config:
        if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
            return f"Model type {kind!r} is an encoder where is_decoder is false, and does not predict the next token"
        registered = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING  # by whoever wrote its class
        made = kind not in CONFIG_MAPPING or registered or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return None if made else f"Model type {kind!r} does not make a causal language model; choose another one"
    parts = ", ".join(name for name in config.sub_configs if getattr(config, name, None) is not None)
    advice = f"choose one of {', '.join(TOWERS)}"
    if text.model_type in supported:
        advice = f"save its text model, {text.model_type!r}, as a checkpoint of its own first (docs/families.md shows how)"
    return (f"Model type {kind!r} does not make a causal language model of text alone, but of {parts}, and no table says where "
            f"its text model stands in it; {advice}")  # fmt: skip


def check_not_quantized(config: PreTrainedConfig, folder: str | Path) -> None:
    """Refuse a quantized checkpoint, whose tensors cannot be cut, and say how to get one that is not.

    Raises:
        ValueError: naming the method.
    """
    if not (method := quantization_method(config)):
        return
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if kind and "dequantize" in inspect.signature(kind).parameters:
        how = f"from_pretrained(..., quantization_config={kind.__name__}(dequantize=True)), save_pretrained"
    elif method in ("bitsandbytes", "higgs"):
        how = "from_pretrained, dequantize(), save_pretrained"
    else:
        raise ValueError(f"{folder} is quantized ({method}), which Transformers cannot undo; use the checkpoint that it was "
                         "made from")  # fmt: skip
    on_the_way = "; or set dequantize to true, which does it on the way" if method in DEQUANTIZED else ""
    raise ValueError(f"{folder} is quantized; save it dequantized first ({method}: {how}){on_the_way}")


def quantization_method(config: PreTrainedConfig) -> str | None:
    """Return how the checkpoint of a config is quantized; `None` where it is not."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    content = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return str(content.get("quant_method") or "unknown method")


def dequantizing(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that dequantize a checkpoint which is in fp8 or mxfp4; of others none."""
    method = quantization_method(config)
    if method not in DEQUANTIZED:
        return {}
    return {"quantization_config": AUTO_QUANTIZATION_CONFIG_MAPPING[method](dequantize=True)}


def dequantized(config: PreTrainedConfig, folder: str | Path) -> PreTrainedConfig:
    """Return the config of a checkpoint in fp8 or mxfp4 once it is dequantized.

    Raises:
        ValueError: for one that is not quantized, or otherwise.
    """
    if not quantization_method(config):
        raise ValueError(f"dequantize: true, but {folder} is not quantized; leave it out")
    if not dequantizing(config):
        check_not_quantized(config, folder)
    config = copy.deepcopy(config)
    del config.quantization_config
    return config
