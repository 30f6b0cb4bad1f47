"""search: the shapes near a budget that keep most of what matters, each as a recipe for a short run."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.student import check_target
from hf_minitron.checkpoint.checkpoint import best_device, best_dtype, resolve
from hf_minitron.evaluation.speed import shape_tokens_per_second
from hf_minitron.inputs import HASHES
from hf_minitron.pruning import search
from hf_minitron.pruning.search import Candidate
from hf_minitron.recipe import bind
from hf_minitron.run import Run, done_digest
from hf_minitron.shape import Shape, ShapeError
from hf_minitron.stage import Stage
from hf_minitron.stages import distill, evaluate
from hf_minitron.stages.target import suited, teacher
from hf_minitron.statistics import Statistics

FOLDER = "candidates"
SHARED = ("correct", "synthesize", "score")  # do not depend on the target
PROBES = 5  # random models, and the teacher's shape, whose measured speed predicts that of the others


@dataclass(frozen=True)
class Args:
    """The `search:` section."""

    budget: dict = field(
        metadata={
            "help": f"Any of {', '.join([*search.COSTS, *search.SPEEDS])}: a number, or a share of the teacher's ('50%')."
        }
    )
    grid: dict | None = field(
        default=None, metadata={"help": "Sizes to try by axis, the others as they are; when left out, some of the usual axes."}
    )
    multiple_of: dict | None = field(default=None, metadata={"help": "Divisors of new sizes; prune.multiple_of when left out."})
    tensor_parallel: int = field(
        default=1, metadata={"min": 1, "help": "Devices that heads, KV heads and MLP widths shall divide over."}
    )
    context: int = field(
        default=0,
        metadata={"min": 0, "help": "Tokens at which kv_cache_bytes and flops are counted; 0: one more of a long text."},
    )
    tolerance: float = field(default=0.05, metadata={"min": 0, "help": "How far from the budget, as a share of it."})
    top: int = field(default=5, metadata={"min": 1, "help": "Candidates, the best by score."})
    steps: int = field(default=300, metadata={"min": 1, "help": "distill.max_steps of a candidate; 2407.14679, figure 9."})


@dataclass(frozen=True)
class _Space:
    """What a search looks at: the teacher's architecture, the legal shapes and what they may cost."""

    architecture: Architecture
    before: Shape
    rows: Mapping[str, str]
    legal: Sequence[tuple[dict[str, int], Shape]]
    costs: Mapping[str, Callable[[Shape], float]]

    def holds(self, shape: Shape) -> bool:
        """Return whether a stock class holds a shape."""
        try:
            check_target(self.architecture, shape)
        except ShapeError:
            return False
        return True

    def speeds(self, shape: Shape) -> dict[str, float]:
        """Measure a shape on this machine."""
        device = best_device()
        measured = shape_tokens_per_second(self.architecture.config, shape, best_dtype(device), device)
        return {f"{kind}_tokens_per_second": value for kind, value in measured.items()}


def check(args: Args, run: Run) -> None:
    """Refuse a budget, a grid or sections that no candidate could be run with."""
    if measured(args):  # known later
        search.limits_of(args.budget, _costs_of_teacher(_space(args, run)) | dict.fromkeys(search.SPEEDS, 1.0))
    else:
        near(args, run)
    short = replace(run, recipe={**run.recipe, "distill": short_distillation(run, args)})
    for name, stage in {"distill": distill, "evaluate": evaluate}.items():  # every candidate needs them
        bind(short, name, stage.Args)


def measured(args: Args) -> list[str]:
    """Return the names of a budget that are measured when search runs: its speeds."""
    return [name for name in search.SPEEDS if name in args.budget]


def near(args: Args, run: Run) -> list[Candidate]:
    """Return the shapes near a budget that names no speed, from the model's config alone.

    Raises:
        ValueError: when there is none, or the budget is none.
    """
    space = _space(args, run)
    return search.candidates(space.legal, search.limits_of(args.budget, _costs_of_teacher(space)), space.costs, args.tolerance)


