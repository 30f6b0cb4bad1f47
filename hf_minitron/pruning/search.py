"""Uniform search: the legal shapes near a budget, and which of them keep most of what was measured to matter.

It must not build a model: whether a class holds a shape and how fast it is are questions that the caller answers.
"""

import difflib
import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from hf_minitron import axes
from hf_minitron.plan import make_plan
from hf_minitron.shape import Shape

# What a shape (or many at once) costs, from its rows, the bytes of a number and a context (0: one more token of a long text).
Cost = Callable[..., int]
COSTS: dict[str, Cost] = {
    "parameters": lambda shape, rows, size, context=0: shape.num_parameters(rows),
    "body_parameters": lambda shape, rows, size, context=0: shape.num_parameters(body_rows(rows)),
    "bytes": lambda shape, rows, size, context=0: shape.num_parameters(rows) * size,
    "kv_cache_bytes": lambda shape, rows, size, context=0: (
        shape.cache_bytes(context, size) if context else shape.kv_cache_bytes_per_token(size)
    ),
    "flops": lambda shape, rows, size, context=0: shape.flops_per_token(rows, context),
}
# What is measured, of which a student shall have more, not less.
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second")

# The grid when a recipe gives none: of a few axes, sizes from this share of the model's on. 2407.14679, table 9, drops up to a
# tenth of the layers and cuts the widths down to about a half; KV heads stay.
LEAST_SHARE = {"layers": 0.9, "hidden": 0.5, "ffn": 0.5, "experts": 0.5, "heads": 0.5}
STEPS = 16  # sizes of an axis are at least a sixteenth of the model's apart
MAX_SHAPES = 1_000_000  # shapes that are counted; 2 GB of memory, a minute

# Axes that are cut together, and their order in a candidate's score.
TOGETHER = (("layers",), ("hidden",), ("ffn",), ("dense_ffn",), ("shared_ffn",), ("experts",), ("heads", "kv_heads"),
            ("ssm_heads",), ("conv_channels",), ("vocab",))  # fmt: skip
# Axes that tensor parallelism splits over its devices.
SPLIT = ("heads", "kv_heads", "ssm_heads", "ffn", "dense_ffn", "shared_ffn")


@dataclass(frozen=True)
class Candidate:
    """A shape that the budget allows.

    Args:
        target (`Mapping[str, int]`): The new sizes, as `prune.target` takes them.
        shape (`Shape`): The whole shape.
        costs (`Mapping[str, float]`): What it costs, by the names of the budgets.
        score (`float`, *optional*): Share of the measured importance that it keeps.
    """

    target: Mapping[str, int]
    shape: Shape
    costs: Mapping[str, float]
    score: float | None = None

    @property
    def name(self) -> str:
        """A name for folders and tables: the new sizes."""
        return "-".join(f"{axis}{size}" for axis, size in self.target.items())


def body_rows(rows: Mapping[str, str]) -> dict[str, str]:
    """Return the rows without a vocabulary dimension: the parameters that width and depth are about."""
    return {row: p for row, p in rows.items() if not any("vocab" in axes.dim_names(dim) for dim in axes.parse(p))}


