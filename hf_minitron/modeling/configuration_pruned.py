"""`PrunedConfig`: the config of a stock class whose layers differ in heads, KV heads and inner width, or lack a sublayer.

Copied beside saved models, so it imports nothing of hf_minitron.
"""

import copy
import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers

from .layer_schemas import (  # noqa: TID252  remote code is imported by its folder
    HEADS,
    KV_HEADS,
    LIST_OF,
    SKIPPED,
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


if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
    raise unusable("it is older")
try:
    from huggingface_hub.dataclasses import strict
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig
except ImportError as error:
    raise unusable(error) from error

# Keys that are written for its own class.
OWN = ("auto_map", "architectures", "model_type", "transformers_version")


class PrunedConfig(PreTrainedConfig):
    """Configuration of a nonuniform model: that of its stock class, and lists of what differs from layer to layer.

    An instance is one of the stock config's class too. `num_attention_heads`, `num_key_value_heads` and `intermediate_size`
    are the largest of all layers, for tools that read them. 0 means that a layer lacks this sublayer, its norms included. What
    is not given follows: lists from the largest sizes, these from the lists.

    Args:
        stock_model_type (`str`, *optional*, defaults to `"llama"`): The model type of the stock class.
        layer_num_attention_heads (`list[int]`, *optional*): Query heads per layer; 0 for a layer without attention.
        layer_num_key_value_heads (`list[int]`, *optional*): KV heads per layer.
        layer_intermediate_size (`list[int]`, *optional*): Inner width of the MLP per layer; 0 for a layer without MLP.

    The other arguments are those of the stock config.

    Example:

    ```python
    >>> from transformers import LlamaConfig

    >>> config = PrunedConfig.from_stock(LlamaConfig(num_hidden_layers=2), layer_intermediate_size=[11008, 5504])
    >>> config.intermediate_size
    11008
    ```
    """

    model_type = "minitron_pruned"

    stock_model_type: str = "llama"
    layer_num_attention_heads: list[int] | None = None
    layer_num_key_value_heads: list[int] | None = None
    layer_intermediate_size: list[int] | None = None

    def __new__(cls, *args, stock_model_type: str = "llama", **kwargs):
        for key, name in LIST_OF.items():
            sizes, size = kwargs.get(name) or [0], kwargs.get(key)
            if any(sizes) and size not in (None, max(sizes)):
                raise ValueError(f"{key} is {size}, but the largest of {name} is {max(sizes)}; leave {key} out")
        return super().__new__(_class_of(stock_model_type) if cls is PrunedConfig else cls)

    def __reduce__(self):
        return _empty, (self.stock_model_type,), self.__dict__.copy()

    def __post_init__(self, **kwargs):
        """Fill what follows from the rest, and refuse what does not fit together."""
        if self.layer_num_attention_heads is not None and self.layer_num_key_value_heads is None:
            kv_heads = getattr(self, "num_key_value_heads", None)
            self.layer_num_key_value_heads = [heads and (kv_heads or heads) for heads in self.layer_num_attention_heads]
        self._check_sizes()
        for key, name in LIST_OF.items():
            if any(getattr(self, name) or ()):  # else the class is made with the sizes that it would have
                setattr(self, key, max(getattr(self, name)))
        self._read_older_layer_types()
        kwargs["auto_map"] = kwargs.get("auto_map") or {
            "AutoConfig": "configuration_pruned.PrunedConfig",
            "AutoModel": "modeling_pruned.PrunedModel",
            "AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM",
        }
        super().__post_init__(**kwargs)
        for key, name in LIST_OF.items():
            if getattr(self, name) is None:
                setattr(self, name, [_size(self, key)] * self.num_hidden_layers)
        self._check_heads()

    def _check_sizes(self) -> None:
        """Refuse lists that do not fit the number of layers, or the largest sizes."""
        for name in LIST_OF.values():
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if len(sizes) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(sizes)} entries; it needs one for each of {self.num_hidden_layers} layers")
            if any(type(size) is not int or size < 0 for size in sizes):
                raise ValueError(f"{name} must hold integers, 0 where a layer lacks this sublayer: {sizes}")

    def _read_older_layer_types(self) -> None:
        """Read what an older version wrote: `moe` where there is no attention, sliding layers without their switch."""
        types, heads = getattr(self, "layer_types", None), self.layer_num_attention_heads
        if types and heads and "moe" in types:
            other = next((kind for kind in types if kind != "moe"), "full_attention")
            self.layer_types = [kind if own else other for kind, own in zip(types, heads, strict=True)]
        if types and "sliding_attention" in types and hasattr(self, "use_sliding_window"):
            self.use_sliding_window = True

    def _check_heads(self) -> None:
        """Refuse query heads that do not divide over the KV heads of their layer."""
        pairs = zip(self.layer_num_attention_heads, self.layer_num_key_value_heads, strict=True)
        for layer, (heads, kv_heads) in enumerate(pairs):
            if bool(heads) != bool(kv_heads) or (heads and heads % kv_heads):
                raise ValueError(f"Layer {layer} has {heads} attention heads and {kv_heads} KV heads; the first must be a "
                                 "multiple of the second, or both 0")  # fmt: skip

    def validate_architecture(self) -> None:
        """Check nothing: what a stock class says of its largest sizes need not hold for the layers."""

    @property
    def layer_sizes(self) -> Sizes:
        """The three per-layer lists by name."""
        return {name: list(getattr(self, name)) for name in LIST_OF.values()}

    @property
    def per_layer_config(self) -> list["PrunedConfig"]:
        """This config once per layer with the sizes of that layer, and in `skip` what it lacks, as transformers has it."""
        configs = []
        for layer in range(self.num_hidden_layers):
            config = copy.copy(self)
            for key, name in LIST_OF.items():
                if size := getattr(self, name)[layer]:
                    setattr(config, key, size)
            config.skip = [part for part, (key, *_) in SKIPPED.items() if not getattr(self, LIST_OF[key])[layer]]
            configs.append(config)
        return configs

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """`reuse` for layers without attention: caches keep no keys and values for them, but count tokens by another one."""
        modes = [None if heads else "reuse" for heads in self.layer_num_attention_heads]
        return modes if None in modes else None

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
            config (`PreTrainedConfig`): A stock config, or one of these; it stays unchanged.
            **changes: Anything that the stock config takes, and per-layer lists, such as `layer_num_attention_heads`.
        """
        values = {key: value for key, value in config.to_dict().items() if key not in OWN}
        for key, name in LIST_OF.items():
            if any(changes.get(name) or ()):
                values.pop(key, None)  # the largest of the list
        if changes.get(HEADS) is not None and changes.get(KV_HEADS) is None:
            changes[KV_HEADS] = from_layer_lists(changes[HEADS], [], _sizes_of(config))[KV_HEADS]
        if "head_dim" not in changes:
            values["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(**{"stock_model_type": config.model_type, **values, **changes})

    def to_stock(self, model_type: str | None = None, **changes) -> PreTrainedConfig:
        """Return the config of the stock class, or that of another model type, with the largest sizes in every layer."""
        own = {*OWN, *LIST_OF.values(), "stock_model_type"}
        values = {key: value for key, value in self.to_dict().items() if key not in own}
        return CONFIG_MAPPING[model_type or self.stock_model_type].from_dict(values | changes)

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
    return {key: _size(config, key) for key in LIST_OF}


def _size(config: PreTrainedConfig, key: str) -> int:
    """Return a size of a config; where every head has its own key and value, KV heads have no key."""
    size = getattr(config, key, None)
    return config.num_attention_heads if size is None and key == "num_key_value_heads" else size


@functools.cache
def _class_of(stock_model_type: str) -> type[PrunedConfig]:
    """Return the class of the configs of a stock model type: its stock class with the lists."""
    if stock_model_type not in CONFIG_MAPPING:
        raise ValueError(f"stock_model_type is {stock_model_type!r}, which is no model type of transformers; it is the one "
                         "that this model is a cut of, such as 'llama'")  # fmt: skip
    named = {"__module__": __name__, "__qualname__": PrunedConfig.__qualname__, "__doc__": PrunedConfig.__doc__}
    made = strict(type(PrunedConfig.__name__, (PrunedConfig, CONFIG_MAPPING[stock_model_type]), named))
    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if PrunedConfig in mapping:
            mapping.register(made, mapping[PrunedConfig])
    return made


def _empty(stock_model_type: str) -> PrunedConfig:
    """Return a config without values, for copies and pickles to fill."""
    return object.__new__(_class_of(stock_model_type))


PrunedConfig.register_for_auto_class()
