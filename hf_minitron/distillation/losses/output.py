"""The losses on the output that the arguments of a training name: from signal and logits to sums over tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_minitron.distillation.losses.chunked import chunked_loss
from hf_minitron.distillation.losses.liger import liger_loss, runs_liger
from hf_minitron.distillation.losses.tokens import CROSS_ENTROPY, function_of
from hf_minitron.distillation.signals import Signal
from hf_minitron.head import Head, wide_dtype


@dataclass(frozen=True)
class OutputLosses:
    """A weighted sum of losses on the output; the fields are those of `DistillationArguments`.

    Args:
        weights (`Mapping[str, float]`): Weight of every loss by name: of `TOKEN_LOSSES`, an `OwnLoss`, or cross_entropy.
        liger (`bool`): Whether Liger's fused loss makes them, in training.
    """

    weights: Mapping[str, float]
    temperature: float
    beta: float
    label_smoothing: float
    chunk_size: int
    liger: bool = False

    @classmethod
    def of(cls, args: Any) -> "OutputLosses":
        """Return the losses on the output that `DistillationArguments` name, by their settings."""
        weights = {name: weight for name, weight in args.losses.items() if name == CROSS_ENTROPY or function_of(name)}
        return cls(weights, args.temperature, args.beta, args.label_smoothing_factor, args.chunk_size, args.use_liger_loss)

    def __call__(self, hidden: Tensor, head: Head, signal: Signal | None, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `chunked_loss` does for the student's last hidden states, `(tokens, hidden)`, and the ids that follow."""
        if self.liger and runs_liger(signal, targets):
            settings = (self.weights, self.temperature, self.beta, self.chunk_size)
            return liger_loss(hidden, head, signal, targets, *settings)
        return chunked_loss(hidden, head, partial(self._of_chunk, signal, targets), self.weights, self.chunk_size)

    def _of_chunk(self, signal: Signal | None, targets: Tensor, logits: Tensor, rows: slice) -> dict[str, Tensor]:
        losses = {}
        if names := [name for name in self.weights if name != CROSS_ENTROPY]:
            tables = signal.aligned_log_probs(logits, rows, self.temperature)
            losses = {name: function_of(name, self.beta)(*tables) * self.temperature**2 for name in names}
        if CROSS_ENTROPY in self.weights:
            smoothed = {"reduction": "none", "label_smoothing": self.label_smoothing}
            losses[CROSS_ENTROPY] = torch.nn.functional.cross_entropy(logits.to(wide_dtype(logits)), targets[rows], **smoothed)
        return losses
