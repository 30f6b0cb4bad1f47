"""`PrunedModel` and `PrunedForCausalLM`: the modules of a `PrunedConfig`.

They are a stock model whose layers are made one by one with sizes of their own, so that masks, positions and caches are the
stock class's. Copied beside saved models, so it imports nothing of hf_minitron.
"""

import functools
from collections.abc import Collection

import torch
from torch import Tensor, nn

from .configuration_pruned import PrunedConfig, unusable  # noqa: TID252  as in configuration_pruned
from .layer_schemas import LIST_OF  # noqa: TID252

try:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
    from transformers.cache_utils import Cache
    from transformers.generation import GenerationMixin
    from transformers.modeling_utils import PreTrainedModel
except ImportError as error:
    raise unusable(error) from error

ATTENTION, MLP = "self_attn", "mlp"
# By what `skip` calls them.
SUBLAYERS = {"attention": ATTENTION, "mlp": MLP}
# The norms of a layer that go with its attention and its MLP, by one that layers of a kind have and later kinds have not.
NORMS = {
    "post_mlp_layernorm": {
        ATTENTION: ("input_layernorm", "post_self_attn_layernorm"),
        MLP: ("post_attention_layernorm", "post_mlp_layernorm"),
    },
    "post_feedforward_layernorm": {
        ATTENTION: ("input_layernorm", "post_attention_layernorm"),
        MLP: ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    },
    "post_attention_layernorm": {ATTENTION: ("input_layernorm",), MLP: ("post_attention_layernorm",)},
}


class Absent(nn.Module):
    """A sublayer that adds nothing; of attention, it counts the tokens in caches that do not know of it."""

    def __init__(self, layer_idx: int | None = None):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, None]:
        """Return zeros of shape `(batch, seq, hidden)`, and attention's missing weights."""
        if self.layer_idx is None:
            return torch.zeros_like(hidden_states)
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None and not _keeps_nothing(cache, self.layer_idx):
            entry = hidden_states[:, None, :, :1]  # (batch, one head, seq, one number)
            cache.update(entry, entry, self.layer_idx)
        return torch.zeros_like(hidden_states), None


def _keeps_nothing(cache: Cache, layer: int) -> bool:
    """Return whether a cache has a placeholder for a layer."""
    return layer < len(cache.layers) and not hasattr(cache.layers[layer], "lazy_initialization")


def norms_of(parts: Collection[str], sublayer: str) -> tuple[str, ...]:
    """Return the names of the norms that go with a sublayer, `self_attn` or `mlp`, among the parts of a layer."""
    kind = next((norms for name, norms in NORMS.items() if name in parts), {})
    return tuple(name for name in kind.get(sublayer, ()) if name in parts)


class PrunedPreTrainedModel(PreTrainedModel):
    """What both models tell transformers about themselves; all else is the stock class's."""

    config: PrunedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    stock_classes = MODEL_MAPPING

    def __new__(cls, config: PrunedConfig | None = None, *args, **kwargs):  # a copy is made without
        return super().__new__(_class_of(cls, config.stock_model_type) if "stock_classes" in cls.__dict__ else cls)

    def __init__(self, config: PrunedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        layers = getattr(self, self.base_model_prefix, self).layers
        for index, own in enumerate(config.per_layer_config):
            layers[index] = resized(layers[index], own, config, index)
        self.post_init()

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        """Choose how attention is computed, as for any model; layers have configs of their own."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), PrunedConfig):
                module.config._attn_implementation_internal = self.config._attn_implementation


def resized(layer: nn.Module, own: PrunedConfig, config: PrunedConfig, index: int) -> nn.Module:
    """Return a stock layer with its own sizes.

    Args:
        layer (`Module`): The layer with the largest sizes.
        own (`PrunedConfig`): The config of this layer.
        config (`PrunedConfig`): The config of all.
        index (`int`): The number of the layer.
    """
    if any(getattr(own, key, None) != getattr(config, key, None) for key in LIST_OF):
        layer = type(layer)(own, index)
    for name in map(SUBLAYERS.get, own.skip):
        assert hasattr(layer, name), f"layers of {config.stock_model_type} have no {name}"
        for norm in norms_of(dict(layer.named_children()), name):
            setattr(layer, norm, nn.Identity())
        setattr(layer, name, Absent(index if name == ATTENTION else None))
    return layer


class PrunedModel(PrunedPreTrainedModel):
    """The layers of a nonuniform model, without its head."""

    stock_classes = MODEL_MAPPING


class PrunedForCausalLM(PrunedPreTrainedModel, GenerationMixin):
    """A nonuniform causal language model.

    Example:

    ```python
    >>> config = PrunedConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, layer_intermediate_size=[128, 0])
    >>> PrunedForCausalLM(config).save_pretrained("nonuniform")
    >>> model = PrunedForCausalLM.from_pretrained("nonuniform")  # or AutoModelForCausalLM, once hf_minitron is imported
    ```
    """

    stock_classes = MODEL_FOR_CAUSAL_LM_MAPPING


@functools.cache
def _class_of(kind: type[PrunedPreTrainedModel], stock_model_type: str) -> type[PrunedPreTrainedModel]:
    """Return the class of the models of a stock model type."""
    stock = kind.stock_classes[CONFIG_MAPPING[stock_model_type]]
    named = {"__module__": __name__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "config_class": PrunedConfig}
    return type(kind.__name__, (kind, stock), named)


PrunedModel.register_for_auto_class("AutoModel")
PrunedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
