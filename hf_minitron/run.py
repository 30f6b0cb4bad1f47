"""One run's files: its recipe, its folder, what is done and what must be done again.

It knows no stage: `__main__` hands it the table of stages. A stage writes into `<stage>.tmp/`, which is renamed once
`done.json` lies in it; so a stage's folder is complete or absent. `done.json` holds a hash of the stage's section and of
all that it read; when that changes, the stage and those after it run again.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TOP_LEVEL = {
    "run": "folder for everything the run makes",
    "model": "the teacher: a folder or a Hub id",
    "seed": "random seed",
}


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
        """Return the hash of a stage: of its section, the seed, the files it names, the teacher and the stages it needs."""
        section = self.section(stage)
        named = {value: _fingerprint(value) for value in _strings(section)}
        upstream = {need: done_digest(self.path(need)) for need in needs}
        content = [section, named, self.seed, self.model, _fingerprint(self.model), upstream]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def claim(self) -> None:
        """Make the folder, or check that it belongs to this run.

        Raises:
            RecipeError: when it belongs to another recipe or model, or holds files that no run has made.
        """
        mark = self.folder / "run.json"
        ours = {"recipe": os.path.relpath(self.recipe_path.resolve(), self.folder.resolve()), "model": self.model}
        if mark.is_file():
            theirs = json.loads(mark.read_text(encoding="utf-8"))
            if theirs != ours:
                raise RecipeError(f"{self.folder} belongs to another run: of {theirs['recipe']} on {theirs['model']}, not of "
                                  f"{ours['recipe']} on {ours['model']}. Use another --run, or delete it")  # fmt: skip
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise RecipeError(f"{self.folder} holds files, but no run.json: not a run's folder. Use another --run")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(json.dumps(ours) + "\n", encoding="utf-8")
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(dict(self.recipe), sort_keys=False), encoding="utf-8")


def load_recipe(path: Path, overrides: Mapping[str, Any], stages: Mapping[str, type]) -> Run:
    """Read a recipe, apply overrides, and refuse what no stage knows.

    Args:
        path (`Path`): The YAML file.
        overrides (`Mapping[str, Any]`): Values by dotted key, such as `{"prune.target.ffn": 1152}`.
        stages (`Mapping[str, type]`): Name of every stage to the dataclass of its section.

    Raises:
        RecipeError: for an unreadable file, an unknown stage or key (with the nearest one), or a missing model.
    """
    if not path.is_file():
        raise RecipeError(f"No recipe at {path}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} holds a {type(recipe).__name__}, not sections by name")
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section = recipe
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise RecipeError(f"--{key}: {parent} holds {section!r}, not a section")
        section[last] = value
    _check_keys("recipe", recipe, [*TOP_LEVEL, *stages])
    for stage, args in stages.items():
        if not isinstance(recipe.get(stage) or {}, dict):
            raise RecipeError(f"{stage}: {recipe[stage]!r} is not a section of key: value lines")
        _check_keys(stage, recipe.get(stage) or {}, [field.name for field in dataclasses.fields(args) if field.init])
    if not recipe.get("model"):
        raise RecipeError(f"{path} names no model: add `model:` with a folder or a Hub id")
    seed = recipe.get("seed", 0)
    if not isinstance(seed, int):
        raise RecipeError(f"seed: {seed!r} is not a whole number")
    folder = Path(recipe.get("run") or f"runs/{path.resolve().parent.name}").expanduser()
    return Run(folder, str(recipe["model"]), seed, recipe, path)


def bind(run: Run, stage: str, args_type: type) -> Any:
    """Make a stage's arguments from its section.

    Raises:
        RecipeError: naming the section, for a missing or an ill-typed value.
    """
    section, values = run.section(stage), {}
    for field in dataclasses.fields(args_type):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in section:
            values[field.name] = _typed(f"{stage}.{field.name}", section[field.name], field.type)
        elif required and field.init:
            raise RecipeError(f"{stage}.{field.name} is missing: {field.metadata.get('help', '')}")
    try:
        return args_type(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{stage}: {error}") from error


def done_digest(folder: Path) -> str | None:
    """Return the hash in a stage's `done.json`, or `None` when the stage is not done."""
    try:
        return json.loads((folder / "done.json").read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        return None


def begin(run: Run, stage: str, needs: Sequence[str]) -> Path | None:
    """Return the folder in which a stage has to work, or `None` when the stage is done.

    Args:
        run (`Run`): The run.
        stage (`str`): The stage's name.
        needs (`Sequence[str]`): The stages whose folders it reads.

    Returns:
        `Path` or `None`: `<stage>.tmp`, with what an interrupted attempt at the very same work has left, and nothing else.

    Raises:
        RecipeError: when a stage that it needs is not done.
    """
    missing = [need for need in needs if done_digest(run.path(need)) is None]
    if missing:
        raise RecipeError(f"{stage} needs {' and '.join(missing)} first: hf-minitron {missing[0]} {run.recipe_path}")
    digest, unfinished = run.digest(stage, needs), _unfinished(run, stage)
    if done_digest(run.path(stage)) == digest:
        return None
    started = unfinished / "started.json"
    if not started.is_file() or json.loads(started.read_text(encoding="utf-8") or "{}").get("digest") != digest:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        started.write_text(json.dumps({"digest": digest, "time": time.time()}), encoding="utf-8")
    return unfinished


def finish(run: Run, stage: str) -> None:
    """Mark a stage's work as done and give its folder its name."""
    unfinished = _unfinished(run, stage)
    mark = json.loads((unfinished / "started.json").read_text(encoding="utf-8"))
    seconds = round(time.time() - mark["time"], 1)  # from the first attempt on
    (unfinished / "done.json").write_text(json.dumps({"digest": mark["digest"], "seconds": seconds}) + "\n", encoding="utf-8")
    (unfinished / "started.json").unlink()
    shutil.rmtree(run.path(stage), ignore_errors=True)
    unfinished.rename(run.path(stage))


def _unfinished(run: Run, stage: str) -> Path:
    return run.folder / f"{stage}.tmp"


def _check_keys(where: str, found: Mapping, known: Sequence[str]) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise RecipeError(f"Unknown key {key!r} in {where}; {hint}")


def _typed(name: str, value: Any, declared: Any) -> Any:
    """Turn YAML's reading of a number (`1e-4` is text to YAML 1.1) into the declared type, or refuse it."""
    if declared in (int, float) and value is not None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is None or isinstance(value, bool) or (declared is int and number != int(number)):
            raise RecipeError(f"{name}: {value!r} is not a {'whole ' if declared is int else ''}number")
        return declared(number)
    if declared is str and not isinstance(value, str):
        raise RecipeError(f"{name}: {value!r} is not text")
    return value


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _fingerprint(text: str) -> list | None:
    """Size and time of a file, or of the files in a folder; `None` for text that names neither."""
    path = Path(text).expanduser()
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path] if path.is_file() else None
    except OSError:
        return None
    return files and [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
