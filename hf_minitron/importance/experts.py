"""Expert metric: what an expert adds to the tokens that the router sends to it (REAP, 2510.13999, section 4).

A metric sees activations and a mask, never a module, a hook or a layer.
"""

import torch
from torch import Tensor


class RoutedOutputNorm:
    """The router's weight times the norm of the expert's output, mean over the tokens that the expert sees.

    Example:

    ```python
    >>> metric = RoutedOutputNorm()
    >>> metric.update(torch.tensor([[[0.0, 0.4], [0.0, 0.2]]]))  # (batch, seq, experts)
    >>> metric.finish()
    tensor([0.0000, 0.3000])
    ```
    """

    axis = "experts"

    def __init__(self):
        self.totals: list[Tensor | float] = [0.0, 0.0]  # the sum over tokens, the number of tokens; both by expert

    def update(self, activation: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            activation (`Tensor` of shape `(batch, seq, experts)`): Norm of every expert's weighted output; 0 where the router
                does not send the token to the expert.
            mask (`Tensor` of shape `(batch, seq)`, *optional*): 1 for text, 0 for padding; all text when left out.
        """
        if mask is not None:
            activation = activation * mask.unsqueeze(-1)
        self.totals[0] = self.totals[0] + activation.sum((0, 1), dtype=torch.float32)
        self.totals[1] = self.totals[1] + (activation != 0).sum((0, 1), dtype=torch.float32)

    def finish(self) -> Tensor:
        """Return the float32 score of every expert, shape `(experts,)`; 0 for one that saw no token."""
        return self.totals[0] / self.totals[1].clamp(min=1)
