"""Taps: hooks on a model's modules that hand what passes there to metrics, one metric per axis and place.

It must not know how a metric computes its score, nor who runs the model.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_minitron import axes
from hf_minitron.families.family import Family, base_prefix
from hf_minitron.importance.activation import ActivationNorm
from hf_minitron.importance.experts import RoutedOutputNorm
from hf_minitron.importance.layers import BlockImportance
from hf_minitron.importance.moments import ChannelEnergy, SecondMoment
from hf_minitron.pruning.compensate import moments_path


class Metric(Protocol):
    """What an importance metric must have."""

    totals: list[Tensor | float]  # sums over batches: processes that have seen other batches add theirs

    def update(self, activation: Tensor | tuple[Tensor, Tensor], mask: Tensor | None = None) -> None:
        """Add one batch: `(batch, seq, size)`, or for `layers` a pair of `(batch, seq, hidden)`."""

    def finish(self) -> Tensor:
        """Return the score of every index."""


METRICS: dict[str, type[Metric]] = {
    "ffn": ActivationNorm,
    "dense_ffn": ActivationNorm,
    "shared_ffn": ActivationNorm,
    "heads": ActivationNorm,
    "hidden": ActivationNorm,
    "layers": BlockImportance,
    "experts": RoutedOutputNorm,
}


# What corrections need, read at the taps of the same axis; their readings' axis is named so.
MOMENT = ".moment"
MOMENTS: dict[str, type[Metric]] = {
    "ffn": SecondMoment,
    "dense_ffn": SecondMoment,
    "shared_ffn": SecondMoment,
    "heads": SecondMoment,
    "hidden": ChannelEnergy,
}


@dataclass(frozen=True)
class Reading:
    """What one tap has read: of the routed experts' `ffn` one metric per expert, else one metric.

    Args:
        axis (`str`): The axis it scores.
        layer (`int`, *optional*): The model's layer; `None` outside of the layers.
        module (`str`): Full name of the module.
        metrics (`list`): Its metrics.
    """

    axis: str
    layer: int | None
    module: str
    metrics: list[Metric]

    def add_up_processes(self) -> None:
        """Let the totals of all processes of `accelerate launch` be everybody's."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for metric in self.metrics:
                metric.totals = [reduce(total, "sum") for total in metric.totals]

    def finish(self) -> Tensor:
        """Return the score: `(size,)`, `(experts, size)` of a routed axis, or a scalar of a layer."""
        scores = [metric.finish() for metric in self.metrics]
        return torch.stack(scores) if self.axis == "ffn" and self.module.endswith(".experts") else scores[0]


@dataclass
class Taps:
    """The open taps of a model.

    Args:
        readings (`list[Reading]`): One per axis and place.
        mask (`Tensor` of shape `(batch, seq)`, *optional*): 1 for text, 0 for padding in the batch that is under way.
        batch_shape (`tuple[int, int]`): `(batch, seq)` of that batch.
    """

    readings: list[Reading] = field(default_factory=list)
    mask: Tensor | None = None
    batch_shape: tuple[int, int] = (0, 0)

    def run(self, model: PreTrainedModel, batch: Mapping[str, Tensor], device: torch.device) -> None:
        """Run one batch through the model, without its output head, which scores nothing.

        Raises:
            ValueError: naming the tensor, when weights or activations hold NaN or infinity.
        """
        ids, self.mask = batch["input_ids"].to(device), batch.get("attention_mask")
        self.batch_shape = tuple(ids.shape)
        mask = None if self.mask is None else self.mask.to(device)
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        self._check_finite(model)

    def update(self, reading: Reading, activation: Tensor | tuple[Tensor, Tensor]) -> None:
        """Hand an activation to a reading, with the mask, in the batch's shape (a mixture flattens its tokens)."""
        if isinstance(activation, Tensor):
            activation = activation.reshape(*self.batch_shape, -1)
        device = (activation if isinstance(activation, Tensor) else activation[1]).device
        reading.metrics[0].update(activation, None if self.mask is None else self.mask.to(device))

    def _check_finite(self, model: PreTrainedModel) -> None:
        """Name the first tap that has seen NaN or infinity, and the weight that caused it where one did."""
        flags = [all(bool(total.isfinite().all()) for metric in r.metrics for total in metric.totals) for r in self.readings]
        if all(flags):
            return
        for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
            if weight.device.type != "meta" and not weight.isfinite().all():
                raise ValueError(f"The weight {name!r} holds NaN or infinity; the checkpoint is damaged")
        order = [f"{base_prefix(model.config)}.{name}" for name, _ in model.base_model.named_modules()]
        # a block stands before its parts, but is read after them
        bad = [reading for reading, finite in zip(self.readings, flags, strict=True) if not finite]
        first = min(bad, key=lambda reading: (reading.axis == "layers", order.index(reading.module)))
        raise ValueError(
            f"NaN or infinity in the activations at {first.module!r} ({first.axis}), while all weights are finite: "
            f"{model.dtype} is too narrow for this model. Score it with dtype: float32"
        )


