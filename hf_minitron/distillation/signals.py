"""What a teacher says about a batch, aligned with the student's logits chunk by chunk.

It must not know a loss formula: losses get two tables of log-probabilities on one support.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_minitron.distillation.losses.chunked import Head


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's whole distribution, made from its last hidden states a chunk at a time.

    Args:
        hidden (`Tensor` of shape `(tokens, hidden)`): The teacher's last hidden states.
        head (`Head`): The teacher's head.
    """

    hidden: Tensor
    head: Head

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
            `tuple[Tensor, Tensor]`: Each of shape `(rows, shared vocab)`.
        """
        teacher_logits = self.head.logits(self.hidden[rows])
        shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
        if temperature != 1:
            student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
        student_logp = student_logits.log_softmax(-1)[:, :shared]
        return student_logp, teacher_logits[:, :shared].log_softmax(-1)
