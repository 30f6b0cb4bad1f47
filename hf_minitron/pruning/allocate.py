"""Nonuniform allocation: one choice in every group, the least total error that the budget can pay.

Groups and choices may be anything: a layer's MLP and its widths, say, with the error of each width measured before.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


def allocate(
    options: Mapping[Hashable, Sequence[tuple[float | Sequence[float], float]]], budget: float | Sequence[float]
) -> dict[Hashable, int]:
    """Choose one option of every group so that the errors add up to the least and the costs to no more than the budget.

    A mixed-integer linear program, as in Puzzle (2411.19146), solved to the optimum by `scipy.optimize.milp`, which takes a
    budget as kept up to a millionth of it. That errors of layers add up is an assumption.

    Args:
        options (`Mapping[Hashable, Sequence[tuple]]`): Group, such as `("ffn", layer)`, to its choices, each a cost (or one
            for every budget: parameters, bytes of KV cache) and an error.
        budget (`float` or `Sequence[float]`): Limit of the total cost, or of every cost.

    Returns:
        `dict[Hashable, int]`: Group to the index of its choice.

    Raises:
        ValueError: when no choice is cheap enough, with the least possible cost.

    Example:

    ```python
    >>> allocate({"first": [(10, 0.0), (5, 0.1)], "second": [(10, 0.0), (0, 0.7)]}, budget=15)
    {'first': 1, 'second': 0}
    ```
    """
    empty = [group for group, choices in options.items() if not choices]
    if empty or not options:
        raise ValueError(f"{empty[0]!r} has no choices" if empty else "No groups to choose in")
    limits = np.atleast_1d(np.asarray(budget, dtype=float))
    costs = [np.atleast_1d(np.asarray(cost, dtype=float)) for choices in options.values() for cost, _ in choices]
    errors = np.array([error for choices in options.values() for _, error in choices], dtype=float)
    wrong = next((cost for cost in costs if len(cost) != len(limits)), None)
    if wrong is not None:
        raise ValueError(f"A choice has {len(wrong)} costs, but there are {len(limits)} budgets")
    costs = np.stack(costs, axis=1)  # (budgets, choices)
    if not (np.isfinite(costs).all() and np.isfinite(errors).all() and np.isfinite(limits).all()):
        raise ValueError("Costs, errors and budgets must be finite numbers")
    counts = [len(choices) for choices in options.values()]
    starts = np.cumsum([0, *counts[:-1]])
    least = np.minimum.reduceat(costs, starts, axis=1).sum(axis=1)
    if (least > limits).any():
        raise ValueError(f"The least possible cost is {_words(least)}, more than the budget of {_words(limits)}")
    chosen = _solve(costs, errors, limits, counts)
    if chosen is None:
        raise ValueError(
            f"The budgets of {_words(limits)} can be met one by one, but not all at once. The least possible costs are "
            f"{_words(least)}; raise one budget"
        )
    return dict(zip(options, (chosen - starts).tolist(), strict=True))


def _solve(costs: np.ndarray, errors: np.ndarray, limits: np.ndarray, counts: Sequence[int]) -> np.ndarray | None:
    """Return the chosen columns, one per group, or `None` when there are none."""
    columns, groups = np.arange(len(errors)), np.repeat(np.arange(len(counts)), counts)
    one_of_each = csr_array((np.ones(len(errors)), (groups, columns)), shape=(len(counts), len(errors)))
    scale = np.where(limits == 0, 1, np.abs(limits))  # the solver's tolerances are absolute: make every number about 1
    size = np.abs(errors).max() or 1.0
    constraints = [LinearConstraint(one_of_each, 1, 1), LinearConstraint(costs / scale[:, None], ub=limits / scale)]
    solved = milp(errors / size, integrality=1, bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0})
    if solved.status == 2:  # infeasible
        return None
    if not solved.success:
        raise RuntimeError(f"scipy.optimize.milp: {solved.message}")
    return np.flatnonzero(solved.x > 0.5)


def _words(values: np.ndarray) -> str:
    return " and ".join(f"{value:,.6g}" for value in values)