@contextmanager
def open_taps(model: PreTrainedModel, family: Family, sizes: Mapping[str, int], moments: bool = False) -> Iterator[Taps]:
    """Feed metrics from a model's forward passes until the context ends.

    Args:
        model (`PreTrainedModel`): With or without its output head.
        family (`Family`): Its family.
        sizes (`Mapping[str, int]`): The size of every axis.
        moments (`bool`, *optional*, defaults to `False`): Whether to read what corrections need as well.
    """
    taps, hooks, observed = Taps(), [], {}
    base = model.base_model
    modules = dict(base.named_modules())

    def tap(axis: str, layer: int | None, name: str, kind: type[Metric]) -> None:
        module, routed = modules[name.removeprefix(f"{base_prefix(model.config)}.")], name.endswith(".experts")
        count = sizes["experts"] if routed and axis == "ffn" else 1
        reading = Reading(axis, layer, name, [kind() for _ in range(count)])
        taps.readings.append(reading)
        if routed:
            observed.setdefault(module, {})[axis] = reading
        else:
            hooks.append(module.register_forward_hook(_hook(taps, reading, family, sizes), with_kwargs=True))

    for axis, places in family.taps_of(model.config).items():
        for layer, name in places:
            tap(axis, layer, name, METRICS[axis])
            if moments and axis in MOMENTS and not name.endswith(".experts"):
                tap(f"{axis}{MOMENT}", layer, name, MOMENTS[axis])
    for layer, name in dict.fromkeys(family.readers_of(model.config).values()) if moments else ():
        tap(f"readers{MOMENT}", layer, name, SecondMoment)
    implementation = base.config._experts_implementation if observed else None
    try:
        if observed:
            for module, readings in observed.items():
                module.observe = _observer(taps, readings)
            base.set_experts_implementation("hf_minitron")
        yield taps
    finally:
        for hook in hooks:
            hook.remove()
        for module in observed:
            del module.observe
        if observed:
            base.set_experts_implementation(implementation)


def save_moments(readings: Sequence[Reading], folder: Path | None) -> list[Reading]:
    """Write what corrections need, one file per layer; return the other readings. One process writes for all."""
    by_layer: dict[int | None, dict[str, Tensor]] = {}
    for reading in readings:
        if reading.axis.endswith(MOMENT):
            reading.add_up_processes()
            by_layer.setdefault(reading.layer, {})[reading.module] = reading.finish().cpu().contiguous()
    if by_layer and PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for layer, tensors in by_layer.items():
            save_file(tensors, moments_path(folder, layer))
    return [reading for reading in readings if not reading.axis.endswith(MOMENT)]


def _hook(taps: Taps, reading: Reading, family: Family, sizes: Mapping[str, int]):
    if reading.axis.endswith(MOMENT):

        def hook(module, args, kwargs, output):
            taps.update(reading, args[0] if args else kwargs["hidden_states"])

    elif reading.axis == "hidden":

        def hook(module, args, kwargs, output):
            taps.update(reading, output)

    elif reading.axis == "layers":

        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            taps.update(reading, (before, output[0] if isinstance(output, tuple) else output))

    else:  # read before the projection, whose input is the axis
        row, _ = axes.match(f"{reading.module}.weight", family.rows)
        dim = axes.dim_of(family.rows[row], reading.axis)

        def hook(module, args, kwargs, output):
            taps.update(reading, axes.norm_along(args[0], dim, reading.axis, sizes))

    return hook


def _observer(taps: Taps, readings: Mapping[str, Reading]):
    """Return what `_observed_experts` calls for every expert, and once with `None` when it has been through all."""
    norms: list[Tensor] = []

    def observe(expert: int | None, tokens: Tensor | None = None, inner: Tensor | None = None, output: Tensor | None = None):
        batch, seq = taps.batch_shape
        if expert is None:
            taps.update(readings["experts"], torch.stack(norms, -1))
            norms.clear()
            return
        norm = torch.zeros(batch * seq, device=output.device)
        norms.append(norm.index_copy_(0, tokens, torch.linalg.vector_norm(output.float(), dim=-1)))
        mask, lengths = None, seq
        if taps.mask is not None:
            mask = taps.mask.to(inner.device).flatten()[tokens]
            lengths = taps.mask.to(inner.device).sum(1, keepdim=True).clamp(min=1)
            inner = inner * mask[:, None].to(inner.dtype)
        by_sample = pad_sequence(inner.split(torch.bincount(tokens // seq, minlength=batch).tolist()), batch_first=True)
        readings["ffn"].metrics[expert].update(by_sample, lengths=lengths)

    return observe


def _observed_experts(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run a layer's experts one by one and show each what passes through it; `self` is the module that holds them."""
    result = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        tokens, slots = torch.where(top_k_index == expert)  # ascending tokens
        inner = _projected(self, hidden_states[tokens], "gate_up_proj", expert)
        inner = self._apply_gate(inner)  # (tokens, ffn)
        output = _projected(self, inner, "down_proj", expert) * top_k_weights[tokens, slots, None]
        result.index_add_(0, tokens, output.to(result.dtype))
        self.observe(expert, tokens, inner, output)
    self.observe(None)
    return result


def _projected(experts, states: Tensor, name: str, expert: int) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return torch.nn.functional.linear(states, weight.T if experts.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register("hf_minitron", _observed_experts)
