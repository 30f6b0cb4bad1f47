"""Depth metric: how much a layer changes what passes through it (2407.14679, section 2.2).

A metric sees activations and a mask, never a module, a hook or a layer.
"""

import torch
from torch import Tensor


class BlockImportance:
    """One minus the cosine between a layer's input and output, mean over all tokens.

    Example:

    ```python
    >>> metric = BlockImportance()
    >>> metric.update((torch.randn(2, 16, 40), torch.randn(2, 16, 40)))  # input and output, each (batch, seq, hidden)
    >>> metric.finish().shape
    torch.Size([])
    ```
    """

    def __init__(self):
        self._sum: Tensor | float = 0.0
        self._tokens: Tensor | int = 0

    def update(self, activation: tuple[Tensor, Tensor], mask: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            activation (`tuple[Tensor, Tensor]`): The layer's input and output, each of shape `(batch, seq, hidden)`.
            mask (`Tensor` of shape `(batch, seq)`, *optional*): 1 for text, 0 for padding; all text when left out.
        """
        before, after = activation
        change = 1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)  # (batch, seq)
        # float64 because a sum of many small changes is averaged; a few numbers per batch
        self._sum = self._sum + (change if mask is None else change * mask).sum(dtype=torch.float64)
        self._tokens = self._tokens + (change.numel() if mask is None else mask.sum())

    def finish(self) -> Tensor:
        """Return the float32 score of the layer, a scalar."""
        return (self._sum / self._tokens).float()
