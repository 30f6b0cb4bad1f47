"""One run's files: its folder, what is done and what must be done again.

It knows no stage. A stage writes into `<stage>.tmp/`, which is renamed once
`done.json` lies in it; so a stage's folder is complete or absent. `done.json` holds a table of all that the stage's result
depends on (`inputs`) and the hashes of its files: when either changes, the stage and those after it run again, and say why.
One process at a time works in a folder.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_minitron import inputs
from hf_minitron.errors import RecipeError
from hf_minitron.json_files import read_json, write_whole
from hf_minitron.waiting import ALIVE, READY
from hf_minitron.yaml_text import dump_yaml, load_yaml

logger = logging.getLogger(__name__)

# Where a stage keeps what it needs to be resumed; deleted once the stage is done.
CHECKPOINTS = "checkpoints"
# Held by the process that works in a run's folder; the operating system lets go of it when that ends, however it ends.
LOCK = "run.lock"


@dataclass(frozen=True)
class Run:
    """One run: where it writes, what it compresses, its seed and the recipe it came from.

    Args:
        folder (`Path`): The run's folder.
        model (`str`): The teacher: a folder or a Hub id.
        seed (`int`): Random seed of every stage.
        recipe (`Mapping`): The recipe with all overrides.
        recipe_path (`Path`): The file it was read from.
        sections (`Mapping[str, type]`, *optional*): Name of every stage to the dataclass of its section, which says what its
            settings mean for the result.
    """

    folder: Path
    model: str
    seed: int
    recipe: Mapping[str, Any]
    recipe_path: Path
    sections: Mapping[str, type] = field(default_factory=dict, compare=False, repr=False)
    _inputs: dict[str, dict] = field(default_factory=dict, init=False, compare=False, repr=False)

    def path(self, stage: str) -> Path:
        """Return the folder of a stage."""
        return self.folder / stage

    def left_bytes(self, stage: str) -> int:
        """Return the bytes on disk of what an interrupted attempt at a stage has left."""
        return sum(path.stat().st_size for path in _unfinished(self, stage).rglob("*") if path.is_file())

    def section(self, stage: str) -> dict:
        """Return the values of a stage's section."""
        return self.recipe.get(stage) or {}

    def inputs(self, stage: str, needs: Sequence[str]) -> dict[str, Any]:
        """Return what a stage's result depends on: the seed, the model, its settings, the files these name, what it needs.

        Settings and files are those of the first call: what is edited afterwards does not change what this process does.
        """
        if stage not in self._inputs:
            self._inputs[stage] = self._read_inputs(stage, needs)
        return self._inputs[stage] | {need: done_digest(self.path(need)) for need in stages_in(needs)}

    def changed(self, stage: str, needs: Sequence[str]) -> str:
        """Say which of the files that a stage depends on have changed since the first look at them; nothing when none has."""
        before = self.inputs(stage, needs)
        return inputs.differences(before, before | self._read_inputs(stage, needs))

    def digest(self, stage: str, needs: Sequence[str]) -> str:
        """Return the hash of a stage's inputs."""
        return inputs.digest(self.inputs(stage, needs))

    def _read_inputs(self, stage: str, needs: Sequence[str]) -> dict[str, Any]:
        keys: dict[str, list[str]] = {}
        for other, dot, key in (need.partition(".") for need in needs):
            if dot:
                keys.setdefault(other, []).append(key)
        table, sources = {"seed": self.seed, "model": self.model}, inputs.model_files(self.model, {})
        sources = {f"model: {name}": source for name, source in sources.items()}
        for name, only in {stage: None, **keys}.items():
            start, section, args_type = "" if name == stage else f"{name}.", self.section(name), self.sections.get(name)
            table |= {start + key: value for key, value in inputs.settings(section, args_type, only).items()}
            found = inputs.files({**section, "model": self.model}, args_type, only)
            sources |= {start + key: source for key, source in found.items()}
        before = _done(self.path(stage)) or read_json(_unfinished(self, stage) / "started.json")
        return table | inputs.contents(sources, before.get("inputs") or {}, self.folder)

    def check_owner(self) -> None:
        """Refuse a folder that belongs to another run; change nothing.

        Raises:
            RecipeError: when it belongs to another recipe or model, or holds files that no run has made.
        """
        mark, ours = self.folder / "run.json", self._mark()
        if mark.is_file():
            theirs = read_json(mark)
            if not {"recipe", "model"} <= theirs.keys():
                raise RecipeError(f"{mark} is damaged. Use another --run, or delete the folder")
            if theirs != ours:
                raise RecipeError(f"{self.folder} belongs to another run: of {theirs['recipe']} on {theirs['model']}, not of "
                                  f"{ours['recipe']} on {ours['model']}. Use another --run, or delete it")  # fmt: skip
        elif self.folder.is_dir() and any(not path.name.startswith((LOCK, *READY, ALIVE)) for path in self.folder.iterdir()):
            raise RecipeError(f"{self.folder} holds files, but no run.json: not a run's folder. Use another --run")

    def check_free(self) -> None:
        """Refuse a folder in which another process works.

        Raises:
            RecipeError: naming the folder.
        """
        if (self.folder / LOCK).is_file():
            with self.locked():
                pass

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder, which is made when it is missing, until the context ends.

        Raises:
            RecipeError: when another process works in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / LOCK).acquire(timeout=0)
        except Timeout:
            raise RecipeError(f"{self.folder}: another hf-minitron works in this folder. Wait until it ends, or use another "
                              "--run") from None  # fmt: skip
        with lock:
            yield

    def claim(self) -> None:
        """Make the folder this run's, or check that it is, and save the recipe in it."""
        self.check_owner()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "run.json", json.dumps(self._mark()) + "\n")
        write_whole(self.folder / "recipe.yaml", dump_yaml(dict(self.recipe)))

    def _mark(self) -> dict[str, str]:
        return {"recipe": os.path.relpath(self.recipe_path.resolve(), self.folder.resolve()), "model": self.model}


