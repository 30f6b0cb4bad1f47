"""What a config makes, by building its model on the meta device: names and shapes, no weights."""

from collections.abc import Mapping

from transformers import PreTrainedConfig

from hf_minitron.families.trace import outline


def parameters_of(config: PreTrainedConfig) -> Mapping[str, tuple[int, ...]]:
    """Return name and shape of every parameter and stored buffer of a model, without its weights; tied ones once."""
    return outline(config).parameters


def class_name(config: PreTrainedConfig) -> str:
    """Return the name of the causal language model that a config makes."""
    return outline(config).class_name


def base_prefix(config: PreTrainedConfig) -> str:
    """Return the name of the model without its head inside the model: `model`, `transformer`."""
    return outline(config).prefix


def modules_of(config: PreTrainedConfig) -> frozenset[str]:
    """Return the names of a model's modules."""
    return outline(config).modules
