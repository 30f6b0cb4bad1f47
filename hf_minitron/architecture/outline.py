"""What a model without weights tells, built on the meta device, and run there: which module gives what another one reads.

Identity of tensors tells: a projection reads a norm when its input is the very tensor that the norm gave, not changed since.
This module reads models; what the names of their parameters mean is the families' business.
"""

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from textwrap import shorten

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from hf_minitron import axes
from hf_minitron.architecture.config import model_of, special_float
from hf_minitron.errors import one_line
from hf_minitron.probe import Visit, base_name, probe

REASON = 400  # characters of a library's error that are passed on
# Attention and routed experts that only give the right shapes: the models' own look at values, which meta tensors have not.
SHAPES_ONLY = "hf_minitron_shapes_only"


@dataclass(frozen=True, eq=False)  # hashed by identity: one for each config
class Outline:
    """What building a model without weights tells.

    Args:
        config (`PreTrainedConfig`): Of the model that was built.
        parameters (`Mapping[str, tuple[int, ...]]`): Name and shape of every parameter and stored buffer; tied ones once.
        tied (`Mapping[str, str]`): Further names of tied parameters, to the name in `parameters`.
        modules (`frozenset[str]`): The names of the modules.
        class_name (`str`): The class of the causal language model.
        prefix (`str`): The name of the model without its head inside the model: `model`, `transformer`.
        renamings (`tuple[WeightRenaming, ...]`): From the names that checkpoints on disk have, or had, to those in memory.
        conversions (`tuple[WeightTransform, ...]`): How names and parts of checkpoints become those in memory.
    """

    config: PreTrainedConfig
    parameters: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    modules: frozenset[str]
    class_name: str
    prefix: str
    renamings: tuple[WeightRenaming, ...] = ()
    conversions: tuple[WeightTransform, ...] = ()

    def parts(self, layer: str) -> set[str]:
        """Return the names of the modules in a layer, such as `layers.0` of the base model."""
        start = f"{self.prefix}.{layer}.".lstrip(".")
        return {name.removeprefix(start).split(".")[0] for name in self.modules if name.startswith(start)}

    @cached_property
    def uses(self) -> dict[str, list[str]]:
        """The modules that have the weights of another one, by that one's name."""
        found: dict[str, list[str]] = {}
        for name, first in self.tied.items():
            found.setdefault(first.rpartition(".")[0], []).append(name.rpartition(".")[0])
        return found

    def in_memory(self, name: str) -> str:
        """Return the name in memory of a tensor on disk, as loading it would; of one that is renamed only, not converted."""
        return rename_source_key(name, list(self.renamings), [], self.prefix, self.parameters)[0]


def outline(config: PreTrainedConfig) -> Outline:
    """Build a model of a config without weights; one of an equal config is built once.

    Raises:
        AxisError: for a config that does not make a causal language model.
    """
    content = json.loads(config.to_json_string(use_diff=False))
    return _outline(type(config), json.dumps({key: value for key, value in content.items() if key != "_name_or_path"}))


@lru_cache(maxsize=64)
def _outline(kind: type[PreTrainedConfig], content: str) -> Outline:
    try:
        model = _build(kind, content)
    except Exception as error:  # config classes and modules raise their own kinds
        reason = shorten(f"{type(error).__name__}: {one_line(error)}", REASON, placeholder=" ...")
        raise axes.AxisError(f"A {kind.__name__} does not make a causal language model ({reason})") from error
    first = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    tied = {name: first[parameter] for name, parameter in every if first[parameter] != name}
    shapes, stored = {name: tuple(parameter.shape) for parameter, name in first.items()}, model.state_dict().keys()
    shapes |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in stored}
    modules = frozenset(name for name, _ in model.named_modules())
    known = get_model_conversion_mapping(model, add_legacy=False)
    renamings = tuple(renaming for renaming in known if isinstance(renaming, WeightRenaming))
    config, class_name = _config(kind, content), type(model).__name__
    return Outline(config, shapes, tied, modules, class_name, base_name(model), renamings, _conversions(known))


def _conversions(known: Iterable[WeightTransform]) -> tuple[WeightTransform, ...]:
    """Return the conversions that only rename the tensors of a checkpoint or put them together, which a cut can go through."""
    return tuple(
        conversion
        for conversion in known
        if not isinstance(conversion, PrefixChange)
        and not (
            isinstance(conversion, WeightConverter)
            and {type(operation) for operation in conversion.operations} - {MergeModulelist, Concatenate}
        )
    )


def _config(kind: type[PreTrainedConfig], content: str) -> PreTrainedConfig:
    return kind.from_dict(json.loads(content, object_hook=special_float))


def _build(kind: type[PreTrainedConfig], content: str, **kwargs) -> PreTrainedModel:
    with torch.device("meta"):
        config = _config(kind, content)
        return model_of(config, **kwargs)


@dataclass(frozen=True)
class Trace:
    """What one forward pass has shown.

    Args:
        reads (`Mapping[str, tuple[str, ...]]`): Module to the modules that gave the tensor it was called with, the whole base
            model among them. Only of modules that were called once, by modules that were called once.
        inputs (`Mapping[str, int]`): Module to a number of that tensor, equal for modules that read the same one.
        transposed (`frozenset[str]`): The modules whose weights have their input dimension first.
        modules (`Mapping[str, Module]`): All of them, without weights.
        tuples (`Mapping[str, int]`): The modules that give a tuple or a list, and its length.
    """

    reads: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, int]
    transposed: frozenset[str]
    modules: Mapping[str, nn.Module]
    tuples: Mapping[str, int]


