"""Export: a nonuniform model padded with zeros to a uniform stock checkpoint with equal logits, which every engine loads.

It costs the memory and the speed of the largest layer.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from hf_minitron import axes
from hf_minitron.architecture.family import FAMILIES
from hf_minitron.architecture.llama import LLAMA_ROWS
from hf_minitron.architecture.outline import outline
from hf_minitron.checkpoint import (
    DTYPES,
    Checkpoint,
    TensorSpec,
    complete_or_absent,
    require_space,
    stored_dtype,
    write_tensors,
)
from hf_minitron.errors import one_line
from hf_minitron.modeling.configuration_pruned import FULL, NO_ATTENTION, PrunedConfig
from hf_minitron.modeling.layer_schemas import LIST_OF
from hf_minitron.saving import copy_side_files, save_config
from hf_minitron.shape import ShapeError


@dataclass(frozen=True)
class _Padding:
    """The stock config that holds every layer, and for each layer its sizes and those it gets.

    Query heads stay in the group of their KV head: a layer's heads are its KV heads times the heads of a group, and each of
    the two is padded by itself.
    """

    config: PreTrainedConfig
    before: tuple[Mapping[str, int], ...]
    after: Mapping[str, int]

    def pad(self, tensor: Tensor, row: str, layer: int | None) -> Tensor:
        """Return a parameter with zeros where its layer has fewer heads or channels than the largest."""
        if layer is None:
            return tensor
        for position, dim in enumerate(axes.parse(_ROWS[row])):
            (term,) = dim
            before, after = ([sizes[axis] for axis in term] for sizes in (self.before[layer], self.after))
            if before != after:
                padded = tensor.new_zeros(*tensor.shape[:position], *after, *tensor.shape[position + 1 :])
                kept = (slice(None),) * position + tuple(slice(size) for size in before)
                padded[kept] = tensor.unflatten(position, before)
                tensor = padded.flatten(position, position + len(term) - 1)
        return tensor


# Llama's rows; query heads by the group they are in.
_ROWS = {row: pattern.replace("(heads ", "(kv_heads group ") for row, pattern in LLAMA_ROWS.items()}


def export(source: Path, target: Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a nonuniform model folder as a uniform stock checkpoint with equal logits, tensor by tensor.

    Heads and channels that a layer lacks are zeros, as is all that an absent attention or MLP would add.

    Args:
        source (`Path`): A folder that `PrunedForCausalLM` was saved to.
        target (`Path`): The new folder; it has its name only once it is complete.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB): Size limit of one shard.

    Raises:
        ValueError: when the folder holds another model or lacks a parameter.
        ShapeError: when no stock class holds the padded shape.

    Example:

    ```python
    >>> from hf_minitron.modeling import PrunedConfig, PrunedForCausalLM
    >>> sizes = [1536, 768] * (teacher.config.num_hidden_layers // 2)
    >>> PrunedForCausalLM(PrunedConfig.from_stock(teacher.config, layer_intermediate_size=sizes)).save_pretrained("pruned")
    >>> export(Path("pruned"), Path("padded"))
    >>> AutoModelForCausalLM.from_pretrained("padded").config.model_type
    'llama'
    ```
    """
    config = AutoConfig.from_pretrained(source)
    if not isinstance(config, PrunedConfig):
        raise ValueError(
            f"{source} holds a {config.model_type!r}, which is a stock model already; export takes nonuniform ones"
        )
    padding, checkpoint = _padding_of(config), Checkpoint(source)
    dtype = checkpoint.specs["model.embed_tokens.weight"].dtype
    shapes, present = outline(padding.config).parameters, outline(config).parameters
    absent = [name for name in present if name not in checkpoint.specs]
    if absent:
        raise ValueError(f"The checkpoint {source} lacks the parameter {absent[0]!r}")
    specs = {
        name: TensorSpec(checkpoint.specs[name].dtype if name in present else dtype, shape) for name, shape in shapes.items()
    }
    with complete_or_absent(target) as folder:
        require_space(folder, sum(spec.num_bytes for spec in specs.values()), f"the export {target}")
        write_tensors(folder, specs, _padded_tensors(specs, checkpoint, present, padding), max_shard_bytes)
        save_config(padding.config, folder, dtype=stored_dtype(specs.values()))
        copy_side_files(source, folder)


