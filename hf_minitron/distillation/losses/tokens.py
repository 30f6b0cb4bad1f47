"""Distillation losses on the output distribution: formulas over two aligned tables of log-probabilities.

A loss never sees a model, a mask or a chunk: it gets one row per token and returns one number per token. It then works live,
chunked and masked. To add one, write a function and give it a name in `TOKEN_LOSSES`.
"""

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


TOKEN_LOSSES: dict[str, TokenLoss] = {"forward_kl": forward_kl}
