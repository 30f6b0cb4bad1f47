"""`PrunedConfig`: a Llama-style model whose layers differ in heads, KV heads and inner width, or lack a sublayer.

Copied beside saved models, so it imports nothing of hf_minitron.
"""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers

from .layer_schemas import (  # noqa: TID252  remote code is imported by its folder
    FFN,
    HEADS,
    KV_HEADS,
    LIST_OF,
    Sizes,
    from_block_configs,
    from_layer_lists,
    from_per_layer_config,
    to_block_configs,
    to_layer_lists,
    to_per_layer_config,
)

OLDEST, NEWEST = "5.15", "5.24"  # the versions of transformers that this code was tested with


def unusable(lacks: object) -> ImportError:
    """Return the error for a version of transformers that lacks what this code builds on."""
    return ImportError(f"Layers of different sizes need transformers >= {OLDEST} (tested up to {NEWEST}), not "
                       f"{transformers.__version__}: {lacks}. pip install -U 'transformers=={NEWEST}.*'")  # fmt: skip


try:
    from huggingface_hub.dataclasses import strict
    from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
except ImportError as error:
    raise unusable(error) from error

# The stock model types that this class can hold, and what their classes do that their configs do not say.
STOCK: dict[str, dict[str, Any]] = {
    "cwm": {},
    "exaone": {},
    "granite": {},
    "internlm3": {},
    "iquestcoder": {},
    "llama": {},
    "ministral": {},
    "mistral": {},
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"qk_norm": True},
    "smollm3": {},
}
# Transformers' word in `layer_types` for a layer without attention: caches keep no keys and values for it.
NO_ATTENTION = "moe"
FULL, SLIDING = "full_attention", "sliding_attention"


