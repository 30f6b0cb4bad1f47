"""Taps: the places of a model where metrics read, one reading per axis and place."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers import PreTrainedModel

from hf_minitron import axes
from hf_minitron.architecture.architecture import INPUT, OUTPUT, Architecture
from hf_minitron.architecture.binding import inner_norms
from hf_minitron.importance.activation import WIDTHS
from hf_minitron.importance.metrics import DEFAULTS, METRICS, Chosen, Metric, needs_outgoing
from hf_minitron.importance.moments import ChannelEnergy, SecondMoment
from hf_minitron.importance.routed import run_experts
from hf_minitron.probe import Visit, base_model, base_name, probe, submodule
from hf_minitron.statistics import Moments

# What of a visit a metric is given, when not the module's input or output alone.
BOTH = ".both"


@dataclass(frozen=True)
class Reading:
    """What one tap reads, and the metric that it is for; of routed experts' `ffn` one metric per expert."""

    axis: str
    layer: int | None  # `None` outside of the layers
    module: str
    side: str  # INPUT, OUTPUT or BOTH
    metrics: list[Metric]
    sizes: Mapping[str, int]
    dim: axes.Dim | None = None  # of the last dimension of what is read, to view it by axis
    moment: str | None = None  # of a moment, what its name has after the module's

    @property
    def routed(self) -> bool:
        """Whether it reads routed experts."""
        return self.module.endswith(".experts")

    def see(self, visit: Visit) -> None:
        """Give the metric what it reads of a visit."""
        if self.side == BOTH:
            self.update((visit.input, visit.states), visit)
        else:
            self.update(visit.input if self.side == INPUT else visit.states, visit)

    def update(self, activation: Tensor | tuple[Tensor, Tensor], visit: Visit) -> None:
        """Give the metric an activation, in the batch's shape (a mixture of experts flattens its tokens)."""
        if isinstance(activation, Tensor):
            activation = activation.reshape(*visit.batch, -1)
            if self.dim is not None:
                activation = axes.by_axis(activation, self.dim, self.axis, self.sizes)
        device = (activation if isinstance(activation, Tensor) else activation[1]).device
        self.metrics[0].update(activation, None if visit.mask is None else visit.mask.to(device))

    def finite(self) -> bool:
        """Return whether no metric has seen NaN or infinity."""
        totals = (total for metric in self.metrics for total in getattr(metric, "totals", ()))
        return all(bool(torch.as_tensor(total).isfinite().all()) for total in totals)

    def finish(self) -> Tensor:
        """Return the score over all processes: `(size,)`, `(experts, size)` of a routed axis, or a scalar of a layer."""
        if PartialState().num_processes > 1:
            for metric in self.metrics:
                metric.totals = [reduce(total, "sum") for total in metric.totals]
        scores = [metric.finish().cpu() for metric in self.metrics]
        return torch.stack(scores) if self.routed and self.axis == "ffn" else scores[0]


@contextmanager
def open_taps(
    model: PreTrainedModel,
    moments: bool = False,
    metrics: Mapping[str, Chosen] = MappingProxyType({}),
    architecture: Architecture | None = None,
) -> Iterator[list[Reading]]:
    """Feed metrics from a model's forward passes until the context ends; yield their readings.

    `metrics` has an axis's metric or its name, where that is not the default one; `moments` are what corrections need as well.
    """
    architecture = architecture or Architecture.of(model.config)
    readings = [*_scores(model, architecture, metrics), *(moment_readings(architecture) if moments else ())]
    lacking = [type(reading.metrics[0]).__name__ for reading in readings if not hasattr(reading.metrics[0], "totals")]
    if lacking and PartialState().num_processes > 1:
        raise ValueError(f"metric: {lacking[0]} has no totals for processes to add up: keep its sums in that list, or use one "
                         "process")  # fmt: skip
    after, experts = [], {}
    for reading in readings:
        if reading.routed:
            experts.setdefault(reading.module, {})[reading.axis] = reading
        else:
            modules = (reading.module, *architecture.outline.uses.get(reading.module, ()))
            after += [(module, reading.see) for module in modules]
    with probe(model, after, instead={module: partial(run_experts, by_axis) for module, by_axis in experts.items()}):
        yield readings


