"""The losses on the output that a training's arguments name, from the teacher's signal and a chunk of the student's logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hf_minitron.distillation.losses.chunked import chunked_loss
from hf_minitron.distillation.losses.tokens import CROSS_ENTROPY, function_of
from hf_minitron.head import Head


class Signal(Protocol):
    """What a teacher says about the targets of a batch."""

    def align(self, student_logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of student and teacher for some rows, on one support."""


@dataclass(frozen=True)
class OutputLosses:
    """A weighted sum of losses on the output.

    Args:
        weights (`Mapping[str, float]`): Weight of every loss by name: of `TOKEN_LOSSES`, an `OwnLoss`, or cross_entropy.
        temperature (`float`): Divides both models' logits; losses are multiplied by its square.
        beta (`float`): The teacher's share of the mixture of jsd.
        label_smoothing (`float`): Of the cross-entropy.
        chunk_size (`int`): Tokens whose logits exist at the same time.
    """

    weights: Mapping[str, float]
    temperature: float
    beta: float
    label_smoothing: float
    chunk_size: int

    def __call__(self, hidden: Tensor, head: Head, signal: Signal | None, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum over tokens and each named sum, as `chunked_loss` does.

        Args:
            hidden (`Tensor` of shape `(tokens, hidden)`): The student's last hidden states.
            head (`Head`): The student's head.
            signal (`Signal`, *optional*): The teacher's, of the same tokens; none where cross_entropy is the only loss.
            targets (`Tensor` of shape `(tokens,)`): The ids that follow.
        """
        return chunked_loss(hidden, head, partial(self._of_chunk, signal, targets), self.weights, self.chunk_size)

    def _of_chunk(self, signal: Signal | None, targets: Tensor, logits: Tensor, rows: slice) -> dict[str, Tensor]:
        losses = {}
        if names := [name for name in self.weights if name != CROSS_ENTROPY]:
            tables = signal.align(logits, rows, self.temperature)
            losses = {name: function_of(name, self.beta)(*tables) * self.temperature**2 for name in names}
        if CROSS_ENTROPY in self.weights:
            smoothed = {"reduction": "none", "label_smoothing": self.label_smoothing}
            losses[CROSS_ENTROPY] = torch.nn.functional.cross_entropy(logits, targets[rows], **smoothed)
        return losses
