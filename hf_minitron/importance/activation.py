"""Width metrics: how strongly an index of `ffn`, `heads` or `hidden` is activated (2407.14679, section 2.2).

A metric sees activations and a mask, never a module, a hook or a layer.
"""

import torch
from torch import Tensor


class ActivationNorm:
    """Mean of |x| over the sequence, L2 norm over the samples: the paper's choice for every width axis (table 11).

    Example:

    ```python
    >>> metric = ActivationNorm()
    >>> metric.update(torch.randn(2, 16, 96))  # (batch, seq, ffn)
    >>> metric.finish().shape
    torch.Size([96])
    ```
    """

    def __init__(self):
        self.totals: list[Tensor | float] = [0.0]  # the sum over samples of squared means

    def update(self, activation: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            activation (`Tensor` of shape `(batch, seq, size)`): What the tap read, viewed by axis.
            mask (`Tensor` of shape `(batch, seq)`, *optional*): 1 for text, 0 for padding; all text when left out.
            lengths (`Tensor` of shape `(batch, 1)`, *optional*): Number of tokens in every sample, where the activation holds
                only some of them (those that an expert sees) and the others count as zeros.
        """
        if mask is not None:
            activation = activation * mask.unsqueeze(-1).to(activation.dtype)
        if lengths is None:
            lengths = activation.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
        # on a CPU, abs and sum are ten times as fast as one vector_norm along the middle dimension
        mean = activation.abs().sum(1, dtype=torch.float32) / lengths  # (batch, size)
        self.totals[0] = self.totals[0] + mean.square().sum(0)

    def finish(self) -> Tensor:
        """Return the float32 score of every index, shape `(size,)`."""
        return self.totals[0].sqrt()
