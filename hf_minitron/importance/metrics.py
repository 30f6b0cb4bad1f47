"""The importance metrics by name, and what a metric of one's own must have."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hf_minitron.importance.activation import OVER, WIDTHS, Activation, Contribution, Fluctuation
from hf_minitron.importance.baselines import BASELINES


class Metric(Protocol):
    """Scores every index of an axis from the activations at one place; each place and each routed expert has its own instance.

    It is made without arguments, or with `outgoing` where it has a parameter of that name: the norms of the columns of weights
    that the axis goes out through, viewed by axis. Processes (`accelerate launch`) add up the sums in its list `totals`.

    Args:
        axis (`str` or `tuple[str, ...]`): The axis that it scores, or those that it can score.
    """

    axis: str | tuple[str, ...]

    def update(self, activation: Tensor | tuple[Tensor, Tensor], mask: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            activation (`Tensor`): What passes, viewed by axis: `(batch, seq, size)`; of `heads` with the head's dimensions as a
                fourth; of `experts` the norm of every expert's weighted output; of `layers` a layer's input and output.
            mask (`Tensor` of shape `(batch, seq)`, *optional*): 1 for text, 0 for padding; all text when left out.
        """

    def finish(self) -> Tensor:
        """Return the score of every index, `(size,)`; of `layers` a scalar."""


class RoutedOutputNorm:
    """The router's weight times the norm of an expert's output, mean over the tokens that it sees (2510.13999, section 4).

    Example:

    ```python
    >>> metric = RoutedOutputNorm()
    >>> metric.update(torch.tensor([[[0.0, 0.4], [0.0, 0.2]]]))  # (batch, seq, experts)
    >>> metric.finish()
    tensor([0.0000, 0.3000])
    ```
    """

    axis = "experts"

    def __init__(self):
        self.totals: list[Tensor | float] = [0.0, 0.0]  # the sum over tokens, the number of tokens; both by expert

    def update(self, activation: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch, as `Metric.update` has it."""
        if mask is not None:
            activation = activation * mask.unsqueeze(-1)
        self.totals[0] = self.totals[0] + activation.sum((0, 1), dtype=torch.float32)
        self.totals[1] = self.totals[1] + (activation != 0).sum((0, 1), dtype=torch.float32)

    def finish(self) -> Tensor:
        """Return the float32 score of every expert, shape `(experts,)`; 0 for one that saw no token."""
        return self.totals[0] / self.totals[1].clamp(min=1)


class BlockImportance:
    """How much a layer changes what passes: one minus the cosine of its input and output, mean over tokens (2407.14679, 2.2).

    Example:

    ```python
    >>> metric = BlockImportance()
    >>> metric.update((torch.randn(2, 16, 40), torch.randn(2, 16, 40)))  # input and output, each (batch, seq, hidden)
    >>> metric.finish().shape
    torch.Size([])
    ```
    """

    axis = "layers"

    def __init__(self):
        self.totals: list[Tensor | float] = [0.0, 0.0]  # the sum over tokens of what changes, the number of tokens

    def update(self, activation: tuple[Tensor, Tensor], mask: Tensor | None = None) -> None:
        """Add one batch, as `Metric.update` has it."""
        before, after = activation
        change = 1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)  # (batch, seq)
        counted = torch.ones_like(change) if mask is None else mask.to(change.dtype).expand_as(change)
        # float64 because a sum of many small changes is averaged; a few numbers per batch
        self.totals[0] = self.totals[0] + (change * counted).sum(dtype=torch.float64)
        self.totals[1] = self.totals[1] + counted.sum(dtype=torch.float64)

    def finish(self) -> Tensor:
        """Return the float32 score of the layer, a scalar."""
        return (self.totals[0] / self.totals[1]).float()


# By name; the nine reductions of 2407.14679, table 11, are named batch first.
METRICS: dict[str, Callable[..., Metric]] = {
    **{f"{batch}_{sequence}": partial(Activation, batch, sequence) for batch in OVER for sequence in OVER},
    "contribution": Contribution,
    "contribution_abs": partial(Contribution, power=1),
    "fluctuation": Fluctuation,
    "routed_output_norm": RoutedOutputNorm,
    "block_importance": BlockImportance,
}

# The paper's choice for every width axis (its table 11), and what scores whole experts and layers.
DEFAULT = "l2_mean"
DEFAULTS = {**dict.fromkeys(WIDTHS, DEFAULT), "experts": "routed_output_norm", "layers": "block_importance"}

Chosen = str | Callable[..., Metric]


def metrics_of(metric: Chosen | Mapping[str, Chosen]) -> dict[str, Chosen]:
    """Return the metric of every axis that one is chosen for.

    Raises:
        ValueError: for a metric that does not exist, or not for its axis.
    """
    if isinstance(metric, Mapping):
        by_axis = dict(metric)
    elif isinstance(metric, str):
        by_axis = dict.fromkeys(DEFAULTS if metric in BASELINES else WIDTHS, metric)
    else:
        by_axis = dict.fromkeys(axes_of(metric), metric)
    for axis, chosen in by_axis.items():
        if axis not in DEFAULTS:
            raise ValueError(f"metric: {axis!r} is none of {', '.join(DEFAULTS)}")
        known = [*(name for name in METRICS if axis in axes_of(METRICS[name])), *BASELINES]
        if isinstance(chosen, str) and chosen not in known:
            hint = ". Write metric as axis: name lines, such as ffn: contribution" if chosen in METRICS else ""
            raise ValueError(f"metric: {chosen!r} is none of those for {axis}: {', '.join(known)}{hint}")
        if not isinstance(chosen, str) and axis not in axes_of(chosen):
            raise ValueError(f"metric: {name_of(chosen)} is for {', '.join(axes_of(chosen))}, not for {axis}")
    return by_axis


def axes_of(metric: Callable[..., Metric]) -> tuple[str, ...]:
    """Return the axes that a metric can score."""
    axis = getattr(getattr(metric, "func", metric), "axis", ())
    return (axis,) if isinstance(axis, str) else tuple(axis)


def name_of(metric: Chosen) -> str:
    """Return the name of a metric, for provenance."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric))


def needs_outgoing(metric: Callable[..., Metric]) -> bool:
    """Return whether a metric is made with the norms of the weights that its axis goes out through."""
    return "outgoing" in inspect.signature(metric).parameters
