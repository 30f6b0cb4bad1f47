"""Taps: hooks on a model's modules that hand what passes there to metrics, one metric per axis and place.

It must not know how a metric computes its score, nor who runs the model.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_minitron import axes
from hf_minitron.architecture.architecture import INPUT, OUTPUT, Architecture, Parameter
from hf_minitron.importance.activation import OUTGOING, REDUCTIONS, Activation
from hf_minitron.importance.experts import RoutedOutputNorm
from hf_minitron.importance.layers import BlockImportance
from hf_minitron.importance.moments import ChannelEnergy, SecondMoment
from hf_minitron.importance.routed import observer
from hf_minitron.pruning.compensate import moments_path


class Metric(Protocol):
    """What an importance metric must have."""

    totals: list[Tensor | float]  # sums over batches: processes that have seen other batches add theirs

    def update(self, activation: Tensor | tuple[Tensor, Tensor], mask: Tensor | None = None) -> None:
        """Add one batch: `(batch, seq, size)`, or for `layers` a pair of `(batch, seq, hidden)`."""

    def finish(self) -> Tensor:
        """Return the score of every index."""


# The papers' metric for every width axis (2407.14679, table 11), and the axes that it is for.
DEFAULT = "l2_mean"
WIDTHS = ("ffn", "dense_ffn", "shared_ffn", "heads", "hidden")

# What corrections need, read at the taps of the same axis; their readings' axis is named so.
MOMENT = ".moment"
READ = {suffix: f"{suffix}{MOMENT}" for suffix in (INPUT, OUTPUT)}  # by projections of hidden channels
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
        dim (`Dim`, *optional*): The pattern of the last dimension of what the tap reads, to view it by axis.
    """

    axis: str
    layer: int | None
    module: str
    metrics: list[Metric]
    dim: axes.Dim | None = None

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
        sizes (`Mapping[str, int]`): The size of every axis.
        readings (`list[Reading]`): One per axis and place.
        mask (`Tensor` of shape `(batch, seq)`, *optional*): 1 for text, 0 for padding in the batch that is under way.
        batch_shape (`tuple[int, int]`): `(batch, seq)` of that batch.
    """

    sizes: Mapping[str, int]
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
            if reading.dim is not None:
                activation = axes.by_axis(activation, reading.dim, reading.axis, self.sizes)
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
        order = [f"{Architecture.of(model.config).prefix}.{name}".rstrip(".") for name, _ in model.base_model.named_modules()]
        # a block stands before its parts, but is read after them
        bad = [reading for reading, finite in zip(self.readings, flags, strict=True) if not finite]
        first = min(bad, key=lambda reading: (reading.axis == "layers", order.index(reading.module)))
        raise ValueError(
            f"NaN or infinity in the activations at {first.module!r} ({first.axis}), while all weights are finite: "
            f"{model.dtype} is too narrow for this model. Score it with dtype: float32"
        )


@contextmanager
def open_taps(
    model: PreTrainedModel,
    moments: bool = False,
    metrics: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Taps]:
    """Feed metrics from a model's forward passes until the context ends.

    Args:
        model (`PreTrainedModel`): With or without its output head.
        moments (`bool`, *optional*, defaults to `False`): Whether to read what corrections need as well.
        metrics (`Mapping[str, str]`, *optional*): Width axis to the name of its metric; `l2_mean` where left out.
    """
    architecture = Architecture.of(model.config)
    sizes = architecture.shape.sizes
    taps, hooks, observed = Taps(sizes), [], {}
    base = model.base_model
    modules = dict(base.named_modules())

    def tap(axis: str, layer: int | None, name: str, kind: Callable[..., Metric]) -> None:
        module, routed = modules[name.removeprefix(architecture.prefix).removeprefix(".")], name.endswith(".experts")
        dim = architecture.weights[name].dim_of(axis)[1] if axis in WIDTHS and axis != "hidden" else None
        if kind in OUTGOING.values():
            made = [kind(outgoing) for outgoing in _outgoing(module, architecture.weights[name], axis, sizes)]
        else:
            made = [kind() for _ in range(sizes["experts"] if routed and axis == "ffn" else 1)]
        reading = Reading(axis, layer, name, made, dim)
        taps.readings.append(reading)
        if routed:
            observed.setdefault(module, {})[axis] = reading
        else:
            hooks.append(module.register_forward_hook(_hook(taps, reading), with_kwargs=True))

    for axis in architecture.tapped:
        for layer, name in architecture.taps(axis):
            tap(axis, layer, name, _metric(axis, metrics.get(axis, DEFAULT)))
            if moments and axis in MOMENTS and not name.endswith(".experts"):
                tap(f"{axis}{MOMENT}", layer, name, MOMENTS[axis])
    for read in dict.fromkeys(architecture.hidden_reads.values()) if moments else ():
        module, dot, side = read.moment.rpartition(".")
        tap(READ[dot + side], read.layer, module, SecondMoment)
    implementation = base.config._experts_implementation if observed else None
    try:
        if observed:
            for module, readings in observed.items():
                module.observe = observer(taps, readings)
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
            side = reading.axis.removesuffix(MOMENT)
            name = f"{reading.module}{side if side in READ else ''}"
            by_layer.setdefault(reading.layer, {})[name] = reading.finish().cpu().contiguous()
    if by_layer and PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for layer, tensors in by_layer.items():
            save_file(tensors, moments_path(folder, layer))
    return [reading for reading in readings if not reading.axis.endswith(MOMENT)]


def _hook(taps: Taps, reading: Reading):
    if reading.axis == "layers":

        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            taps.update(reading, (before, output[0] if isinstance(output, tuple) else output))

    elif reading.axis in ("hidden", READ[OUTPUT]):  # what a norm gives, or the whole model

        def hook(module, args, kwargs, output):
            taps.update(reading, output if isinstance(output, Tensor) else output[0])

    else:  # what a projection (or, for energies, a norm) is given

        def hook(module, args, kwargs, output):
            taps.update(reading, args[0] if args else kwargs["hidden_states"])

    return hook


def _metric(axis: str, name: str) -> Callable[..., Metric]:
    """Return what makes the metric of an axis."""
    if axis not in WIDTHS:
        return {"layers": BlockImportance, "experts": RoutedOutputNorm}[axis]
    return OUTGOING[name] if name in OUTGOING else partial(Activation, *REDUCTIONS[name])


def _outgoing(module: nn.Module, parameter: Parameter, axis: str, sizes: Mapping[str, int]) -> list[Tensor]:
    """Return the norms of the columns that an axis goes out through, viewed by axis; one tensor per routed expert."""
    weight, dims = getattr(module, parameter.kind), parameter.dims
    if weight.device.type == "meta":
        raise ValueError(
            f"{parameter.module!r} is offloaded, and the metric of {axis} reads its weights: use layer_by_layer, or l2_mean"
        )
    position, dim = parameter.dim_of(axis)
    routed = dims[0] == (("experts",),)
    others = [at for at in range(weight.dim()) if at != position and not (routed and at == 0)]
    norms = torch.linalg.vector_norm(weight.detach().float(), dim=others)  # (dim,) or (experts, dim)
    return [axes.by_axis(norm, dim, axis, sizes) for norm in (norms if routed else [norms])]
