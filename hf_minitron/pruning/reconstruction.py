"""Least-squares reconstruction: a projection's weights for the kept inputs are fitted to its output for all inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

# On SmolLM2-135M, 0.001 to 0.1 are alike on text like the calibration's, but on other text only 0.1 and more help.
RIDGE = 0.1
TOKENS = 65_536  # that sequential fits are made of: more still help text of other domains (docs/measurements.md)
SEQUENTIAL_PASSES = 6  # forward passes of the teacher that a sequential fit takes the time of (docs/measurements.md)


def least_squares(weight: Tensor, moment: Tensor, kept: Tensor, ridge: float, extra: Tensor | None = None) -> Tensor:
    """Fit a projection's weights for the kept inputs to its output for all inputs.

    Minimises E|W x + y - W' x_kept|² + ridge · mean(E x_kept²) · |W' - W_kept|² in float64: a large ridge gives plain slicing.

    Args:
        weight (`Tensor` of shape `(out, in)`): The projection.
        moment (`Tensor` of shape `(in, in)`): E[x xᵀ] of its inputs.
        kept (`Tensor` of shape `(kept,)`): The inputs that stay.
        ridge (`float`): As above.
        extra (`Tensor` of shape `(out, in)`, *optional*): E[y xᵀ] of a y that is added to the output; zero when left out.

    Returns:
        `Tensor` of shape `(out, kept)`: In the weight's dtype.

    Example:

    ```python
    >>> x = torch.randn(100, 8)
    >>> x[:, 1] = x[:, 0]  # the dropped input repeats a kept one
    >>> least_squares(torch.ones(1, 8), x.T @ x / 100, torch.tensor([0, 2, 3, 4, 5, 6, 7]), 1e-9)[0, 0]
    tensor(2.)
    ```
    """
    return factorised(moment.double(), kept, ridge)(weight.double(), extra).to(weight.dtype)


def factorised(
    moment: Tensor, kept: Tensor, ridge: float, mean: Tensor | None = None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what maps weights and `extra` as `least_squares` does, for all projections that read one input.

    The factorisation is made in float64. What is solved with it has the moment's dtype: a moment of float32 has errors of
    float32's size, and a solution in float32 is that of a moment as near.

    Args:
        moment (`Tensor` of shape `(in, in)`): E[x xᵀ] of the input.
        kept (`Tensor` of shape `(kept,)`): The inputs that stay.
        ridge (`float`): As for `least_squares`.
        mean (`Tensor` of shape `(in,)`, *optional*): E[x], where a bias takes up the means: the moment is centred by it.
    """
    kept = kept.to(moment.device)
    dropped = torch.ones(len(moment), dtype=torch.bool, device=moment.device)
    dropped[kept] = False

    def part(rows: Tensor) -> Tensor:
        block = moment[rows][:, kept].double()
        return block if mean is None else block.addr_(mean[rows].double(), mean[kept].double(), alpha=-1)

    inner = part(kept)
    inner.diagonal().add_(ridge * inner.diagonal().mean().clamp(min=1e-30))
    factor, cross = torch.linalg.cholesky(inner).to(moment), part(dropped).to(moment)
    del inner

    def solve(weight: Tensor, extra: Tensor | None = None) -> Tensor:
        missing = weight[:, dropped].to(cross) @ cross  # the dropped inputs' part of the output, times the kept inputs
        if extra is not None:
            missing = missing + extra[:, kept]
        return weight[:, kept] + torch.cholesky_solve(missing.T, factor).T

    return solve


def change_of(moment: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return what is added to weights so that they give what lacks of their output: that of least |r - D x|² with a ridge on D.

    Args:
        moment (`Tensor` of shape `(in, in)`): E[x xᵀ] of the input.
        cross (`Tensor` of shape `(out, in)`): E[r xᵀ] of what lacks, r.
        ridge (`float`): As for `least_squares`.
    """
    damped = moment.double()
    damped.diagonal().add_(ridge * damped.diagonal().mean().clamp(min=1e-30))
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped).to(cross)).T


def solver_device() -> torch.device:
    """Return where to compute in float64: an accelerator that can, or the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
