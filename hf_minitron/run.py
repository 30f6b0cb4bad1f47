"""One run's files: its folder, what is done and what must be done again.

It knows no stage. A stage writes into `<stage>.tmp/`, which is renamed once
`done.json` lies in it; so a stage's folder is complete or absent. `done.json` holds a hash of the stage's section and of
all that it read; when that changes, the stage and those after it run again.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_minitron.formats import matching
from hf_minitron.yaml_text import dump_yaml, load_yaml

# Where a stage keeps what it needs to be resumed; deleted once the stage is done.
CHECKPOINTS = "checkpoints"


class RecipeError(ValueError):
    """A recipe or an override that cannot be run."""


@dataclass(frozen=True)
class Run:
    """One run: where it writes, what it compresses, its seed and the recipe it came from.

    Args:
        folder (`Path`): The run's folder.
        model (`str`): The teacher: a folder or a Hub id.
        seed (`int`): Random seed of every stage.
        recipe (`Mapping`): The recipe with all overrides.
        recipe_path (`Path`): The file it was read from.
    """

    folder: Path
    model: str
    seed: int
    recipe: Mapping[str, Any]
    recipe_path: Path

    def path(self, stage: str) -> Path:
        """Return the folder of a stage."""
        return self.folder / stage

    def section(self, stage: str) -> dict:
        """Return the values of a stage's section."""
        return self.recipe.get(stage) or {}

    def digest(self, stage: str, needs: Sequence[str]) -> str:
        """Return the hash of a stage: of its section, the seed, the files it names, the teacher and what it needs."""
        section, upstream = self.section(stage), {}
        for need in needs:
            other, dot, key = need.partition(".")
            upstream[need] = self.section(other).get(key) if dot else done_digest(self.path(need))
        keys = [{need.partition(".")[2]: upstream[need]} for need in needs if "." in need]
        named = {value: _fingerprint(value) for value in _strings([section, *keys])}
        content = [section, named, self.seed, self.model, _fingerprint(self.model), upstream]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def check_owner(self) -> None:
        """Refuse a folder that belongs to another run; change nothing.

        Raises:
            RecipeError: when it belongs to another recipe or model, or holds files that no run has made.
        """
        mark, ours = self.folder / "run.json", self._mark()
        if mark.is_file():
            theirs = _read_json(mark)
            if not {"recipe", "model"} <= theirs.keys():
                raise RecipeError(f"{mark} is damaged. Use another --run, or delete the folder")
            if theirs != ours:
                raise RecipeError(f"{self.folder} belongs to another run: of {theirs['recipe']} on {theirs['model']}, not of "
                                  f"{ours['recipe']} on {ours['model']}. Use another --run, or delete it")  # fmt: skip
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise RecipeError(f"{self.folder} holds files, but no run.json: not a run's folder. Use another --run")

    def claim(self) -> None:
        """Make the folder this run's, or check that it is, and save the recipe in it."""
        self.check_owner()
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "run.json", json.dumps(self._mark()) + "\n")
        _write(self.folder / "recipe.yaml", dump_yaml(dict(self.recipe)))

    def _mark(self) -> dict[str, str]:
        return {"recipe": os.path.relpath(self.recipe_path.resolve(), self.folder.resolve()), "model": self.model}


def made_by(model: str) -> Run | None:
    """Return the run that made a model's folder, such as `<run>/publish/model`; `None` for any other folder and a Hub id."""
    folder = Path(model).expanduser().parent.parent
    mark, path = _read_json(folder / "run.json"), folder / "recipe.yaml"
    if not Path(model).expanduser().is_dir() or not {"recipe", "model"} <= mark.keys() or not path.is_file():
        return None
    recipe = load_yaml(path.read_text(encoding="utf-8"))
    recipe_path = os.path.relpath((folder / mark["recipe"]).resolve())
    return Run(folder, mark["model"], recipe.get("seed", 0), recipe, Path(recipe_path))


def done_digest(folder: Path) -> str | None:
    """Return the hash in a stage's `done.json`, or `None` when the stage is not done."""
    return _read_json(folder / "done.json").get("digest")


