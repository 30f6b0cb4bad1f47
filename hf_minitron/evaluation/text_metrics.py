"""Metrics of held-out text: a number for every predicted token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter

import torch
from torch import Tensor

from hf_minitron.distillation.losses.tokens import forward_kl
from hf_minitron.evaluation.significance import AGGREGATIONS


@dataclass(frozen=True)
class Predictions:
    """A chunk of predicted tokens, from which metrics are made.

    Args:
        logits (`Tensor` of shape `(tokens, vocab)`): The model's.
        targets (`Tensor` of shape `(tokens,)`): The tokens that stand in the text.
        model_logp (`Tensor` of shape `(tokens, vocab)`, *optional*): The model's log-probabilities of the tokens that it and
            the teacher have; with a teacher.
        teacher_logp (`Tensor` of shape `(tokens, vocab)`, *optional*): The teacher's.
    """

    logits: Tensor
    targets: Tensor
    model_logp: Tensor | None = None
    teacher_logp: Tensor | None = None

    @cached_property
    def loglikelihood(self) -> Tensor:
        """Log-likelihoods of the targets in nats, of shape `(tokens,)`."""
        return -torch.nn.functional.cross_entropy(self.logits, self.targets, reduction="none")


@dataclass(frozen=True)
class TextMetric:
    """A metric of held-out text: a number for every predicted token, and what is made of their sum.

    Args:
        name (`str`): Its name in the report.
        values (`Callable[[Predictions], Tensor]`): Returns a number per token, of shape `(tokens,)`.
        direction (`str`): Which is better, `"higher"` or `"lower"`.
        aggregation (`str`, *optional*, defaults to `"mean"`): A key of `significance.AGGREGATIONS`.
        unit (`str`, *optional*, defaults to `"per token"`): What the report calls its unit.
        per (`str`, *optional*, defaults to `"token"`): What the sum is divided by, `"token"` or `"byte"` of text.
        teacher (`bool`, *optional*, defaults to `False`): Whether it needs the teacher's log-probabilities.

    Example:

    ```python
    >>> from hf_minitron import compare
    >>> def entropy(predictions):
    ...     logp = predictions.logits.log_softmax(-1)
    ...     return -(logp.exp() * logp).sum(-1)
    >>> metric = TextMetric("entropy", entropy, "lower", unit="nats per token")
    >>> report = compare({"student": "out"}, blocks, metrics=[*TEXT_METRICS, metric])
    >>> report.value("student", "entropy") > 0
    True
    ```
    """

    name: str
    values: Callable[[Predictions], Tensor]
    direction: str
    aggregation: str = "mean"
    unit: str = "per token"
    per: str = "token"
    teacher: bool = False

    def __post_init__(self):
        allowed = {"direction": ("higher", "lower"), "aggregation": (*AGGREGATIONS,), "per": ("token", "byte")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{self.name}: {name} {getattr(self, name)!r} is none of {', '.join(values)}")


def _top1_match(predictions: Predictions) -> Tensor:
    return predictions.model_logp.argmax(-1) == predictions.teacher_logp.argmax(-1)


def _teacher_kl(predictions: Predictions) -> Tensor:
    return forward_kl(predictions.model_logp, predictions.teacher_logp)


TEXT_METRICS = (
    TextMetric("perplexity", attrgetter("loglikelihood"), "lower", "perplexity"),
    TextMetric("bits_per_byte", attrgetter("loglikelihood"), "lower", "bits", "bits per byte", per="byte"),
    TextMetric("top1_match", _top1_match, "higher", unit="share of tokens", teacher=True),
    TextMetric("teacher_kl", _teacher_kl, "lower", unit="nats per token", teacher=True),
)


def dropped_mass(kept: Sequence[int]) -> TextMetric:
    """Return the metric of the mass that a teacher gives to the tokens which its student does not have.

    Args:
        kept (`Sequence[int]`): The ids of those that it has.
    """
    return TextMetric("dropped_mass", partial(_dropped_mass, kept=kept), "lower", unit="share of probability")


def _dropped_mass(predictions: Predictions, kept: Sequence[int]) -> Tensor:
    index = torch.tensor(kept, device=predictions.logits.device)
    logits = predictions.logits
    return 1 - (logits[:, index].logsumexp(-1) - logits.logsumexp(-1)).exp()


def check_metrics(metrics: Sequence[TextMetric]) -> None:
    """Refuse what is no `TextMetric`, and two of one name."""
    seen = set()
    for metric in metrics:
        if not isinstance(metric, TextMetric):
            raise ValueError(f"metrics: {metric!r} is no TextMetric")
        if metric.name in seen:
            raise ValueError(f"metrics: {metric.name!r} is there twice; give one of them another name")
        seen.add(metric.name)