@torch.inference_mode(False)  # whoever calls: its tensors have no versions
@torch.no_grad()
def trace(config: PreTrainedConfig) -> Trace:
    """Run a model of a config without weights and return which module reads what.

    Raises:
        ValueError: for a model that cannot be run without weights.
    """
    # one dtype for all: a tensor that a class casts to another (a norm in float32) would not be the one that was given
    build = partial(_build, type(config), config.to_json_string(use_diff=False), dtype=torch.float32)
    try:
        model = build(attn_implementation=SHAPES_ONLY, experts_implementation=SHAPES_ONLY).eval()
    except KeyError:  # its attention is one of a few classes, chosen by name
        model = build(attn_implementation="eager").eval()
    failure: Exception | None = None
    # some classes look at the values of a mask of tokens, some at those of positions where there is no mask
    for mask in (torch.ones(1, 2, dtype=torch.long, device="meta"), torch.ones(1, 1, 2, 2, device="meta"), None):
        try:
            calls = _run(model, mask)
            break
        except Exception as error:  # models raise their own kinds
            failure = error
    else:
        raise ValueError(
            f"Cannot see which norms the projections of model type {config.model_type!r} read: {one_line(failure)}. "
            "Score it without moments and prune it without corrections"
        ) from failure
    once = {name for name, count in calls.counts.items() if count == 1}
    givers: dict[tuple, list[str]] = {}
    for name, key in calls.outputs.items():
        if name in once:
            givers.setdefault(key, []).append(name)
    reads = {name: tuple(givers.get(key, ())) for name, key in calls.inputs.items() if name in once}
    numbers = {key: number for number, key in enumerate(dict.fromkeys(calls.inputs.values()))}
    transposed = frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))
    inputs = {name: numbers[key] for name, key in calls.inputs.items()}
    return Trace(reads, inputs, transposed, dict(model.named_modules()), calls.tuples)


def _run(model: PreTrainedModel, mask: Tensor | None) -> "_Calls":
    calls, ids = _Calls(), torch.zeros(1, 2, dtype=torch.long, device="meta")
    with probe(model, [(name, calls.record) for name, _ in model.named_modules()]):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return calls


class _Calls:
    """Keys of the tensors that modules were given and gave, the last call's where there were several."""

    def __init__(self):
        self.counts: dict[str, int] = {}
        self.inputs: dict[str, tuple] = {}
        self.outputs: dict[str, tuple] = {}
        self.tuples: dict[str, int] = {}
        self._alive: list[Tensor] = []  # so that no storage's address is given to another tensor

    def record(self, visit: Visit) -> None:
        """Count a call of a module, and keep what it was given and what it gave."""
        self.counts[visit.name] = self.counts.get(visit.name, 0) + 1
        if isinstance(visit.output, tuple | list):
            self.tuples[visit.name] = len(visit.output)
        for found, value in ((self.inputs, [*visit.args, *visit.kwargs.values()]), (self.outputs, visit.output)):
            first = _first(value)
            if first is not None:
                self._alive.append(first)
                # views have one storage and one version, which a change in place raises
                found[visit.name] = (first.untyped_storage()._cdata, first._version, first.storage_offset(), first.numel())


def _first(value: object) -> Tensor | None:
    """Return the tensor of a module's arguments or output that holds its states; token ids are none."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return next((tensor for tensor in values if isinstance(tensor, Tensor) and tensor.is_floating_point()), None)


def norm_offset(model_type: str, modules: Mapping[str, nn.Module], norms: Iterable[str]) -> float:
    """Return what norms add to their stored weights, tried out: 1 where zeros scale nothing.

    Args:
        model_type (`str`): For the message.
        modules (`Mapping[str, Module]`): Of a `Trace`.
        norms (`Iterable[str]`): The names of the norms.

    Raises:
        ValueError: for norms that are not alike in this.
    """
    kinds = {type(modules[name]): modules[name] for name in norms if hasattr(modules[name], "weight")}
    found = {kind.__name__: _offset(norm) for kind, norm in kinds.items()}
    if len(set(found.values())) > 1:
        raise ValueError(f"The norms of model type {model_type!r} add different numbers to their weights: {found}. "
                         "Prune it with corrections: []")  # fmt: skip
    return next(iter(found.values()), 0.0)


@torch.no_grad()
def _offset(norm: nn.Module) -> float:
    norm = copy.deepcopy(norm).to_empty(device="cpu").double()
    states = torch.arange(1.0, 1 + norm.weight.shape[-1], dtype=torch.float64)[None]
    for parameter in norm.parameters():
        parameter.zero_()
    zeros = norm(states)
    norm.weight.fill_(1)
    return round(float((zeros / (norm(states) - zeros)).mean()), 3)


def _shapes_only_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    batch, heads, seq, _ = query.shape
    return query.new_empty(batch, seq, heads, value.shape[-1]), None


def _shapes_only_mask(batch_size: int, q_length: int, kv_length: int, *, device: torch.device, **kwargs) -> Tensor:
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)


def _shapes_only_experts(module: nn.Module, hidden_states: Tensor, *args) -> Tensor:
    return torch.empty_like(hidden_states)


AttentionInterface.register(SHAPES_ONLY, _shapes_only_attention)
AttentionMaskInterface.register(SHAPES_ONLY, _shapes_only_mask)
ALL_EXPERTS_FUNCTIONS.register(SHAPES_ONLY, _shapes_only_experts)
