"""A teacher's distributions over the tokens that follow, aligned with the student's logits chunk by chunk.

`aligned_log_probs` gives two tables of log-probabilities on one support, of which losses are functions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_minitron.head import Head, wide_dtype


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

    def aligned_log_probs(self, student_logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
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
        teacher_logits = self.head.finish(self.head.project(self.hidden[rows]))
        shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
        student_logp = log_probabilities(student_logits, temperature)
        teacher_logp = log_probabilities(teacher_logits[:, :shared], temperature)
        if self.top_k is None or self.top_k >= shared:
            return first_entries(student_logp, shared), teacher_logp
        values, ids = teacher_logp.topk(self.top_k)
        return append_remainder(student_logp.gather(-1, ids)), append_remainder(values)


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return float32 (float64 for float64) log-probabilities of logits of any dtype, shape `(rows, vocab)`."""
    wide = wide_dtype(logits)
    return (logits if temperature == 1 else logits.to(wide) / temperature).log_softmax(-1, dtype=wide)


def first_entries(logp: Tensor, count: int) -> Tensor:
    """Return so many columns of `(rows, vocab)`: the gradient of a slice, even of all, costs another such table."""
    return logp if count == logp.shape[-1] else logp[:, :count]


def append_remainder(logp: Tensor) -> Tensor:
    """Add a last column: the log-probability of all that the others leave.

    Args:
        logp (`Tensor` of shape `(rows, k)`): Log-probabilities of some tokens.

    Returns:
        `Tensor` of shape `(rows, k + 1)`.
    """
    rest = 1 - logp.exp().sum(-1, keepdim=True)
    return torch.cat([logp, rest.clamp(min=torch.finfo(logp.dtype).eps).log()], -1)


# The logarithm of a probability that is zero: a loss multiplies it by that probability, and minus infinity would give NaN.
LOG_ZERO = -1e4


@dataclass(frozen=True)
class SparseSignal:
    """What a cache kept of the teacher's distribution: some tokens, and perhaps the mass of all others together.

    Args:
        ids (`Tensor` of shape `(tokens, kept)`): Ids of the kept tokens; `vocab` where a row has fewer.
        logp (`Tensor` of shape `(tokens, kept)`): The teacher's log-probabilities of them.
        rest (`Tensor` of shape `(tokens,)`, *optional*): Log-probability of all other tokens. Without it the kept ones stand
            for the whole distribution, as sampled ones do: then only the forward KL and its gradient mean anything.
        vocab (`int`): Size of the teacher's vocabulary.
    """

    ids: Tensor
    logp: Tensor
    rest: Tensor | None
    vocab: int

    def aligned_log_probs(self, student_logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of student and teacher for some rows, as `DenseSignal` does, on the kept tokens.

        The last column, if the cache knows the rest, is the mass of all other tokens that both vocabularies have.

        Raises:
            ValueError: for another temperature than 1: it would change the rest, token by token.
        """
        if temperature != 1:
            raise ValueError(f"temperature: {temperature}, but this cache holds some tokens at temperature 1 only")
        logp, ids = log_probabilities(student_logits), self.ids[rows]
        shared = min(self.vocab, logp.shape[-1])
        absent = ids >= shared
        student = logp.gather(-1, ids.clamp(max=shared - 1)).masked_fill(absent, LOG_ZERO)
        teacher = self.logp[rows].to(logp.dtype).masked_fill(absent, LOG_ZERO)
        if self.rest is not None:
            least = 8 * torch.finfo(logp.dtype).eps  # what rounding leaves of one minus a sum that is one
            rest = 1 - student.exp().sum(-1)
            if shared < logp.shape[-1]:  # as in `first_entries`
                rest = rest - logp[:, shared:].exp().sum(-1)
            student = torch.cat([student, rest.clamp(min=least).log()[:, None]], -1)
            rest = self.rest[rows].to(logp.dtype).clamp(min=math.log(least))
            teacher = torch.cat([teacher, rest[:, None]], -1)
        return student, teacher.log_softmax(-1)


@dataclass(frozen=True)
class StoredSignal:
    """The teacher's whole distribution from a cache.

    Args:
        logp (`Tensor` of shape `(tokens, vocab)`): The teacher's log-probabilities.
    """

    logp: Tensor

    def aligned_log_probs(self, student_logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of student and teacher for some rows, each `(rows, shared vocab)`: as `DenseSignal` does."""
        shared = min(student_logits.shape[-1], self.logp.shape[-1])
        teacher_logp = log_probabilities(self.logp[rows, :shared].to(wide_dtype(student_logits)), temperature)
        return first_entries(log_probabilities(student_logits, temperature), shared), teacher_logp


Signal = DenseSignal | SparseSignal | StoredSignal
