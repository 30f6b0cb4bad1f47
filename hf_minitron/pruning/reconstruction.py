"""Least-squares reconstruction: a projection's weights for the kept inputs are fitted to its output for all inputs."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# On SmolLM2-135M, 0.001 to 0.1 are alike on text like the calibration's, but on other text only 0.1 and more help.
RIDGE = 0.1
# What is chosen from where text is left out of the fit.
RIDGES = (0.03, 0.1, 0.3, 1.0)
OUTPUTS = 64  # at least, of a projection, that the choice is made by


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


def solver_device() -> torch.device:
    """Return where to compute in float64: an accelerator that can, or the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


class Fit:
    """What fits a projection's change to what its output lacks, r: sums of x xᵀ, r xᵀ and r² over the tokens of each fold.

    Example:

    ```python
    >>> x = torch.randn(300, 5)
    >>> fit = Fit()
    >>> for fold in range(3):
    ...     fit.add(fold, x[fold::3], x[fold::3] @ torch.ones(5, 2))
    >>> fit.change().shape
    torch.Size([2, 5])
    ```
    """

    def __init__(self):
        self.sums: dict[int, list[Tensor]] = {}

    def add(self, fold: int, given: Tensor, lacking: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens: `(tokens, in)`, `(tokens, out)`, and what each of them counts, `(tokens,)`."""
        if weights is not None:
            given, lacking = given * weights.sqrt()[:, None], lacking * weights.sqrt()[:, None]
        more = [given.T @ given, lacking.T @ given, lacking.square().sum(0), torch.tensor(float(len(given)))]
        self.sums[fold] = [a + b for a, b in zip(self.sums[fold], more, strict=True)] if fold in self.sums else more

    def change(self) -> Tensor | None:
        """Return what is added to the weights, `(out, in)`; `None` where nothing that was tried helps every fold left out."""
        if not any(sums[2].any() for sums in self.sums.values()):
            return None
        worst = {ridge: max(self._error(fold, ridge) for fold in self.sums) for ridge in RIDGES}
        best = min(worst, key=worst.get)
        return self._solve(list(self.sums), best) if worst[best] < 1 else None

    def _means(self, folds: Sequence[int]) -> Iterator[Tensor]:
        """Yield the means of x xᵀ and r xᵀ, in which every fold counts the same."""
        for place in (0, 1):
            yield sum(self.sums[fold][place] / self.sums[fold][3] for fold in folds) / len(folds)

    def _solve(self, folds: Sequence[int], ridge: float, wide: torch.dtype = torch.float64, every: int = 1) -> Tensor:
        moment, cross = self._means(folds)
        damped = moment.to(wide, copy=True)
        damped.diagonal().add_(ridge * damped.diagonal().mean().clamp(min=1e-30))
        return torch.cholesky_solve(cross[::every].T, torch.linalg.cholesky(damped).to(cross)).T

    def _error(self, fold: int, ridge: float) -> float:
        """Return the error on a fold of what is fitted on the others, relative to that of no change; of some outputs."""
        moment, cross, squares, _ = self.sums[fold]
        every = max(1, len(cross) // OUTPUTS)
        change = self._solve([other for other in self.sums if other != fold] or [fold], ridge, torch.float32, every)
        gained = (change * (2 * cross[::every] - change @ moment)).sum()
        return float(1 - gained / squares[::every].sum().clamp(min=1e-30))