def _scores(model: PreTrainedModel, architecture: Architecture, metrics: Mapping) -> Iterator[Reading]:
    """Yield readings of what is scored."""
    sides = {"layers": BOTH, "hidden": OUTPUT}
    for axis in architecture.tapped:
        chosen = metrics.get(axis, DEFAULTS[axis])
        make = METRICS[chosen] if isinstance(chosen, str) else chosen
        for layer, name in architecture.taps(axis):
            sizes = architecture.shape.at(layer)
            if needs_outgoing(make):
                instances = [make(outgoing=norms) for norms in _outgoing(model, architecture, name, axis)]
            else:
                instances = [make() for _ in range(sizes["experts"] if axis == "ffn" and name.endswith(".experts") else 1)]
            dim = architecture.weights[name].dim_of(axis)[1] if axis in WIDTHS[:-1] else None
            yield Reading(axis, layer, name, sides.get(axis, INPUT), instances, sizes, dim)


def moment_readings(architecture: Architecture) -> Iterator[Reading]:
    """Yield readings of what corrections need: second moments of what projections read, energies of what norms read."""
    sizes = architecture.shape.sizes  # moments are not viewed by axis
    for module, read in architecture.reads.items():
        if read.moment == module:
            yield Reading(read.axis, read.layer, module, INPUT, [SecondMoment()], sizes, moment="")
    norms = [
        *architecture.taps("hidden"),
        *((p.layer, p.module) for p in inner_norms(architecture.parameters.values()).values()),
    ]
    for layer, norm in norms:
        yield Reading("hidden", layer, norm, INPUT, [ChannelEnergy()], sizes, moment="")
    for read in dict.fromkeys(architecture.hidden_reads.values()):
        module, dot, side = read.moment.rpartition(".")
        yield Reading("hidden", read.layer, module, dot + side, [SecondMoment()], sizes, moment=dot + side)


def run_batch(model: PreTrainedModel, batch: Mapping[str, Tensor], device: torch.device) -> None:
    """Run one batch through a model without its output head, which scores nothing."""
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask") if key in batch}
    base_model(model)(**inputs, use_cache=False)


def check_activations(model: PreTrainedModel, readings: Sequence[Reading]) -> None:
    """Name the first tap that has seen NaN or infinity, and the weight that caused it where one did.

    Raises:
        ValueError: when one has.
    """
    bad = [reading for reading in readings if not reading.finite()]
    if not bad:
        return
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        if weight.device.type != "meta" and not weight.isfinite().all():
            raise ValueError(f"The weight {name!r} holds NaN or infinity; the checkpoint is damaged")
    prefix = base_name(model) or model.base_model_prefix
    order = [f"{prefix}.{name}".rstrip(".") for name, _ in base_model(model).named_modules()]
    # a layer stands before its parts, but is read after them
    first = min(bad, key=lambda reading: (reading.axis == "layers", order.index(reading.module)))
    raise ValueError(
        f"NaN or infinity in the activations at {first.module!r} ({first.axis}), while all weights are finite: "
        f"{model.dtype} is too narrow for this model. Score it in float32"
    )


def take_moments(readings: Sequence[Reading], moments: Moments) -> list[Reading]:
    """Move what corrections need from readings to `moments`; return the other readings."""
    for reading in readings:
        if reading.moment is not None:
            moments[reading.module + reading.moment] = reading.finish().contiguous()
            reading.metrics.clear()  # their sums are as large
    return [reading for reading in readings if reading.moment is None]


def _outgoing(model: PreTrainedModel, architecture: Architecture, name: str, axis: str) -> list[Tensor]:
    """Return the norms of the columns that an axis goes out through, viewed by axis; one tensor per routed expert."""
    parameter = architecture.weights[name]
    weight = getattr(submodule(model, name), parameter.kind)
    if weight.device.type == "meta":
        raise ValueError(
            f"{name!r} is offloaded, and the metric of {axis} reads its weights: score the "
            "folder layer by layer, or by the metric l2_mean"
        )
    position, dim = parameter.dim_of(axis)
    routed = parameter.dims[0] == (("experts",),)
    others = [at for at in range(weight.dim()) if at != position and not (routed and at == 0)]
    norms = torch.linalg.vector_norm(weight.detach().float(), dim=others)  # (dim,) or (experts, dim)
    sizes = architecture.shape.at(parameter.layer)
    return [axes.by_axis(norm, dim, axis, sizes) for norm in (norms if routed else [norms])]
