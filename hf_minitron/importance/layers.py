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

    axis = "layers"

    def __init__(self):
        self.totals: list[Tensor | float] = [0.0, 0.0]  # the sum over tokens of what changes, the number of tokens

    def update(self, activation: tuple[Tensor, Tensor], mask: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            activation (`tuple[Tensor, Tensor]`): The layer's input and output, each of shape `(batch, seq, hidden)`.
            mask (`Tensor` of shape `(batch, seq)`, *optional*): 1 for text, 0 for padding; all text when left out.
        """
        before, after = activation
        change = 1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)  # (batch, seq)
        counted = torch.ones_like(change) if mask is None else mask.to(change.dtype)
        # float64 because a sum of many small changes is averaged; a few numbers per batch
        self.totals[0] = self.totals[0] + (change * counted).sum(dtype=torch.float64)
        self.totals[1] = self.totals[1] + counted.sum(dtype=torch.float64)

    def finish(self) -> Tensor:
        """Return the float32 score of the layer, a scalar."""
        return (self.totals[0] / self.totals[1]).float()
