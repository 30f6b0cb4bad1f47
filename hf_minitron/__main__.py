"""The `hf-minitron` command: one verb per stage, `run` for all of them, `plan` to look before you leap."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import PartialState
from transformers import AutoConfig, TrainingArguments

from hf_minitron.chain import check_chain, placeholder_models, with_placeholders
from hf_minitron.checkpoint import resolve
from hf_minitron.errors import one_line
from hf_minitron.estimate import store_values, stored_values, time_allows, with_values
from hf_minitron.evaluation.report import Report
from hf_minitron.evaluation.wording import markdown_table, quality_rows, sentence, speed_rows
from hf_minitron.execute import execute, is_done, named, read_inputs
from hf_minitron.hub.publish import TOKEN
from hf_minitron.memory import keep_freed_memory
from hf_minitron.recipe import TOP_LEVEL, bind, check_no_token, load_recipe, read_overrides
from hf_minitron.run import RecipeError, Run
from hf_minitron.shape import Shape
from hf_minitron.stage import Stages
from hf_minitron.stages import prune, publish
from hf_minitron.stages.every import STAGES
from hf_minitron.texts import COMMITS
from hf_minitron.waiting import end_group, from_first

INTRO = """\
Make a large language model small the Minitron way: score what matters in it, prune the rest, distill the big one into the
small one, evaluate both, publish the result. A recipe (a YAML file with one section per stage) says how.

  hf-minitron plan recipe.yaml      what the target costs: sizes, parameters, memory, FLOPs (no weights read)
  hf-minitron run recipe.yaml       all stages; finished ones are skipped, an interrupted one goes on
  hf-minitron run a.yaml b.yaml     one after another: b may prune what a makes (model: <run of a>/publish/model)
  hf-minitron prune recipe.yaml     one stage
  hf-minitron report recipe.yaml    what is known of a run, finished or not, as a page: report.html
  hf-minitron run recipe.yaml --prune.target.ffn 1024 --distill.learning_rate 3e-4     other values than the recipe's

Which target? `search` (after `score`) turns a budget into a handful of shapes, each a recipe for a short run; when these have
run, `select` ranks them and writes the recipe of the best:

  hf-minitron search recipe.yaml --search.budget.parameters 50%
  hf-minitron select recipe.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    argv = sys.argv[1:] if argv is None else argv
    try:
        check_no_token("\n".join(argv), "the command line")
        return _main(argv)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nStopped by Ctrl-C. Start the same command again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {TOKEN.sub('<token>', str(error))}", file=sys.stderr)
        return 1


def _main(argv: Sequence[str]) -> int:
    args, rest = _parser().parse_known_args(argv)
    COMMITS.clear()  # a command reads every dataset of the Hub at the commit that it finds
    with told():
        overrides, sections = read_overrides(rest), {name: stage.args for name, stage in STAGES.items()}
        runs = [load_recipe(path, overrides, sections) for path in (args.recipe if args.verb == "run" else [args.recipe])]
        check_chain(runs, overrides)
        run = runs[0]
        if args.verb == "plan":
            print(plan_text(run, args.context))
            return 0
        if args.verb == "report":
            print(publish.report(with_values(run, stored_values(run) or {}), args.open))
            return 0
    keep_freed_memory()
    PartialState(cpu=not torch.accelerator.is_available())  # all later ones are this one; unasked, it sees no CPU ranks
    push = _push(args)
    if args.verb == "run":
        if len(runs) > 1:
            check_ahead(runs, push)
        for run in runs:
            run_all(run, push)
    else:
        run_stages(run, [args.verb], push)
    end_group()
    return 0


@contextmanager
def told(where: str = "") -> Iterator[None]:
    """Make one line of whatever a user's input sets off before any work is begun, in the libraries below, too.

    Raises:
        RecipeError: with where it was, and what.
    """
    try:
        yield
    except RecipeError:
        raise
    except (ValueError, OSError) as error:
        raise RecipeError(f"{where}{one_line(error)}") from error
    except Exception as error:
        raise RecipeError(f"{where}{type(error).__name__}: {one_line(error)}") from error


def _push(args: argparse.Namespace) -> Callable[[publish.Args, Run], str] | None:
    """Return what follows the stages: a push, its preview, or nothing."""
    if getattr(args, "dry_run", False) and not args.push:
        raise RecipeError("--dry-run says what --push would upload, so give both; all stages would run without it too")
    return (publish.preview if args.dry_run else publish.push) if getattr(args, "push", False) else None


