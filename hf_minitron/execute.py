"""One stage done: what it builds on is checked, it is skipped or started, by one process or all, and marked.

It knows no stage: `__main__` hands it the table of stages.
"""

import time
from collections.abc import Mapping, Sequence
from types import ModuleType

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_minitron.run import RecipeError, Run, again, begin, done_digest, finish, needs_of, stages_in

Stages = Mapping[str, ModuleType]


def read_inputs(run: Run, names: Sequence[str], stages: Stages) -> None:
    """Look once at all that some stages, and those that they need, depend on."""
    for name in names:
        needs = needs_of(run, stages[name])
        run.inputs(name, needs)
        read_inputs(run, stages_in(needs), stages)


def execute(run: Run, name: str, args: object, stages: Stages) -> None:
    """Do one stage unless it is done. All processes of `accelerate launch` take part where it says so; else one does it."""
    state, module, start = PartialState(), stages[name], time.time()
    needs, folder = needs_of(run, module), [None]
    if state.is_main_process:
        _check_needs(run, name, stages)
        if getattr(module, "ALWAYS", False):
            (run.path(name) / "done.json").unlink(missing_ok=True)
        reason = again(run, name, needs)
        folder = [begin(run, name, needs)]
        if reason and folder[0] and not getattr(module, "ALWAYS", False):
            print(f"\n{reason}", flush=True)
    broadcast_object_list(folder)
    if folder[0] is None:
        state.print(f"{name}: done before, skipped", flush=True)
        return
    state.print(f"\n{name}: {summary(module)}", flush=True)
    if state.is_main_process or getattr(module, "ALL_PROCESSES", False):
        module.run(args, run, folder[0])
    state.wait_for_everyone()
    if state.is_main_process:
        finish(run, name, needs)
        print(f"{name}: done in {time.time() - start:.0f} s", flush=True)
    state.wait_for_everyone()


def _check_needs(run: Run, name: str, stages: Stages) -> None:
    """Refuse to build on a stage that was done with other settings than the recipe's."""
    for need in stages_in(needs_of(run, stages[name])):
        _check_needs(run, need, stages)
        needs = needs_of(run, stages[need])
        if done_digest(run.path(need)) not in (None, run.digest(need, needs)):
            what = again(run, need, needs).partition(": ")[2]
            raise RecipeError(f"{name} needs {need}, which was done with other settings ({what}): hf-minitron {need} "
                              f"{run.recipe_path}")  # fmt: skip


def summary(module: ModuleType) -> str:
    """Return what a stage does: its docstring, one line, without the stage's name."""
    return module.__doc__.split(": ", 1)[1].strip()
