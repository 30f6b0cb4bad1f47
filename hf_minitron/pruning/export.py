"""Export to what every engine loads: the text model of a vision-language model alone, or a nonuniform model padded with zeros.

The latter is a uniform stock checkpoint with equal logits. It costs the memory and the speed of the largest layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture, Parameter
from hf_minitron.architecture.student import stock_config
from hf_minitron.architecture.vision import TOWERS
from hf_minitron.checkpoint.checkpoint import (
    DTYPES,
    Checkpoint,
    TensorSpec,
    complete_or_absent,
    require_space,
    stored_dtype,
    write_tensors,
)
from hf_minitron.checkpoint.saving import copy_side_files, save_config
from hf_minitron.errors import one_line
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.plan import Plan
from hf_minitron.pruning.prune import prune_checkpoint
from hf_minitron.shape import Shape, ShapeError


@dataclass(frozen=True)
class _Padding:
    """A nonuniform model, and the stock model that holds every layer of it.

    Query heads stay in the group of their KV head: a layer's heads are its KV heads times the heads of a group, and each of
    the two is padded by itself.
    """

    before: Architecture
    after: Architecture
    config: PreTrainedConfig

    def pad(self, tensor: Tensor, parameter: Parameter) -> Tensor:
        """Return a parameter with zeros where its layer has fewer heads or channels than the largest: pruning backwards."""
        own, largest = self.before.shape.of_layer(parameter.layer), self.after.shape
        heads = torch.arange(largest["heads"]).view(largest.kv_groups, -1)
        heads = heads[: own.kv_groups, : own["heads"] // max(1, own.kv_groups)].flatten()
        kept = {"heads": heads, **{axis: torch.arange(own[axis]) for axis in ("kv_heads", "ffn") if axis in own.axes}}
        for position, dim in enumerate(parameter.dims):
            index = axes.dim_index(dim, kept, largest.sizes)
            if index is not None:
                shape = list(tensor.shape)
                shape[position] = axes.dim_size(dim, largest.sizes)
                tensor = tensor.new_zeros(shape).index_copy_(position, index, tensor)
        return tensor


def export(source: Path, target: Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a nonuniform model folder as a uniform stock checkpoint with equal logits, tensor by tensor.

    Heads and channels that a layer lacks are zeros, as is all that an absent attention or MLP would add. Of a vision-language
    model the text model is written alone, as its causal class, which runtimes for text and their converters read.

    Args:
        source (`Path`): A folder that `PrunedForCausalLM` was saved to, or that of a vision-language model.
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
    if config.model_type in TOWERS:
        shape = Architecture.of(config).shape
        prune_checkpoint(source, Plan(shape, shape, {}), target, max_shard_bytes, text_only=True)
        return
    if not isinstance(config, PrunedConfig):
        kind = config.model_type
        raise ValueError(f"{source} holds a {kind!r}, which is a stock model already; export takes nonuniform ones, and "
                         "vision-language ones, of which it writes the text model alone")  # fmt: skip
    padding, checkpoint = _padding_of(config), Checkpoint(source)
    dtype, present = checkpoint.specs["model.embed_tokens.weight"].dtype, padding.before.parameters
    absent = [name for name in present if name not in checkpoint.specs]
    if absent:
        raise ValueError(f"The checkpoint {source} lacks the parameter {absent[0]!r}")
    specs = {
        name: TensorSpec(checkpoint.specs[name].dtype if name in present else dtype, parameter.shape)
        for name, parameter in padding.after.parameters.items()
    }
    with complete_or_absent(target) as folder:
        require_space(folder, sum(spec.num_bytes for spec in specs.values()), f"the export {target}")
        write_tensors(folder, specs, _padded_tensors(specs, checkpoint, padding), max_shard_bytes)
        save_config(padding.config, folder, dtype=stored_dtype(specs.values()))
        copy_side_files(source, folder)


def _padded_tensors(
    specs: Mapping[str, TensorSpec], checkpoint: Checkpoint, padding: _Padding
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield every parameter of the stock model; of a sublayer that is absent, ones for the norm and zeros for the rest."""
    for name, spec in specs.items():
        if name in padding.before.parameters:
            yield name, [padding.pad(checkpoint.read(name), padding.before.parameters[name])]
        else:
            fill = torch.ones if padding.after.parameters[name].role == "norm" else torch.zeros
            yield name, [fill(spec.shape, dtype=DTYPES[spec.dtype])]


def _padding_of(config: PrunedConfig) -> _Padding:
    """Return how a model is padded, into its own stock class or one with equal logits.

    Raises:
        ShapeError: when neither class holds the shape, or padding would change what the model computes.
    """
    before = Architecture.of(config)
    after = _uniform(before.shape)
    for axis in ("heads", "kv_heads", "ffn"):
        if axis in before.inexact and any(before.shape.at(i)[axis] not in (0, after[axis]) for i in range(after["layers"])):
            raise ShapeError(f"{axis} cannot be padded in a model of {config.stock_model_type}: {before.inexact[axis]}")
    reasons, fallback = [], before.family.fallback_config if not before.family.fallback_rows else {}
    for changes in [{}, fallback] if fallback else [{}]:
        try:
            stock = stock_config(before, after, range(after["layers"]), changes)
            made = Architecture.of(stock)
        except Exception as error:  # config classes and modules raise their own kinds
            reasons.append(one_line(error))
            continue
        stock.architectures, stock.name_or_path = [made.outline.class_name], ""
        lost = [name for name in before.parameters if name not in made.parameters]
        if not lost:
            return _Padding(before, made, stock)
        reasons.append(f"{type(stock).__name__} makes no {lost[0]!r}")
    group = after["heads"] // after.kv_groups
    raise ShapeError(f"No stock class holds {after.kv_groups} KV heads with {group} query heads each, hidden {after['hidden']} "
                     f"and ffn {after['ffn']}: {'; '.join(reasons)}")  # fmt: skip


def _uniform(shape: Shape) -> Shape:
    """Return the shape in which every layer of a shape can be padded to fit."""
    sizes = {**shape.sizes, "heads": shape.kv_groups * shape.largest_group}
    return replace(shape, sizes=sizes, by_layer={})
