"""The verbs that do something: one per stage, `run` for all of them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState

from hf_minitron.chain import check_chain, placeholder_models, with_placeholders
from hf_minitron.data.texts import COMMITS
from hf_minitron.errors import told
from hf_minitron.evaluation.report import Report
from hf_minitron.evaluation.wording import quality_rows, sentence, speed_rows
from hf_minitron.execute import execute, is_done, named, read_inputs
from hf_minitron.memory import keep_freed_memory
from hf_minitron.planning.estimate import store_values, stored_values, time_allows, with_values
from hf_minitron.planning.plan_text import plan_text
from hf_minitron.recipe import bind, load_recipe
from hf_minitron.recipe_file import check_listed
from hf_minitron.run import RecipeError, Run
from hf_minitron.stage import Stages
from hf_minitron.stages import publish
from hf_minitron.stages.every import STAGES
from hf_minitron.stages.share import with_sizes
from hf_minitron.tables import markdown_table
from hf_minitron.terminal import quiet_libraries
from hf_minitron.waiting import alone, end_group, from_first, together


def main(args: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    """Do a verb of the command; return its exit code."""
    COMMITS.clear()  # a command reads every dataset of the Hub at the commit that it finds
    with told():
        sections = {name: stage.args for name, stage in STAGES.items()}
        runs = [load_recipe(path, overrides, sections) for path in (args.recipe if args.verb == "run" else [args.recipe])]
        check_chain(runs, overrides)
        run = runs[0]
        if args.verb == "report":
            print(publish.report(with_values(sized(run), stored_values(run) or {}), args.open))
            return 0
    keep_freed_memory()
    quiet_libraries()
    PartialState(cpu=not torch.accelerator.is_available())  # all later ones are this one; unasked, it sees no CPU ranks
    push = _push(args)
    if args.verb == "run":
        if len(runs) > 1:
            check_ahead(runs, push)
        for run in runs:
            run_all(run, push)
    else:
        run_stages(sized(run), [args.verb], push)
    end_group()
    return 0


def _push(args: argparse.Namespace) -> Callable[[publish.Args, Run], str] | None:
    """Return what follows the stages: a push, its preview, or nothing."""
    if getattr(args, "dry_run", False) and not args.push:
        raise RecipeError("--dry-run says what --push would upload, so give both; all stages would run without it too")
    return (publish.preview if args.dry_run else publish.push) if getattr(args, "push", False) else None


def check_ahead(runs: Sequence[Run], push: Callable[[publish.Args, Run], str] | None) -> None:
    """Check every recipe of a chain before the first is begun, and say how long each will take."""
    if not PartialState().is_main_process:
        return
    with TemporaryDirectory() as scratch:
        placeholders: dict[Path, Path] = {}
        for number, run in enumerate(runs):
            try:
                ahead = sized(with_placeholders(run, placeholders))
                run.check_owner()
                run.check_free()
                check_stages(ahead, list(own_stages(run)), push, finished(run, list(own_stages(run))))
                if run is not runs[-1]:
                    placeholders |= placeholder_models(run, ahead, Path(scratch) / str(number))
                print(f"{run.recipe_path}: {time_allows(ahead, own_stages(ahead), estimate=True)[1]}\n", flush=True)
            except ValueError as error:
                raise RecipeError(f"{run.recipe_path}: {error}") from error


def sized(run: Run) -> Run:
    """Return a run whose target has sizes, where the recipe has shares of the model's; refuse values of a wrong type."""
    with told("prune: "):
        recipe = with_sizes(run.recipe)
    with told():
        check_listed(recipe)
    return run if recipe is run.recipe else replace(run, recipe=recipe)


def own_stages(run: Run) -> Stages:
    """Return the stages of `run`: all but the optional ones that the recipe leaves out."""
    return {n: stage for n, stage in STAGES.items() if stage.in_run and (n in run.recipe or not stage.optional)}


def run_all(run: Run, push: Callable[[publish.Args, Run], str] | None = None) -> None:
    """Check every stage, say how long it will take, do what is not done, and show the result."""
    run = sized(run)
    if PartialState().is_main_process:
        with told():
            print(plan_text(run.recipe), flush=True)
    run_stages(run, list(own_stages(run)), push, estimate=True)
    if PartialState().is_main_process:
        report = Report.load(run.path("evaluate") / "report.json")
        print("\n" + markdown_table(quality_rows(report)))
        if report.speed:
            print("\n" + markdown_table(speed_rows(report)))
        if comparisons := report.against("teacher", "distilled"):
            print("\n" + "\n".join(sentence(report, found) for found in comparisons))
        folder = run.path("publish") / "model"
        print(f"\nStudent: {folder}\nCard:    {folder / 'README.md'}")


def run_stages(
    run: Run, stages: Sequence[str], push: Callable[[publish.Args, Run], str] | None = None, estimate: bool = False
) -> None:
    """Do some stages in order: all their checks first, on every process of `accelerate launch`, then the work."""
    state = PartialState()
    if state.is_main_process:
        run.check_owner()
        run.check_free()
    done = finished(run, stages)
    check_stages(run, stages, push, done)
    values, text = {}, ""
    if state.is_main_process:
        with told(), alone():
            values, text = time_allows(run, own_stages(run), estimate, done)
    with together(run.folder):
        values = from_first(run.folder, values)
        whole, run = run, with_values(run, values)
        bound = {name: bind(run, name, STAGES[name].args) for name in stages}
        with run.locked() if state.is_main_process else nullcontext():
            if state.is_main_process:
                run.claim()  # only a run whose checks all pass
                read_inputs(run, stages, STAGES)
                if "minutes" in run.recipe:
                    store_values(whole, values)
                if estimate:
                    print("\n" + text, flush=True)
            COMMITS.update(from_first(run.folder, COMMITS))
            for name, args in bound.items():
                execute(run, name, args, STAGES)
                if STAGES[name].report and state.is_main_process:
                    print("\n" + STAGES[name].report(run))
            if push and state.is_main_process:
                with named("publish"):
                    print(push(bound["publish"], run))


def finished(run: Run, stages: Sequence[str]) -> list[str]:
    """Return those of some stages that are done as the recipe has them, so that they need neither checks nor the Hub."""
    if not PartialState().is_main_process:
        return []
    with told():
        run = with_values(run, stored_values(run) or {})
        return [name for name in stages if is_done(run, name, STAGES)]


def check_stages(
    run: Run,
    stages: Sequence[str],
    push: Callable[[publish.Args, Run], str] | None,
    done: Sequence[str] = (),
) -> None:
    """Read the arguments of some stages, on every process; the first one checks those that are not done."""
    with told():
        bound = {name: bind(run, name, STAGES[name].args) for name in stages}
    if push and bound["publish"].repo_id is None:
        raise RecipeError("--push needs a repository: set publish.repo_id, or --publish.repo_id owner/name")
    if not PartialState().is_main_process:
        return
    for name, args in bound.items():
        if name in done and not (push and name == "publish"):
            continue
        with told(f"{name}: "), named(name):
            STAGES[name].check(args, run)