def plan_text(run: Run, context: int | None = None) -> str:
    """Say what the target shape costs beside the teacher, from `config.json` alone; at a context of so many tokens as well."""
    if context is not None and context < 1:
        raise RecipeError(f"--context: {context} is not a number of tokens from 1 on")
    args = bind(run, "prune", prune.Args)
    before, after, rows = prune.shapes(args, run.model)
    stored = AutoConfig.from_pretrained(resolve(run.model)).dtype or torch.float32
    size = stored.itemsize

    def costs(shape: Shape, rows: Mapping[str, str]) -> dict[str, int]:
        parameters = shape.num_parameters(rows)
        found = shape.axes | {
            "parameters": parameters,
            f"bytes ({str(stored).removeprefix('torch.')})": parameters * size,
            "KV-cache bytes per token": shape.kv_cache_bytes_per_token(size),
            "FLOPs per token": shape.flops_per_token(rows),
        }
        if context:
            found[f"cache bytes at {context:,} tokens"] = shape.cache_bytes(context, size)
            found[f"FLOPs per token at {context:,} tokens"] = shape.flops_per_token(rows, context)
        return found | ({"state bytes": shape.state_bytes(size)} if shape.states else {})

    table = [["", "before", "after", ""]]
    for (name, old), new in zip(
        costs(before, rows).items(), costs(after, prune.student_rows(args, run.model)).values(), strict=True
    ):
        table.append([name, f"{old:,}", f"{new:,}", "" if old == new else f"{new / old - 1:+.1%}"])
    inexact = prune.inexact(run.model, before, after)
    if args.nonuniform is not None:
        share = f"{args.nonuniform:.0%} of the layers' parameters stay"
        inexact = {"nonuniform": f"{share}; score says where, so the table above shows the teacher twice"} | inexact
    if prune.uses_rotation(args):
        inexact = {"rotation": "unties the output head, so the student has a matrix of vocab x hidden more"} | inexact
    return markdown_table(table) + "".join(f"\n{axis}: {reason}" for axis, reason in inexact.items())


def check_ahead(runs: Sequence[Run], push: Callable[[publish.Args, Run], str] | None) -> None:
    """Check every recipe of a chain before the first is begun, and say how long each will take."""
    if not PartialState().is_main_process:
        return
    with TemporaryDirectory() as scratch:
        placeholders: dict[Path, Path] = {}
        for number, run in enumerate(runs):
            ahead = with_placeholders(run, placeholders)
            try:
                run.check_owner()
                run.check_free()
                check_stages(ahead, list(own_stages(run)), push, finished(run, list(own_stages(run))))
                if run is not runs[-1]:
                    placeholders |= placeholder_models(run, ahead, Path(scratch) / str(number))
                print(f"{run.recipe_path}: {time_allows(ahead, own_stages(ahead), estimate=True)[1]}\n", flush=True)
            except ValueError as error:
                raise RecipeError(f"{run.recipe_path}: {error}") from error


def own_stages(run: Run) -> Stages:
    """Return the stages of `run`: all but the optional ones that the recipe leaves out."""
    return {n: stage for n, stage in STAGES.items() if stage.in_run and (n in run.recipe or not stage.optional)}


def run_all(run: Run, push: Callable[[publish.Args, Run], str] | None = None) -> None:
    """Check every stage, say how long it will take, do what is not done, and show the result."""
    if PartialState().is_main_process:
        with told():
            print(plan_text(run), flush=True)
    run_stages(run, list(own_stages(run)), push, estimate=True)
    if PartialState().is_main_process:
        report = Report.load(run.path("evaluate") / "report.json")
        print("\n" + markdown_table(quality_rows(report)))
        if report.speed:
            print("\n" + markdown_table(speed_rows(report)))
        if comparisons := report.against("teacher", "distilled"):
            print("\n" + "\n".join(map(sentence, comparisons)))
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
    check_stages(run, stages, push, finished(run, stages))
    values, text = {}, ""
    if state.is_main_process:
        with told():
            values, text = time_allows(run, own_stages(run), estimate)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-minitron", description=INTRO, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    texts = {name: stage.summary for name, stage in STAGES.items()}
    texts["run"] = "all stages in order; finished ones are skipped, an interrupted one goes on."
    texts["plan"] = "sizes, parameters, bytes, KV cache and FLOPs before and after, from config.json alone."
    texts["report"] = "write report.html, the run's facts as one page, finished or not, and say where it is."
    for name, text in texts.items():
        verb = verbs.add_parser(
            name, help=text, description=text, epilog=_keys(name), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        several = {"nargs": "+", "help": "recipes, YAML files; a later one may build on what an earlier one makes"}
        one = {"help": "the recipe, a YAML file"}
        verb.add_argument("recipe", type=Path, **(several if name == "run" else one))
        if name == "plan":
            verb.add_argument("--context", type=int, metavar="TOKENS", help="also count cache and FLOPs at so many tokens")
        if name == "report":
            verb.add_argument("--open", action="store_true", help="open it in a browser")
        if name in ("run", "publish"):
            verb.add_argument("--push", action="store_true", help="upload to publish.repo_id (private unless told)")
            verb.add_argument("--dry-run", action="store_true", help="with --push: list what it would upload, send nothing")
    return parser


def _keys(name: str) -> str:
    """List what a stage's section knows, for its help."""
    lines = ["Keys of the recipe; change one with --key value:"]
    lines += [f"  {key:24} {text}" for key, text in TOP_LEVEL.items()]
    inherited = {field.name: field.metadata for field in dataclasses.fields(TrainingArguments)}  # not all of them
    for stage in STAGES if name == "run" else [name] if name in STAGES else []:
        fields = [field for field in dataclasses.fields(STAGES[stage].args) if inherited.get(field.name) != field.metadata]
        lines += [f"  {stage + '.' + field.name:24} {field.metadata.get('help', '')}" for field in fields]
        if issubclass(STAGES[stage].args, TrainingArguments):
            lines.append(f"  {stage + '.*':24} and every field of transformers.TrainingArguments")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
