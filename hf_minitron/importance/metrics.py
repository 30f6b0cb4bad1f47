"""The importance metrics by name, and what a metric of one's own must have."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from torch import Tensor

from hf_minitron.importance.activation import OVER, WIDTHS, Activation, Contribution, Fluctuation
from hf_minitron.importance.baselines import BASELINES
from hf_minitron.importance.experts import RoutedOutputNorm
from hf_minitron.importance.layers import BlockImportance


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
        if isinstance(chosen, str):
            _check_name(axis, chosen)
        elif axis not in axes_of(chosen):
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


def _check_name(axis: str, name: str) -> None:
    known = [*(other for other in METRICS if axis in axes_of(METRICS[other])), *BASELINES]
    if name not in known:
        hint = ". Write metric as axis: name lines, such as ffn: contribution" if name in METRICS else ""
        raise ValueError(f"metric: {name!r} is none of those for {axis}: {', '.join(known)}{hint}")
