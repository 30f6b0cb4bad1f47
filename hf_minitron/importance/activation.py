"""Width metrics: how much an index of `ffn`, `heads` or `hidden` is worth by what passes through it.

A metric sees activations and a mask, never a module, a hook or a layer. Some are given how strongly the weights behind the tap
take up what passes (`outgoing`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

# The width axes; `hidden` does not go out through one projection.
WIDTHS = ("ffn", "dense_ffn", "shared_ffn", "heads", "ssm_heads", "conv_channels", "hidden")


class Activation:
    """Activations reduced over the sequence, then over the samples, by mean of |x|, L2 norm or variance (2407.14679, 2.2).

    L2 over samples of means over the sequence is the paper's choice for every width axis (its table 11).

    Args:
        batch (`str`, *optional*, defaults to `"l2"`): How samples are reduced: mean, l2 or variance.
        sequence (`str`, *optional*, defaults to `"mean"`): How the tokens of a sample are reduced.

    Example:

    ```python
    >>> metric = Activation("l2", "mean")
    >>> metric.update(torch.randn(2, 16, 96))  # (batch, seq, ffn)
    >>> metric.finish().shape
    torch.Size([96])
    ```
    """

    axis = WIDTHS

    def __init__(self, batch: str = "l2", sequence: str = "mean"):
        self.batch, self.sequence = batch, sequence
        self.totals: list[Tensor | float] = [0.0, 0.0, 0.0]  # over samples: the sum, the sum of squares, their number

    def update(self, activation: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """Add one batch, as `Metric.update` has it; of a head's dimensions the L2 norm is taken.

        `lengths`, `(batch, 1)`, is the number of tokens in every sample where the activation holds only some of them (those
        that an expert sees) and the others count as zeros.
        """
        if activation.dim() == 4:
            activation = torch.linalg.vector_norm(activation.float(), dim=-1)
        activation, lengths = _mask_padding(activation, mask, lengths)
        reduced = OVER[self.sequence](activation, lengths)  # (batch, size)
        # float64 because a variance is the difference of two sums; a few numbers per batch
        added = (reduced.sum(0, dtype=torch.float64), reduced.double().square().sum(0), reduced.new_tensor(len(reduced)))
        self.totals = [total + new for total, new in zip(self.totals, added, strict=True)]

    def finish(self) -> Tensor:
        """Return the float32 score of every index, shape `(size,)`."""
        total, squares, count = self.totals
        mean = total / count
        return {
            "mean": lambda: mean,
            "l2": lambda: squares.sqrt(),
            "variance": lambda: (squares / count - mean.square()).clamp(min=0),
        }[self.batch]().float()


class Contribution:
    """Mean of |x|^power over tokens, times the norm to the same power of the column of weights that x goes out through.

    With power 2 it is what an index adds to the energy of the projection's output; with power 1, Puzzle's channel score
    (2411.19146, appendix A).

    Example:

    ```python
    >>> metric = Contribution(outgoing=torch.tensor([1.0, 2.0]))
    >>> metric.update(torch.ones(1, 16, 2))
    >>> metric.finish()
    tensor([1., 4.])
    ```
    """

    axis = WIDTHS[:-1]

    def __init__(self, outgoing: Tensor, power: int = 2):
        self.outgoing, self.power = outgoing, power
        self.totals: list[Tensor | float] = [0.0, 0.0]  # the sum over tokens of |x|^power, the number of tokens

    def update(self, activation: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """Add one batch, as `Activation.update` has it."""
        activation, lengths = _mask_padding(activation, mask, lengths)
        powers = activation.float().square() if self.power == 2 else activation.abs()
        self.totals[0] = self.totals[0] + powers.sum((0, 1), dtype=torch.float32)
        self.totals[1] = self.totals[1] + lengths.sum()

    def finish(self) -> Tensor:
        """Return the float32 score of every index, shape `(size,)`; a head's is the sum of its dimensions'."""
        return _by_index(self.totals[0] / self.totals[1] * self.outgoing.float() ** self.power)


class Fluctuation:
    """Variance of x over tokens times the squared norm of the column that x goes out through (FLAP's WIFV, 2312.11983).

    It is the energy that is lost when x is replaced by its mean, which a bias can take over.
    """

    axis = WIDTHS[:-1]

    def __init__(self, outgoing: Tensor):
        self.outgoing = outgoing
        self.totals: list[Tensor | float] = [0.0, 0.0, 0.0]  # the sum over tokens, the sum of squares, the number of tokens

    def update(self, activation: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """Add one batch, as `Activation.update` has it."""
        activation, lengths = _mask_padding(activation, mask, lengths)
        self.totals[0] = self.totals[0] + activation.sum((0, 1), dtype=torch.float64)
        self.totals[1] = self.totals[1] + activation.float().square().sum((0, 1), dtype=torch.float64)
        self.totals[2] = self.totals[2] + lengths.sum()

    def finish(self) -> Tensor:
        """Return the float32 score of every index, shape `(size,)`; a head's is the sum of its dimensions'."""
        total, squares, count = self.totals
        variance = (squares / count - (total / count).square()).clamp(min=0)
        return _by_index((variance * self.outgoing.double().square()).float())


def _mask_padding(activation: Tensor, mask: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zero what is padding; return the number of tokens of every sample, shape `(batch, 1)`."""
    if mask is not None:
        activation = activation * mask.view(*mask.shape, *[1] * (activation.dim() - 2)).to(activation.dtype)
    if lengths is None:
        full = torch.full((len(activation), 1), float(activation.shape[1]), device=activation.device)
        lengths = full if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
    return activation, lengths


def _variance(activation: Tensor, lengths: Tensor) -> Tensor:
    mean = activation.sum(1, dtype=torch.float32) / lengths
    return (activation.float().square().sum(1) / lengths - mean.square()).clamp(min=0)


def _by_index(scores: Tensor) -> Tensor:
    return scores.flatten(1).sum(1) if scores.dim() > 1 else scores


# Of (batch, seq, size) and the samples' lengths. On a CPU, abs and sum are ten times as fast as vector_norm along the middle.
OVER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda activation, lengths: activation.abs().sum(1, dtype=torch.float32) / lengths,
    "l2": lambda activation, lengths: activation.float().square().sum(1).sqrt(),
    "variance": _variance,
}