def limits_of(budget: Mapping[str, object], teacher: Mapping[str, float]) -> dict[str, float]:
    """Read a budget: a number is absolute, text with a percent sign a share of what the teacher has.

    Args:
        budget (`Mapping`): Name of a cost to a number (`100e6`) or a share (`"50%"`).
        teacher (`Mapping[str, float]`): What the teacher costs.

    Raises:
        ValueError: for an unknown name and for a value that is neither.
    """
    limits = {}
    for name, value in budget.items():
        if name not in teacher:
            near = difflib.get_close_matches(str(name), teacher, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use any of {', '.join(teacher)}"
            raise ValueError(f"budget: {name!r} is not something to budget; {hint}")
        number = value
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                number = float(value.strip()[:-1]) / 100 * teacher[name]
            except ValueError:
                number = None
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise ValueError(
                f"budget: {name}: {value!r} is neither a number above 0 nor a share of the teacher's such as '50%'"
            )
        limits[name] = number
    if not limits:
        raise ValueError(f"budget is empty: set any of {', '.join(teacher)}")
    return limits


def default_grid(before: Shape, multiple_of: Mapping[str, int]) -> dict[str, list[int]]:
    """Return sizes to try of every axis of `LEAST_SHARE` that the model has, the model's own among them."""
    groups = before.kv_groups if before.sizes.get("heads", 0) > before.kv_groups else 1
    unit = {"heads": groups, "experts": before.sizes.get("expert_groups", 1)}
    grid = {}
    for axis, share in LEAST_SHARE.items():
        if axis in before.sizes and axis not in {**before.coupled, **before.fixed}:
            size = before[axis]
            step = math.lcm(unit.get(axis, 1), before.unit(axis), multiple_of.get(axis, 1))
            least, step = math.ceil(share * size), step * max(1, math.ceil(size / STEPS / step)) if axis != "layers" else step
            grid[axis] = [n for n in range(step, size, step) if n >= least] + [size]
    return grid


def check_grid(before: Shape, grid: Mapping[str, Sequence[int]], multiple_of: Mapping[str, int]) -> None:
    """Refuse sizes that no shape can have and a grid with too many shapes.

    Raises:
        ValueError: with every such size, or the number of shapes.
    """
    before.cut_to({}, multiple_of)
    problems = []
    for axis, sizes in grid.items():
        if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
            problems.append(f"{axis}: {sizes!r} is not a list of sizes")
        else:
            problems += [problem for size in sizes for problem in before.size_problems(axis, size, multiple_of)]
    if problems:
        raise ValueError("grid: " + "; ".join(dict.fromkeys(problems)))
    if (count := math.prod(map(len, grid.values()))) > MAX_SHAPES:
        raise ValueError(f"grid: {count:,} shapes; at most {MAX_SHAPES:,} are looked at: give fewer sizes")


def legal_shapes(
    before: Shape, grid: Mapping[str, Sequence[int]], multiple_of: Mapping[str, int], tensor_parallel: int = 1
) -> list[tuple[dict[str, int], Shape]]:
    """Return every target on a grid that the model can be cut to, with its shape; the model's own is left out.

    Args:
        before (`Shape`): The teacher's shape.
        grid (`Mapping[str, Sequence[int]]`): Axis to the sizes to try.
        multiple_of (`Mapping[str, int]`): Divisor that the new size of an axis must have.
        tensor_parallel (`int`, *optional*, defaults to 1): Devices that heads, KV heads and widths of MLPs shall divide over.

    Raises:
        ValueError: when there is none.
    """
    check_grid(before, grid, multiple_of)
    shapes = []
    for sizes in itertools.product(*(sorted(set(sizes)) for sizes in grid.values())):
        target = {axis: size for axis, size in zip(grid, sizes, strict=True) if size != before[axis]}
        try:
            shape = before.cut_to(dict(zip(grid, sizes, strict=True)), multiple_of)
        except ValueError:
            continue
        if target and all(shape[axis] % tensor_parallel == 0 for axis in SPLIT if axis in shape.sizes):
            shapes.append((target, shape))
    if not shapes:
        split = ", ".join(f"{axis} {before[axis]}" for axis in SPLIT if axis in before.sizes)
        raise ValueError(
            f"No shape of the grid is legal with tensor_parallel {tensor_parallel} (the teacher has {split}). Give the grid "
            "sizes of these axes that divide by it, or set a smaller tensor_parallel"
        )
    return shapes


def candidates(
    legal: Sequence[tuple[Mapping[str, int], Shape]],
    limits: Mapping[str, float],
    costs: Mapping[str, Callable[[Shape], float]],
    tolerance: float = 0.05,
) -> list[Candidate]:
    """Return the shapes near the budget: within the tolerance of it, where one budget is given.

    Of several budgets none may be exceeded by more than the tolerance, and the tightest must be met.

    Args:
        legal (`Sequence[tuple]`): Targets and shapes from `legal_shapes`.
        limits (`Mapping[str, float]`): Name of a cost to its budget, from `limits_of`.
        costs (`Mapping[str, Callable]`): Name of a cost to what counts it for many shapes at once.
        tolerance (`float`, *optional*, defaults to 0.05): 2407.14679, table 9, takes 5 percent.

    Raises:
        ValueError: when there is none, with the nearest.
    """
    many = _many([shape for _, shape in legal])
    counted = {name: np.broadcast_to(costs[name](many), len(legal)) for name in limits}
    used = budget_fraction(counted, limits)
    (near,) = np.nonzero(np.abs(used - 1) <= tolerance)
    if not len(near):
        i = int(np.abs(used - 1).argmin())
        least, most = (f"{share:.0%}" for share in (used.min(), used.max()))
        raise ValueError(
            f"No shape within {tolerance:.0%} of the budget {_words(limits)}: the {len(legal):,} legal ones of the grid need "
            f"{least} to {most} of it, the nearest {used[i]:.1%} ({_words(legal[i][0])}). Change the budget, or give a grid "
            "with other or more sizes"
        )
    return [Candidate(*legal[i], {name: values[i].item() for name, values in counted.items()}) for i in near]


def budget_fraction(costs: Mapping[str, object], limits: Mapping[str, float]):
    """Return the share of the tightest budget that costs use up; of a speed, what is wanted over what is reached."""
    shares = [limits[name] / costs[name] if name in SPEEDS else costs[name] / limits[name] for name in limits]
    return np.maximum.reduce(shares)


def rank(found: Sequence[Candidate], scores: Mapping[str, Tensor], before: Shape) -> list[Candidate]:
    """Order candidates by the share of the measured importance that they keep, the best first.

    The score is a product over the axes: of the sum of an axis's scores, the share of the indices that `make_plan` keeps,
    mean over layers. So it is 1 for the teacher, and an axis whose importance sits in few indices is cheap to cut. It compares
    axes that were measured differently and knows nothing of what training repairs: 2407.14679 (section 4.3) found that
    rankings before training do not hold. Take several of the best and let a short distillation decide.
    """
    kept: dict[tuple, float] = {}

    def score(shape: Shape) -> float:
        total = 1.0
        for together in TOGETHER:
            sizes = {axis: shape[axis] for axis in together if axis in before.sizes and shape[axis] != before[axis]}
            if sizes:
                key = tuple(sizes.items())
                if key not in kept:
                    kept[key] = kept_share(scores, before, sizes)
                total *= kept[key]
        return total

    scored = [replace(candidate, score=score(candidate.shape)) for candidate in found]
    return sorted(scored, key=lambda candidate: (-candidate.score, candidate.name))


def kept_share(scores: Mapping[str, Tensor], before: Shape, sizes: Mapping[str, int]) -> float:
    """Return the share of an axis's importance that its best indices hold, mean over layers.

    Args:
        scores (`Mapping[str, Tensor]`): Importance of every index.
        before (`Shape`): The teacher's shape.
        sizes (`Mapping[str, int]`): The new size of one axis; of `heads` and `kv_heads` together.
    """
    axis = "heads" if "kv_heads" in sizes else next(iter(sizes))
    keep = make_plan(scores, before, before.with_sizes({**before.sizes, **sizes})).keep[axis]
    by_layer = scores[axis]
    if by_layer.dim() == 1:  # one order for the model
        keep, by_layer = [keep], by_layer[None]
    pairs = [(values, torch.tensor(kept)) for values, kept in zip(by_layer, keep, strict=True) if kept]
    return sum((values.gather(-1, kept).sum() / values.nansum()).item() for values, kept in pairs) / len(pairs)


def _many(shapes: Sequence[Shape]) -> Shape:
    """Return one shape whose sizes are arrays, so that costs are counted at once."""
    by_layer = {axis: tuple(np.array([shape.by_layer[axis] for shape in shapes]).T) for axis in shapes[0].by_layer}
    return replace(shapes[0], sizes={axis: np.array([s[axis] for s in shapes]) for axis in shapes[0].sizes}, by_layer=by_layer)


def size_probes(
    legal: Sequence[tuple[Mapping, Shape]], holds: Callable[[Shape], bool], rows: Mapping, count: int
) -> list[Shape]:
    """Return a few shapes from the smallest to the largest, near even steps, of those that can be built (`holds`)."""
    many = _many([shape for _, shape in legal])
    shapes = [legal[i][1] for i in np.argsort(many.num_parameters(rows), kind="stable")]
    places = np.linspace(0, len(shapes) - 1, count).round().astype(int)
    probes = []
    for place in places:
        near = heapq.nsmallest(200, range(len(shapes)), key=lambda i, place=place: abs(i - place))
        probes += itertools.islice((shapes[i] for i in near if shapes[i] not in probes and holds(shapes[i])), 1)
    return probes


def fit_speed(
    shapes: Sequence[Shape], tokens_per_second: Sequence[float], rows: Mapping[str, str]
) -> Callable[[Shape], np.ndarray]:
    """Return what predicts tokens per second: a token's time as so much a pass, so much a layer and so much a FLOP.

    None of the three is negative, and it is the relative error that is made small (`scipy.optimize.nnls`).

    Args:
        shapes (`Sequence[Shape]`): Shapes that were measured.
        tokens_per_second (`Sequence[float]`): What was measured.
        rows (`Mapping[str, str]`): The model's rows.
    """

    def features(shape: Shape) -> np.ndarray:
        parts = np.broadcast_arrays(1.0, shape["layers"], shape.flops_per_token(rows) / 1e6)
        return np.stack(parts, axis=-1)

    measured = np.stack([features(shape) for shape in shapes])
    speeds = np.asarray(tokens_per_second, dtype=float)[:, None]
    weights, _ = nnls(measured * speeds, np.ones(len(shapes)))
    return lambda shape: 1 / (features(shape) @ weights)


def _words(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:,.6g}" if value < 1e6 else f"{name} {value:,.0f}" for name, value in values.items())
