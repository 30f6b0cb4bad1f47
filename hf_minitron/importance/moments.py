"""What corrections after pruning need beside scores: second moments at the inputs of projections, energies at those of norms.

They are metrics like the others and read at the same taps; a metric sees activations and a mask, never a module or a hook.
"""

import torch
from torch import Tensor


class SecondMoment:
    """E[x xᵀ] and E[x] of what a projection reads, over every fourth token: for least squares, n samples do for n channels.

    Example:

    ```python
    >>> metric = SecondMoment()
    >>> metric.update(torch.randn(2, 16, 96))  # (batch, seq, ffn)
    >>> metric.finish().shape
    torch.Size([97, 96])
    ```
    """

    every = 4

    def __init__(self):
        self.totals: list[Tensor | float] = [0.0, 0.0]  # the sum over tokens of x xᵀ, with that of x below it; their number

    def update(self, activation: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch, as `Metric.update` has it."""
        tokens = activation.flatten(0, 1)
        tokens = (tokens if mask is None else tokens[mask.flatten() > 0])[:: self.every].float()
        if isinstance(self.totals[0], float):
            self.totals[0] = tokens.new_zeros(tokens.shape[1] + 1, tokens.shape[1])
        self.totals[0][:-1].addmm_(tokens.T, tokens)  # in place: it may take gigabytes
        self.totals[0][-1] += tokens.sum(0)
        self.totals[1] = self.totals[1] + torch.tensor(float(len(tokens)), device=tokens.device)

    def finish(self) -> Tensor:
        """Return the float32 moment with the mean as its last row, shape `(size + 1, size)`."""
        return self.totals[0] / self.totals[1].clamp(min=1)


class ChannelEnergy:
    """The share of a token's energy that each channel of a norm's input holds, mean over tokens; 1 on average.

    Example:

    ```python
    >>> metric = ChannelEnergy()
    >>> metric.update(torch.randn(2, 16, 40))  # (batch, seq, hidden)
    >>> round(metric.finish().mean().item(), 3)
    1.0
    ```
    """

    def __init__(self):
        self.totals: list[Tensor | float] = [0.0, 0.0]

    def update(self, activation: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch, as `Metric.update` has it."""
        squares = activation.float().square()
        share = squares / squares.mean(-1, keepdim=True).clamp(min=1e-30)
        counted = torch.ones(share.shape[:2], device=share.device) if mask is None else mask.float()
        self.totals[0] = self.totals[0] + (share * counted.unsqueeze(-1)).sum((0, 1))
        self.totals[1] = self.totals[1] + counted.sum()

    def finish(self) -> Tensor:
        """Return the float32 energies, shape `(hidden,)`."""
        return self.totals[0] / self.totals[1].clamp(min=1)
