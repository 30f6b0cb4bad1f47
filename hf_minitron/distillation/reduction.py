"""From sums over tokens to means: the one division by the token count, and the means of the named losses in the log."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


def per_token(total: Tensor, num_items: Tensor | int, processes: int = 1) -> Tensor:
    """Divide a sum over tokens by the tokens of the whole accumulated batch.

    Args:
        total (`Tensor`): The sum over this process's tokens of a micro-batch.
        num_items (`Tensor` or `int`): Tokens of the whole accumulated batch; 0 counts as 1.
        processes (`int`, *optional*, defaults to 1): How many the token count is of, where their gradients are averaged.
    """
    return total * processes / torch.as_tensor(num_items).clamp(min=1)


class NamedLosses:
    """Means of the named losses, made of the sums that the loss is made of: since the last log, and over an evaluation."""

    def __init__(self, accelerator: Accelerator):
        self._reduce = accelerator.reduce
        self.begin_training()
        self.begin_evaluation()

    def begin_training(self) -> None:
        """Forget what training has added."""
        self._trained: dict[str, Tensor] = {}
        self.steps = 0

    def begin_evaluation(self) -> None:
        """Forget what an evaluation has added."""
        self._evaluated: dict[str, Tensor] = {}

    def add_training(self, sums: Mapping[str, Tensor], num_items: Tensor | int, processes: int) -> None:
        """Add the sums of a micro-batch; the other arguments as for `per_token`."""
        for name, total in sums.items():
            self._trained[name] = self._trained.get(name, 0) + per_token(total, num_items, processes)

    def add_evaluation(self, sums: Mapping[str, Tensor], count: int) -> None:
        """Add the sums of a batch of so many tokens."""
        for name, total in sums.items():
            self._evaluated[name] = self._evaluated.get(name, 0) + torch.stack([total, total.new_tensor(count)])

    def not_finite(self) -> list[str]:
        """Return the names of those that training has made NaN or infinite."""
        return [name for name, total in self._trained.items() if not total.isfinite()]

    def training_means(self) -> dict[str, float]:
        """Return the mean over the steps since the last call, the same on all processes."""
        means = {name: self._reduce(total, "mean").item() / self.steps for name, total in self._trained.items()}
        self.begin_training()
        return means

    def evaluation_means(self) -> dict[str, float]:
        """Return the mean over the tokens of an evaluation, the same on all processes."""
        sums = {name: self._reduce(total, "sum").tolist() for name, total in self._evaluated.items()}
        return {name: total / count for name, (total, count) in sums.items()}