def even(found: Iterable[Candidate], before: Shape) -> Candidate:
    """Return the candidate whose most cut axis is cut least: what stands for all while nothing is scored."""
    return min(found, key=lambda candidate: max(1 - size / before[axis] for axis, size in candidate.target.items()))


def _costs_of_teacher(space: _Space) -> dict[str, float]:
    return {name: cost(space.before) for name, cost in space.costs.items()}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `candidates.json`."""
    space, statistics = _space(args, run), Statistics.load(run.path("score"))
    scores = dict(statistics.scores)
    if statistics.token_counts is not None:  # the share of the text that the commonest tokens are
        scores["vocab"] = statistics.token_counts.double()
    speeds = measured(args)
    teacher = _costs_of_teacher(space) | (space.speeds(space.before) if speeds else {})
    limits = search.limits_of(args.budget, teacher)
    costs = {**space.costs, **(_predicted(space, teacher) if speeds else {})}
    found = search.rank(search.candidates(space.legal, limits, costs, args.tolerance), scores, space.before)
    best = (candidate for candidate in found if space.holds(candidate.shape))
    if speeds:
        best = _measured(best, space, limits, args)
    best = list(itertools.islice(best, args.top))
    if not best:
        raise ShapeError(f"No stock class holds any of the {len(found):,} shapes near the budget; give another grid")
    every = [replace(c, costs={name: cost(c.shape) for name, cost in space.costs.items()} | dict(c.costs)) for c in best]
    content = {
        "budget": limits,
        "near_the_budget": len(found),
        "teacher": {"shape": space.before.axes, "costs": teacher},
        "candidates": [{"name": c.name, **asdict(replace(c, shape=c.shape.axes))} for c in every],
    }
    (out / "candidates.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def report(run: Run) -> str:
    """Write every candidate's recipe, share the finished scores with it, and say how to run it."""
    args, found = bind(run, "search", Args), load(run)
    lines = [
        f"{found['near_the_budget']:,} shapes near the budget; the best by score, to be judged after a short distillation:"
    ]
    for entry in found["candidates"]:
        child = candidate(run, entry["name"], entry["target"], args)
        start(child, run)
        costs = ", ".join(f"{name} {entry['costs'][name]:,.6g}" for name in found["budget"])
        lines.append(f"  hf-minitron run {child.recipe_path}    # score {entry['score']:.4f}, {costs}")
    others = {path.name for path in (run.folder / FOLDER).iterdir()} - {entry["name"] for entry in found["candidates"]}
    if others:
        lines.append(f"Left from another search in {run.folder / FOLDER}: {', '.join(sorted(others))}")
    return "\n".join([*lines, f"Then: hf-minitron select {run.recipe_path}"])


def load(run: Run) -> dict:
    """Read what the search found."""
    return json.loads((run.path("search") / "candidates.json").read_text(encoding="utf-8"))


def child_recipe(run: Run, folder: Path, target: Mapping[str, int], args: Args) -> dict[str, Any]:
    """Return the recipe with another target, in another folder; relative paths stay relative to the working directory."""
    recipe = {key: value for key, value in run.recipe.items() if key not in ("search", "select")}
    prune = {**run.section("prune"), "target": dict(target), "multiple_of": _multiple_of(args, run)}
    return {**recipe, "run": str(folder), "prune": prune}


def short_distillation(run: Run, args: Args) -> dict[str, Any]:
    """Return the `distill:` section of a candidate."""
    return {**run.section("distill"), "max_steps": args.steps}


