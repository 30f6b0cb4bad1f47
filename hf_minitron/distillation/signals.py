"""What a teacher says about a batch, aligned with the student's logits chunk by chunk.

It must not know a loss formula: losses get two tables of log-probabilities on one support.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_minitron.distillation.losses.chunked import Head


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's whole distribution, made from its last hidden states a chunk at a time.

    Args:
        hidden (`Tensor` of shape `(tokens, hidden)`): The teacher's last hidden states.
        head (`Head`): The teacher's head.
        top_k (`int`, *optional*): Compare only the teacher's most likely tokens, and all others as one.
    """

    hidden: Tensor
    head: Head
    top_k: int | None = None

    def align(self, student_logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of student and teacher for some rows.

        Vocabularies may differ by padding at the end. The support is what both have: the teacher is renormalised over it,
        while the student stays normalised over all of its own entries, so that mass on an entry that the teacher does not
        have costs the student.

        Args:
            student_logits (`Tensor` of shape `(rows, student vocab)`): The student's logits.
            rows (`slice`): Which tokens.
            temperature (`float`): Divides both models' logits.

        Returns:
            `tuple[Tensor, Tensor]`: Each of shape `(rows, shared vocab)`, or `(rows, top_k + 1)`.
        """
        teacher_logits = self.head.logits(self.hidden[rows])
        shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
        if temperature != 1:
            student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
        teacher_logits = teacher_logits[:, :shared]
        if self.top_k is None or self.top_k >= shared:
            return student_logits.log_softmax(-1)[:, :shared], teacher_logits.log_softmax(-1)
        values, ids = teacher_logits.topk(self.top_k)
        teacher_logp = values - teacher_logits.logsumexp(-1, keepdim=True)
        student_logp = student_logits.gather(-1, ids) - student_logits.logsumexp(-1, keepdim=True)
        return with_rest(student_logp), with_rest(teacher_logp)


def with_rest(logp: Tensor) -> Tensor:
    """Add a last column: the log-probability of all that the others leave.

    Args:
        logp (`Tensor` of shape `(rows, k)`): Log-probabilities of some tokens.

    Returns:
        `Tensor` of shape `(rows, k + 1)`.
    """
    rest = 1 - logp.exp().sum(-1, keepdim=True)
    return torch.cat([logp, rest.clamp(min=torch.finfo(logp.dtype).eps).log()], -1)