def _padded_tensors(
    specs: Mapping[str, TensorSpec], checkpoint: Checkpoint, present: Mapping[str, object], padding: _Padding
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield every parameter of the stock model; of a sublayer that is absent, ones for the norm and zeros for the rest."""
    for name, spec in specs.items():
        row, indices = axes.match(name, _ROWS)
        if name in present:
            yield name, [padding.pad(checkpoint.read(name), row, axes.layer_index(indices))]
        else:
            fill = torch.ones if "norm" in row else torch.zeros
            yield name, [fill(spec.shape, dtype=DTYPES[spec.dtype])]


def _padding_of(config: PrunedConfig) -> _Padding:
    """Return how a model is padded, into its own stock class or one with equal logits.

    Raises:
        ValueError: for a config that does not say which stock model it comes from.
        ShapeError: when neither class holds the shape.
    """
    if config.stock_model_type not in CONFIG_MAPPING:
        raise ValueError(f"stock_model_type in config.json is {config.stock_model_type!r}; export needs the stock model type "
                         "that this model is a cut of, such as 'llama'")  # fmt: skip
    fixed = {"head_dim": config.head_dim, "hidden": config.hidden_size}
    lists = zip(*config.layer_sizes.values(), strict=True)
    before = tuple(
        {**fixed, "kv_heads": kv_heads, "group": heads // max(kv_heads, 1), "ffn": ffn} for heads, kv_heads, ffn in lists
    )
    after = {axis: max(sizes[axis] for sizes in before) for axis in before[0]}
    fallback = FAMILIES[config.stock_model_type].fallback_config
    reasons = []
    for changes in [{}, fallback] if fallback else [{}]:
        try:
            stock = _stock_config(config, after, changes)
            wrong = _config_mismatch(stock, config)
        except Exception as error:  # config classes and modules raise their own kinds
            wrong = one_line(error)
        if not wrong:
            return _Padding(stock, before, after)
        reasons.append(wrong)
    raise ShapeError(f"No stock class holds {after['kv_heads']} KV heads with {after['group']} query heads each, hidden "
                     f"{after['hidden']} and ffn {after['ffn']}: {'; '.join(reasons)}")  # fmt: skip


def _stock_config(config: PrunedConfig, after: Mapping[str, int], changes: Mapping[str, object]) -> PreTrainedConfig:
    """Return the uniform config of the stock class with a model's other settings."""
    kind = CONFIG_MAPPING[changes.get("model_type", config.stock_model_type)]
    names = {field.name for field in dataclasses.fields(kind)} - {"architectures", "transformers_version"}
    values = {key: value for key, value in config.to_dict().items() if key in names}
    values |= {
        "num_key_value_heads": after["kv_heads"],
        "num_attention_heads": after["kv_heads"] * after["group"],
        "intermediate_size": after["ffn"],
        "head_dim": config.head_dim,
        "layer_types": [FULL if kind == NO_ATTENTION else kind for kind in config.layer_types],
        "use_sliding_window": config.sliding_window is not None,
    }
    stock = kind.from_dict({key: value for key, value in values.items() if key in names | {"head_dim"}} | dict(changes))
    stock.architectures = [outline(stock).class_name]
    return stock


def _config_mismatch(stock: PreTrainedConfig, config: PrunedConfig) -> str:
    """Return what a stock config cannot say of a nonuniform one, sizes apart; empty when its model gives equal logits."""
    outline(stock)  # its class may refuse the shape only now
    back = PrunedConfig.from_stock(stock)
    pairs = zip(config.layer_types, back.layer_types, strict=True)
    wrong = [] if all(kind in (NO_ATTENTION, other) for kind, other in pairs) else ["layer_types"]
    settings = {field.name for field in dataclasses.fields(config)} - {
        field.name for field in dataclasses.fields(PreTrainedConfig)
    }
    settings -= {*LIST_OF, *LIST_OF.values(), "layer_types", "stock_model_type"}
    wrong += sorted(key for key in settings if getattr(config, key) != getattr(back, key))
    name = type(stock).__name__
    return f"{name} has {wrong[0]} {getattr(back, wrong[0])!r}, not {getattr(config, wrong[0])!r}" if wrong else ""