@strict
class PrunedConfig(PreTrainedConfig):
    """Configuration of a nonuniform Llama-style model.

    `num_attention_heads`, `num_key_value_heads` and `intermediate_size` are the largest of all layers, for tools that read
    them; the lists beside them say what each layer has. 0 means that a layer lacks this sublayer, its norm included. What is
    not given follows: lists from the largest sizes, these from the lists.

    Args:
        layer_num_attention_heads (`list[int]`, *optional*): Query heads per layer; 0 for a layer without attention.
        layer_num_key_value_heads (`list[int]`, *optional*): KV heads per layer.
        layer_intermediate_size (`list[int]`, *optional*): Inner width of the MLP per layer; 0 for a layer without MLP.
        attention_bias (`bool`, *optional*): Biases of q, k and v.
        attention_output_bias (`bool`, *optional*): Bias of o; as `attention_bias` when not given.
        qk_norm (`bool`, *optional*): Queries and keys are normalised per head (Qwen3).
        layer_types (`list[str]`, *optional*): `full_attention` or `sliding_attention` per layer, `moe` (transformers' word)
            without attention; all sliding when there is a `sliding_window`.
        no_rope_layers (`list[int]`, *optional*): 1 for a layer with rotary positions, 0 without (SmolLM3).
        attention_multiplier (`float`, *optional*): Factor of the attention logits; 1 / sqrt(head_dim) when not given.
        stock_model_type (`str`, *optional*): The stock model type it was made from, which `export` writes.

    The other arguments are those of `LlamaConfig`, and Granite's multipliers.

    Example:

    ```python
    >>> config = PrunedConfig.from_stock(LlamaConfig(num_hidden_layers=2), layer_intermediate_size=[11008, 5504])
    >>> config.intermediate_size
    11008
    ```
    """

    model_type = "minitron_pruned"
    default_theta = 10_000.0
    base_model_pp_plan = LlamaConfig.base_model_pp_plan

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    head_dim: int | None = None
    layer_num_attention_heads: list[int] | None = None
    layer_num_key_value_heads: list[int] | None = None
    layer_intermediate_size: list[int] | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    attention_multiplier: float | int | None = None
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    logits_scaling: float | int = 1.0
    stock_model_type: str | None = None

    def __post_init__(self, **kwargs):
        """Fill what follows from the rest, and refuse what does not fit together."""
        layers = self.num_hidden_layers
        if self.layer_num_attention_heads is None:
            self.layer_num_attention_heads = [self.num_attention_heads or 32] * layers
        if self.layer_num_key_value_heads is None:
            kv_heads = self.num_key_value_heads
            self.layer_num_key_value_heads = [(kv_heads or heads) if heads else 0 for heads in self.layer_num_attention_heads]
        if self.layer_intermediate_size is None:
            self.layer_intermediate_size = [self.intermediate_size or 11008] * layers
        self._check_sizes()
        for key, name in LIST_OF.items():
            setattr(self, key, max(getattr(self, name)))
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.layer_types is None:
            self.layer_types = [FULL if self.sliding_window is None else SLIDING] * layers
        self._check_layers()
        self.layer_types = [
            kind if heads else NO_ATTENTION
            for kind, heads in zip(self.layer_types, self.layer_num_attention_heads, strict=True)
        ]
        self.base_model_tp_plan = (Qwen3Config if self.qk_norm else LlamaConfig).base_model_tp_plan
        kwargs["auto_map"] = kwargs.get("auto_map") or {
            "AutoConfig": "configuration_pruned.PrunedConfig",
            "AutoModel": "modeling_pruned.PrunedModel",
            "AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM",
        }
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        """Refuse lists that do not fit the number of layers, each other or the largest sizes."""
        for key, name in LIST_OF.items():
            sizes, largest = getattr(self, name), getattr(self, key)
            if len(sizes) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(sizes)} entries; it needs one for each of {self.num_hidden_layers} layers")
            if any(type(size) is not int or size < 0 for size in sizes) or not any(sizes):
                raise ValueError(
                    f"{name} must hold integers, 0 where a layer lacks this sublayer, and not in every layer: {sizes}"
                )
            if largest not in (None, max(sizes)):
                raise ValueError(f"{key} is {largest}, but the largest of {name} is {max(sizes)}; leave {key} out")
        pairs = zip(self.layer_num_attention_heads, self.layer_num_key_value_heads, strict=True)
        for layer, (heads, kv_heads) in enumerate(pairs):
            if bool(heads) != bool(kv_heads) or (heads and heads % kv_heads):
                raise ValueError(f"Layer {layer} has {heads} attention heads and {kv_heads} KV heads; the first must be a "
                                 "multiple of the second, or both 0")  # fmt: skip

    def _check_layers(self) -> None:
        """Refuse lists of layer kinds that do not fit the layers."""
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        if self.no_rope_layers is not None and len(self.no_rope_layers) < self.num_hidden_layers:
            raise ValueError(f"no_rope_layers has {len(self.no_rope_layers)} entries for {self.num_hidden_layers} layers")
        for layer, (kind, heads) in enumerate(zip(self.layer_types, self.layer_num_attention_heads, strict=True)):
            if heads and kind not in (FULL, SLIDING):
                raise ValueError(f"Layer {layer} has {heads} attention heads and layer type {kind!r}; use {FULL} or {SLIDING}")
            if heads and kind == SLIDING and self.sliding_window is None:
                raise ValueError(f"Layer {layer} is of type {SLIDING}, but there is no sliding_window")

    @property
    def layer_sizes(self) -> Sizes:
        """The three per-layer lists by name."""
        return {name: list(getattr(self, name)) for name in (HEADS, KV_HEADS, FFN)}

    @property
    def per_layer_config(self) -> list["PrunedConfig"]:
        """This config once per layer with the sizes of that layer, as transformers sizes static caches by."""
        configs = []
        for layer in range(self.num_hidden_layers):
            config = copy.copy(self)
            for key, name in LIST_OF.items():
                setattr(config, key, getattr(self, name)[layer])
            configs.append(config)
        return configs

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save the config, and beside it all the code that loads the model where hf_minitron is not installed."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        modeling = Path(__file__).with_name("modeling_pruned.py")  # this file and what it imports is there already
        if modeling.is_file() and modeling.parent != Path(save_directory).resolve():
            shutil.copyfile(modeling, Path(save_directory) / modeling.name)

    @classmethod
    def from_stock(cls, config: PreTrainedConfig, **changes) -> "PrunedConfig":
        """Return the config of the same model as a stock config; uniform unless per-layer lists are given.

        Args:
            config (`PreTrainedConfig`): A config of one of the model types in `STOCK`; it stays unchanged.
            **changes: Anything that `PrunedConfig` takes, such as `layer_num_attention_heads`.
        """
        if config.model_type not in STOCK:
            raise ValueError(
                f"PrunedConfig cannot hold model type {config.model_type!r}; it can hold {', '.join(sorted(STOCK))}"
            )
        names = {field.name for field in fields(cls)} - {"architectures", "transformers_version"}
        values = {key: value for key, value in config.to_dict().items() if key in names}
        for key, name in LIST_OF.items():
            if changes.get(name) is not None:
                values.pop(key)  # the largest of the list
        if changes.get(HEADS) is not None and changes.get(KV_HEADS) is None:
            changes[KV_HEADS] = from_layer_lists(changes[HEADS], [], _sizes_of(config))[KV_HEADS]
            values.pop("num_key_value_heads")
        values["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(**{**values, **STOCK[config.model_type], "stock_model_type": config.model_type, **changes})

    def to_per_layer_config(self) -> dict[int, dict]:
        """Return transformers' `per_layer_config`: what differs from the largest sizes, and `skip`."""
        return to_per_layer_config(self.layer_sizes)

    @classmethod
    def from_per_layer_config(cls, config: PreTrainedConfig, per_layer_config: Mapping[int | str, Mapping]) -> "PrunedConfig":
        """Return the config of a stock model with transformers' `per_layer_config`; layers not in it are as the config says."""
        return cls.from_stock(config, **from_per_layer_config(per_layer_config, _sizes_of(config), config.num_hidden_layers))

    def to_block_configs(self) -> list[dict]:
        """Return NVIDIA's `block_configs`; refused when layers differ in query heads, for which it has no word."""
        return to_block_configs(self.layer_sizes)

    @classmethod
    def from_block_configs(cls, config: PreTrainedConfig, block_configs: Sequence[Mapping]) -> "PrunedConfig":
        """Return the config of a stock model with NVIDIA's `block_configs`."""
        return cls.from_stock(config, **from_block_configs(block_configs, config.num_attention_heads, config.hidden_size))

    def to_layer_lists(self) -> dict[str, list[int]]:
        """Return `layer_head_num` and `layer_inter_size`; refused when layers with groups differ in KV heads."""
        return to_layer_lists(self.layer_sizes)

    @classmethod
    def from_layer_lists(
        cls, config: PreTrainedConfig, layer_head_num: Sequence[int], layer_inter_size: Sequence[int]
    ) -> "PrunedConfig":
        """Return the config of a stock model with `layer_head_num` and `layer_inter_size`; the KV heads stay as they are."""
        return cls.from_stock(config, **from_layer_lists(layer_head_num, layer_inter_size, _sizes_of(config)))


def _sizes_of(config: PreTrainedConfig) -> dict[str, int]:
    return {key: getattr(config, key) for key in LIST_OF}


PrunedConfig.register_for_auto_class()
