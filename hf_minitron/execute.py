"""One stage done: what it builds on is checked, it is skipped or started, by one process or all, and marked.

The caller hands it the table of stages.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from accelerate import PartialState

from hf_minitron.checkpoint.checkpoint import DiskFullError
from hf_minitron.errors import one_line
from hf_minitron.run import RecipeError, Run, again, begin, damaged, done_digest, finish, stages_in
from hf_minitron.stage import Stages
from hf_minitron.waiting import alone, from_first


def read_inputs(run: Run, names: Sequence[str], stages: Stages) -> None:
    """Look once at all that some stages, and those that they need, depend on."""
    for name in names:
        needs = stages[name].needs_in(run)
        run.inputs(name, needs)
        read_inputs(run, stages_in(needs), stages)


def is_done(run: Run, name: str, stages: Stages) -> bool:
    """Return whether a stage is done with the recipe's settings, and its files are undamaged."""
    folder, needs = run.path(name), stages[name].needs_in(run)
    if stages[name].always or done_digest(folder) is None:
        return False
    return done_digest(folder) == run.digest(name, needs) and damaged(folder) is None


@contextmanager
def named(stage: str) -> Iterator[None]:
    """Name the stage in whatever a library below it states of a user's mistake.

    Raises:
        RecipeError: with the stage, the fact, and the option of the command that mends it, where there is one.
    """
    try:
        yield
    except RecipeError as error:  # of a stage, which may list commands
        raise RecipeError(f"{stage}: {error}") from error
    except DiskFullError as error:
        raise RecipeError(f"{stage}: {error}, or put the run elsewhere with --run") from error
    except ValueError as error:
        raise RecipeError(f"{stage}: {one_line(error)}") from error


def execute(run: Run, name: str, args: object, stages: Stages) -> None:
    """Do one stage unless it is done. All processes of `accelerate launch` take part where it says so; else one does it."""
    state, stage, start = PartialState(), stages[name], time.time()
    needs, folder = stage.needs_in(run), None
    if state.is_main_process:
        _check_needs(run, name, stages)
        if stage.always:
            (run.path(name) / "done.json").unlink(missing_ok=True)
        reason = again(run, name, needs)
        folder = begin(run, name, needs)
        if reason and folder and not stage.always:
            print(f"\n{reason}", flush=True)
    folder = from_first(run.folder, folder)
    if folder is None:
        state.print(f"{name}: done before, skipped", flush=True)
        return
    state.print(f"\n{name}: {stage.summary}", flush=True)
    if state.is_main_process or stage.distributed:
        with named(name), nullcontext() if stage.distributed else alone():
            stage.run(args, run, folder)
    from_first(run.folder)  # it may have worked alone
    if state.is_main_process:
        finish(run, name, needs)
        print(f"{name}: done in {time.time() - start:.0f} s", flush=True)
    from_first(run.folder)


def _check_needs(run: Run, name: str, stages: Stages) -> None:
    """Refuse to build on a stage that was done with other settings than the recipe's."""
    for need in stages_in(stages[name].needs_in(run)):
        _check_needs(run, need, stages)
        needs = stages[need].needs_in(run)
        if done_digest(run.path(need)) not in (None, run.digest(need, needs)):
            what = again(run, need, needs).partition(": ")[2]
            raise RecipeError(f"{name} needs {need}, which was done with other settings ({what}): hf-minitron {need} "
                              f"{run.recipe_path}")  # fmt: skip