def made_by(model: str) -> Run | None:
    """Return the run that made a model's folder, such as `<run>/publish/model`; `None` for any other folder and a Hub id."""
    folder = Path(model).expanduser().parent.parent
    mark, path = read_json(folder / "run.json"), folder / "recipe.yaml"
    if not Path(model).expanduser().is_dir() or not {"recipe", "model"} <= mark.keys() or not path.is_file():
        return None
    recipe = load_yaml(path.read_text(encoding="utf-8"))
    recipe_path = os.path.relpath((folder / mark["recipe"]).resolve())
    return Run(folder, mark["model"], recipe.get("seed", 0), recipe, Path(recipe_path))


def done_digest(folder: Path) -> str | None:
    """Return the hash in a stage's `done.json`, or `None` when the stage is not done."""
    return _done(folder).get("digest")


def stages_in(needs: Sequence[str]) -> list[str]:
    """Return those of what a stage depends on that are stages."""
    return [need for need in needs if "." not in need]


def again(run: Run, stage: str, needs: Sequence[str]) -> str | None:
    """Say why a stage has to run again although it was done or begun before; `None` when it has not, or goes on."""
    digest, folder, unfinished = run.digest(stage, needs), run.path(stage), _unfinished(run, stage)
    done, started = _done(folder), read_json(unfinished / "started.json")
    if done.get("digest") == digest:
        damage = damaged(folder)
        return damage and f"{stage} runs again: {damage}"
    if started.get("digest") == digest or not (folder.is_dir() or unfinished.is_dir()):
        return None
    before = (done or started).get("inputs")
    what = "its mark is damaged, or of another version of hf_minitron"
    if before is not None:
        what = inputs.differences(before, run.inputs(stage, needs))
    dropped = "; its checkpoints are dropped" if (unfinished / CHECKPOINTS).is_dir() else ""
    return f"{stage} runs again: {what}{dropped}"