def candidate(run: Run, name: str, target: Mapping[str, int], args: Args) -> Run:
    """Return a candidate's run: a short distillation, perplexity only, nowhere to push to."""
    folder = run.folder / FOLDER / name
    recipe = child_recipe(run, folder, target, args)
    recipe["distill"] = short_distillation(run, args)
    asked = ("tasks", "include_path", "limit", "few_shot", "chat_template", "generate", "max_new_tokens")
    text = {key: value for key, value in run.section("evaluate").items() if key not in asked}
    recipe["evaluate"] = {**text, "tasks": [], "speed": False, "models": {}}
    recipe["publish"] = {key: value for key, value in run.section("publish").items() if key != "repo_id"}
    return Run(folder, run.model, run.seed, recipe, folder / "recipe.yaml")


def start(child: Run, run: Run, stages: Sequence[str] = SHARED) -> None:
    """Claim a child's folder and share finished stages with it, by default those that do not depend on the target.

    Its digests of them are the same.
    """
    with child.locked():
        child.claim()
        _share(child, run, stages)


def _share(child: Run, run: Run, stages: Sequence[str]) -> None:
    if (run.folder / HASHES).is_file():
        shutil.copy2(run.folder / HASHES, child.folder / HASHES)
    for stage in stages:
        if done_digest(child.path(stage)) == done_digest(run.path(stage)) or not run.path(stage).is_dir():
            continue
        part = child.folder / f"{stage}.part"  # gets its name only when complete
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(run.path(stage), part, copy_function=_link)
        shutil.rmtree(child.path(stage), ignore_errors=True)
        part.rename(child.path(stage))


def _link(source: str, target: str) -> None:
    """Give a file a second name; stages replace whole folders and never write into a finished file."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _multiple_of(args: Args, run: Run) -> dict[str, int]:
    if args.multiple_of is not None:
        return dict(args.multiple_of)
    return dict(run.section("prune").get("multiple_of", suited(teacher(run.model).shape)))


def _space(args: Args, run: Run) -> _Space:
    config = AutoConfig.from_pretrained(resolve(run.model))
    architecture = Architecture.of(config)
    before, rows = architecture.shape, architecture.rows
    size, multiple_of = (config.dtype or torch.float32).itemsize, _multiple_of(args, run)
    before.cut_to({}, multiple_of)  # refuses what is no divisor
    grid = search.default_grid(before, multiple_of) if args.grid is None else args.grid
    legal = search.legal_shapes(before, grid, multiple_of, args.tensor_parallel)
    costs = {name: partial(cost, rows=rows, size=size, context=args.context) for name, cost in search.COSTS.items()}
    return _Space(architecture, before, rows, legal, costs)


def _predicted(space: _Space, teacher: Mapping[str, float]) -> dict[str, Callable[[Shape], float]]:
    """Return what predicts the speeds, from measuring a few shapes between the smallest and the teacher's."""
    probes = search.size_probes(space.legal, space.holds, space.rows, PROBES)
    measured = [teacher, *map(space.speeds, probes)]
    shapes = [space.before, *probes]
    return {name: search.fit_speed(shapes, [speed[name] for speed in measured], space.rows) for name in search.SPEEDS}


def _measured(found: Iterable[Candidate], space: _Space, limits: Mapping[str, float], args: Args) -> list[Candidate]:
    """Measure the best candidates, twice as many as are wanted, and keep those that meet the budget in truth."""
    looked_at = [replace(c, costs={**c.costs, **space.speeds(c.shape)}) for c in itertools.islice(found, 2 * args.top)]
    used = [float(search.budget_fraction(c.costs, limits)) for c in looked_at]
    near = [c for c, use in zip(looked_at, used, strict=True) if abs(use - 1) <= args.tolerance]
    if looked_at and not near:
        nearest = min(used, key=lambda use: abs(use - 1))
        raise ShapeError(
            f"Measured, none of the {len(looked_at)} best shapes is within {args.tolerance:.0%} of the budget; the nearest "
            f"needs {nearest:.0%} of it. Raise search.tolerance, or measure on a machine that does nothing else"
        )
    return near


STAGE = Stage("search", __doc__, Args, check, run, needs=("score",), in_run=False, report=report)
