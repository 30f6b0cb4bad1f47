"""`Stage`: a verb of the command and a section of the recipe, as a value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_minitron.run import Run


@dataclass(frozen=True)
class Stage:
    """A verb of the command, and the section of the recipe with its name.

    Args:
        name (`str`): The verb, the section, and the folder in the run.
        docstring (`str`): `<name>: what it does`, one line.
        args (`type`): The dataclass of the section.
        check (`Callable[[args, Run], None]`): Refuses what cannot work, before the first slow step of any stage.
        run (`Callable[[args, Run, Path], None]`): Does it, into a folder that gets its name once it is complete.
        work (`Callable[[args, Run], dict[str, float]]`, *optional*): Its units of work, see `hf_minitron.planning.estimate`.
        needs (`Sequence[str]`): The stages whose folders it always reads.
        uses (`Sequence[str]`): Those that it reads if the recipe has them.
        needs_for (`Callable[[Run], Sequence[str]]`, *optional*): Those that it reads for some settings of the recipe.
        reads (`Sequence[str]`): Values of other sections that it reads, such as `distill.text`.
        scales (`Sequence[str]`): The arguments that shrink so that a run fits into its minutes.
        optional (`bool`): Whether `run` leaves it out where the recipe has no section for it.
        in_run (`bool`): Whether it is a part of `run`.
        distributed (`bool`): Whether all processes of `accelerate launch` take part; else one does it.
        always (`bool`): Whether it is done anew each time.
        report (`Callable[[Run], str]`, *optional*): What is printed when it is done.
    """

    name: str
    docstring: str
    args: type
    check: Callable[[Any, Run], None]
    run: Callable[[Any, Run, Path], None]
    work: Callable[[Any, Run], dict[str, float]] | None = None
    needs: Sequence[str] = ()
    uses: Sequence[str] = ()
    needs_for: Callable[[Run], Sequence[str]] | None = None
    reads: Sequence[str] = ()
    scales: Sequence[str] = ()
    optional: bool = False
    in_run: bool = True
    distributed: bool = False
    always: bool = False
    report: Callable[[Run], str] | None = None

    @property
    def summary(self) -> str:
        """What it does: its docstring without its name."""
        return self.docstring.split(": ", 1)[1].strip()

    def needs_in(self, run: Run) -> tuple[str, ...]:
        """Return what the stage depends on in a run beside its own section: stages, and values named as in `distill.text`."""
        more = () if self.needs_for is None else self.needs_for(run)
        return (*self.needs, *more, *(name for name in self.uses if name in run.recipe), *self.reads)


Stages = Mapping[str, Stage]