def begin(run: Run, stage: str, needs: Sequence[str]) -> Path | None:
    """Return the folder in which a stage has to work, or `None` when the stage is done.

    Args:
        run (`Run`): The run.
        stage (`str`): The stage's name.
        needs (`Sequence[str]`): What it depends on, from `Stage.needs_in`.

    Returns:
        `Path` or `None`: `<stage>.tmp`, with what an interrupted attempt at the very same work has left, and nothing else.

    Raises:
        RecipeError: when a stage that it needs is not done or its files are damaged, or when a file that it reads was changed
            while the stages before it were done.
    """
    missing = [need for need in stages_in(needs) if done_digest(run.path(need)) is None]
    if missing:
        raise RecipeError(f"{stage} needs {' and '.join(missing)} first: hf-minitron {missing[0]} {run.recipe_path}")
    digest, unfinished = run.digest(stage, needs), _unfinished(run, stage)
    if done_digest(run.path(stage)) == digest and damaged(run.path(stage)) is None:
        return None
    if done_digest(unfinished) == digest:  # killed after its work, before it got its name
        _settle(run, stage)
        return None
    for need in stages_in(needs):
        if damage := damaged(run.path(need)):
            raise RecipeError(f"{stage} needs {need}, but {damage}. Make it anew: hf-minitron {need} {run.recipe_path}")
    if changed := run.changed(stage, needs):
        raise RecipeError(f"{stage}: {changed} since this command began. Start it again to work with what is there now")
    started = unfinished / "started.json"
    if read_json(started).get("digest") != digest:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        mark = {"digest": digest, "time": time.time(), "inputs": run.inputs(stage, needs)}
        write_whole(started, json.dumps(mark, default=str))
    return unfinished


def finish(run: Run, stage: str, needs: Sequence[str] = ()) -> None:
    """Mark a stage's work as done, drop what only an interrupted attempt would need, and give the folder its name."""
    unfinished = _unfinished(run, stage)
    mark = json.loads((unfinished / "started.json").read_text(encoding="utf-8"))
    seconds = round(time.time() - mark.pop("time"), 1)  # from the first attempt on
    mark |= {"seconds": seconds, "files": inputs.contents_of(_results(unfinished))}
    write_whole(unfinished / "done.json", json.dumps(mark) + "\n")
    _settle(run, stage)
    if changed := run.changed(stage, needs):
        logger.warning("%s: %s while it was running; started again, it will be done with what is there now", stage, changed)


def _results(folder: Path) -> dict[str, Path]:
    """Return the files that a stage has written, but for its marks, and for text that a user may edit."""
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    own = ("done.json", "started.json")
    return {name.as_posix(): path for name, path in names.items()
            if name.parts[0] != CHECKPOINTS and str(name) not in own and name.suffix != ".md"}  # fmt: skip


def damaged(folder: Path) -> str | None:
    """Say which file of a finished stage is missing or is not what the stage has written; `None` when all are there."""
    for name, content in (_done(folder).get("files") or {}).items():
        if not inputs.holds(folder / name, content):
            return f"{folder / name} is {'damaged' if (folder / name).is_file() else 'missing'}"
    return None


def _done(folder: Path) -> dict:
    return read_json(folder / "done.json")


def _settle(run: Run, stage: str) -> None:
    """Do what follows `done.json`; it can be interrupted and done again."""
    unfinished = _unfinished(run, stage)
    (unfinished / "started.json").unlink(missing_ok=True)
    shutil.rmtree(unfinished / CHECKPOINTS, ignore_errors=True)
    shutil.rmtree(run.path(stage), ignore_errors=True)
    unfinished.rename(run.path(stage))


def _unfinished(run: Run, stage: str) -> Path:
    return run.folder / f"{stage}.tmp"