def needs_of(run: Run, stage: ModuleType) -> tuple[str, ...]:
    """Return what a stage depends on beside its own section.

    These are the stages whose folders it reads: those it always needs, and those it uses if the recipe has them; and the values
    of other sections that it reads, named as in `distill.text`.
    """
    used = (name for name in getattr(stage, "USES", ()) if name in run.recipe)
    return (*stage.NEEDS, *used, *getattr(stage, "READS", ()))


def stages_in(needs: Sequence[str]) -> list[str]:
    """Return those of what a stage depends on that are stages."""
    return [need for need in needs if "." not in need]


def begin(run: Run, stage: str, needs: Sequence[str]) -> Path | None:
    """Return the folder in which a stage has to work, or `None` when the stage is done.

    Args:
        run (`Run`): The run.
        stage (`str`): The stage's name.
        needs (`Sequence[str]`): What it depends on, from `needs_of`.

    Returns:
        `Path` or `None`: `<stage>.tmp`, with what an interrupted attempt at the very same work has left, and nothing else.

    Raises:
        RecipeError: when a stage that it needs is not done.
    """
    missing = [need for need in stages_in(needs) if done_digest(run.path(need)) is None]
    if missing:
        raise RecipeError(f"{stage} needs {' and '.join(missing)} first: hf-minitron {missing[0]} {run.recipe_path}")
    digest, unfinished = run.digest(stage, needs), _unfinished(run, stage)
    if done_digest(run.path(stage)) == digest:
        return None
    if done_digest(unfinished) == digest:  # killed after its work, before it got its name
        _settle(run, stage)
        return None
    started = unfinished / "started.json"
    if _read_json(started).get("digest") != digest:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(started, json.dumps({"digest": digest, "time": time.time()}))
    return unfinished


def finish(run: Run, stage: str) -> None:
    """Mark a stage's work as done, drop what only an interrupted attempt would need, and give the folder its name."""
    unfinished = _unfinished(run, stage)
    mark = json.loads((unfinished / "started.json").read_text(encoding="utf-8"))
    seconds = round(time.time() - mark["time"], 1)  # from the first attempt on
    _write(unfinished / "done.json", json.dumps({"digest": mark["digest"], "seconds": seconds}) + "\n")
    _settle(run, stage)


def _settle(run: Run, stage: str) -> None:
    """Do what follows `done.json`; it can be interrupted and done again."""
    unfinished = _unfinished(run, stage)
    (unfinished / "started.json").unlink(missing_ok=True)
    shutil.rmtree(unfinished / CHECKPOINTS, ignore_errors=True)
    shutil.rmtree(run.path(stage), ignore_errors=True)
    unfinished.rename(run.path(stage))


def _unfinished(run: Run, stage: str) -> Path:
    return run.folder / f"{stage}.tmp"


def _read_json(path: Path) -> dict:
    """Read a mark; one that is absent or damaged says nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, text: str) -> None:
    """Write a small file that is never seen half-written."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _strings(value: Any) -> list[str]:
    """Return what may name a file: all text values, and the sources of a mixture, which are keys of `text`."""
    if isinstance(value, dict):
        sources = value.get("text")
        value = [*(map(str, sources) if isinstance(sources, dict) else ()), *value.values()]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if value and isinstance(value, str) else []


def _fingerprint(text: str) -> list | None:
    """Size and time of a file, of those a pattern matches, or of those in a folder; `None` for text that names none."""
    path = Path(text).expanduser()
    try:
        folder = path if path.is_dir() else Path(text.partition(":")[0] or text).expanduser()  # perhaps with a configuration
        files = [path] if path.is_file() else sorted(filter(_counts, folder.rglob("*"))) or matching(text)
        return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files] or None
    except (OSError, ValueError):
        return None


def _counts(path: Path) -> bool:
    """Return whether a file in a model's folder is of the model: a card written anew is no reason to do later runs again."""
    return path.is_file() and path.suffix not in (".md", ".png", ".yaml") and path.name != "report.json"
