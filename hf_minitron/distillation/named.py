"""The named losses that are logged beside their weighted sum: since the last log, and over an evaluation."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class NamedLosses:
    """Sums of named losses.

    Args:
        accelerator (`Accelerator`): Reduces them over processes.
        average_tokens (`bool`): Whether a training loss is divided by the tokens of all processes, not of its own.
    """

    def __init__(self, accelerator: Accelerator, average_tokens: bool):
        self._accelerator = accelerator
        self._factor = accelerator.num_processes if average_tokens else 1
        self.begin_training()
        self.begin_evaluation()

    def begin_training(self) -> None:
        """Forget what training has added."""
        self._trained: dict[str, Tensor] = {}
        self.steps = 0

    def begin_evaluation(self) -> None:
        """Forget what an evaluation has added."""
        self._evaluated: dict[str, Tensor] = {}

    def add(self, parts: Mapping[str, Tensor], num_items: Tensor | int, count: int, training: bool) -> None:
        """Add the losses of a batch of `count` tokens, divided by `num_items`."""
        for name, part in parts.items():
            if training:
                self._trained[name] = self._trained.get(name, 0) + part
            else:
                sums = torch.stack([part * num_items, part.new_tensor(count)])
                self._evaluated[name] = self._evaluated.get(name, 0) + sums

    def not_finite(self) -> list[str]:
        """Return the names of those that training has made NaN or infinite."""
        return [name for name, total in self._trained.items() if not total.isfinite()]

    def training_means(self) -> dict[str, float]:
        """Return the mean over the steps since the last call, the same on all processes."""
        reduce = self._accelerator.reduce
        means = {name: self._factor * reduce(total, "mean").item() / self.steps for name, total in self._trained.items()}
        self.begin_training()
        return means

    def evaluation_means(self) -> dict[str, float]:
        """Return the mean over the tokens of an evaluation, the same on all processes."""
        sums = {name: self._accelerator.reduce(total, "sum").tolist() for name, total in self._evaluated.items()}
        return {name: total / count for name, (total, count) in sums.items()}
