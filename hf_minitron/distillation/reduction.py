"""From sums over tokens to means: the one division by the token count, and the means of the named losses in the log."""

import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer

from hf_minitron.distillation.batch import rows_read


def per_token(total: Tensor, num_items: Tensor | int, processes: int = 1) -> Tensor:
    """Divide a sum over tokens by the tokens of the whole accumulated batch.

    Args:
        total (`Tensor`): The sum over this process's tokens of a micro-batch.
        num_items (`Tensor` or `int`): Tokens of the whole accumulated batch; 0 counts as 1.
        processes (`int`, *optional*, defaults to 1): How many the token count is of, where their gradients are averaged.
    """
    return total * processes / torch.as_tensor(num_items).clamp(min=1)


def balanced(states: Tensor, others: Tensor, accelerator: Accelerator) -> Tensor:
    """Scale the sum of the losses on states to that of the others (2407.14679, section 3), the same on all processes."""
    ours, theirs = accelerator.reduce(torch.stack([others.detach(), states.detach()]), "sum")
    return states * (ours / theirs.clamp(min=torch.finfo(theirs.dtype).tiny))


class NamedMeans:
    """Means of named losses over steps or over tokens, the same on all processes.

    Args:
        accelerator (`Accelerator`): Reduces them over processes.

    Attributes:
        count (`int`): Steps or tokens so far.
        since (`float`): When they were begun, by `time.perf_counter`.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.begin()

    def begin(self) -> None:
        """Forget what was added."""
        self._totals: dict[str, Tensor] = {}
        self.count, self.since = 0, time.perf_counter()

    def add(self, values: Mapping[str, Tensor], count: int = 0) -> None:
        """Add a part of a step, or the sums over so many tokens."""
        for name, value in values.items():
            self._totals[name] = self._totals.get(name, 0) + value
        self.count += count

    def finite(self) -> Tensor:
        """Return whether all are finite, shape `()`; reading it waits for an accelerator."""
        return torch.stack([*self._totals.values()]).isfinite().all()

    def not_finite(self) -> list[str]:
        """Return the names of those that are NaN or infinite."""
        return [name for name, total in self._totals.items() if not total.isfinite()]

    def take(self) -> dict[str, float]:
        """Return the means, and begin again."""
        names, totals = list(self._totals), list(self._totals.values())
        if totals:
            totals = self._accelerator.reduce(torch.stack([*totals, totals[0].new_tensor(self.count)]), "sum").tolist()
        self.begin()
        return {name: total / totals[-1] for name, total in zip(names, totals, strict=False)}


def token_counts(trainer: Trainer, width: int, steps: int, since: float) -> dict[str, float]:
    """Return the tokens of all processes that training has read, and how many a second in the last steps, for its log.

    Args:
        trainer (`Trainer`): It trains.
        width (`int`): Tokens of a row.
        steps (`int`): Steps since `since`, by `time.perf_counter`.
        since (`float`): When they were begun.
    """
    args = trainer.args
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * width
    rate = steps * step / max(time.perf_counter() - since, 1e-9)
    return {"tokens": rows_read(trainer) * width, "tokens_per_second": round(rate, 1)}
