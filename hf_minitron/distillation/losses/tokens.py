"""Distillation losses on the output distribution: formulas over two aligned tables of log-probabilities.

A loss never sees a model, a mask or a chunk: it gets one row per token and returns one number per token. It then works live,
cached, chunked and masked. One of your own is passed as a value, `DistillationArguments(losses={my_loss: 1.0})`; a further
one for recipes gets a name in `TOKEN_LOSSES`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

TokenLoss = Callable[[Tensor, Tensor], Tensor]


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(teacher || student), the best loss of 2407.14679 (tables 15 and 16).

    Args:
        student_logp (`Tensor` of shape `(tokens, vocab)`): Log-probabilities of the student.
        teacher_logp (`Tensor` of shape `(tokens, vocab)`): Log-probabilities of the teacher on the same support.

    Returns:
        `Tensor` of shape `(tokens,)`: nats per token.
    """
    return torch.nn.functional.kl_div(student_logp, teacher_logp, reduction="none", log_target=True).sum(-1)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher), nats per token; arguments as for `forward_kl`."""
    return forward_kl(teacher_logp, student_logp)


def generalized_jsd(student_logp: Tensor, teacher_logp: Tensor, beta: float = 0.5) -> Tensor:
    """Return the generalised Jensen-Shannon divergence (2306.13649, eq. 1), nats per token.

    Args:
        student_logp (`Tensor` of shape `(tokens, vocab)`): Log-probabilities of the student.
        teacher_logp (`Tensor` of shape `(tokens, vocab)`): Log-probabilities of the teacher on the same support.
        beta (`float`, *optional*, defaults to 0.5): The teacher's share of the mixture. At 0 and 1 forward and reverse KL are
            given, as in TRL: the limits of the divergence over beta and over 1 - beta.
    """
    if beta == 0:
        return forward_kl(student_logp, teacher_logp)
    if beta == 1:
        return reverse_kl(student_logp, teacher_logp)
    mixture = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log(1 - beta))
    return beta * forward_kl(mixture, teacher_logp) + (1 - beta) * forward_kl(mixture, student_logp)


def squared_error(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Return the squared distance of the two distributions (of probabilities: 2407.14679, section 3); as `forward_kl`."""
    return (student_logp.exp() - teacher_logp.exp()).square().sum(-1)


def cosine_distance(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Return one minus the cosine of the two vectors of probabilities (2407.14679, section 3); as `forward_kl`."""
    return 1 - torch.nn.functional.cosine_similarity(student_logp.exp(), teacher_logp.exp(), dim=-1)


def total_variation(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Return half the sum of absolute differences of probabilities, between 0 and 1; as `forward_kl`."""
    return (student_logp.exp() - teacher_logp.exp()).abs().sum(-1) / 2


TOKEN_LOSSES: dict[str, TokenLoss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": generalized_jsd,
    "mse": squared_error,
    "cosine": cosine_distance,
    "total_variation": total_variation,
}

# Losses that are no function of two tables: on the labels, and on states (`distillation.states`).
CROSS_ENTROPY = "cross_entropy"
# What the Trainer logs, so that no loss can be called so.
LOGGED = ("loss", "grad_norm", "learning_rate", "epoch", "step", "runtime", "samples_per_second", "steps_per_second")


class OwnLoss(str):
    """The name of a loss of one's own, which carries the function; in JSON and in a saved file the name alone.

    Args:
        function (`TokenLoss`): The loss; it is called as the function is, or the class of a callable object.

    Raises:
        ValueError: for a function without a name, and for a name that means something else.
    """

    function: TokenLoss

    def __new__(cls, function: TokenLoss) -> "OwnLoss":
        inner = function.func if isinstance(function, partial) else function
        self = super().__new__(cls, getattr(inner, "__name__", type(inner).__name__))
        if not self.isidentifier():
            raise ValueError(f"losses: {function!r} has no name to be logged by; define it by def")
        if self in (*TOKEN_LOSSES, CROSS_ENTROPY, *LOGGED):
            raise ValueError(f"losses: a function named {self}, which is the name of something else in the log; rename it")
        self.function = function
        return self

    def __reduce__(self) -> tuple:
        return str, (str(self),)

    def __copy__(self) -> "OwnLoss":
        return self

    def __deepcopy__(self, memo: dict) -> "OwnLoss":
        return self


def by_name(losses: Mapping[str | TokenLoss, float]) -> dict[str, float]:
    """Return weights of losses by name; a function becomes an `OwnLoss`, or the name that it has in `TOKEN_LOSSES`."""
    names = {function: name for name, function in TOKEN_LOSSES.items()}
    named = [names.get(loss) or OwnLoss(loss) if callable(loss) else loss for loss in losses]
    for name in named:
        if named.count(name) > 1:
            raise ValueError(f"losses: two are named {name}; rename one, for the log tells them apart by their names")
    return dict(zip(named, losses.values(), strict=True))


def function_of(name: str, beta: float = 0.5) -> TokenLoss | None:
    """Return the function of a loss on two tables, or `None` for another loss; `beta` as for `generalized_jsd`."""
    if isinstance(name, OwnLoss):
        return name.function
    return partial(generalized_jsd, beta=beta) if name == "jsd" else TOKEN_LOSSES.get(name)
