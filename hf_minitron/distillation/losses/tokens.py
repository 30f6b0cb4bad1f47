"""Distillation losses on the output distribution: formulas over two aligned tables of log-probabilities.

A loss never sees a model, a mask or a chunk: it gets one row per token and returns one number per token. It then works live,
cached, chunked and masked. To add one, write a function and give it a name in `TOKEN_LOSSES`.
"""

import math
from collections.abc import Callable

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
