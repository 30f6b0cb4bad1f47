"""One run's files: its recipe, its folder, what is done and what must be done again.

It knows no stage: `__main__` hands it the table of stages. A stage writes into `<stage>.tmp/`, which is renamed once
`done.json` lies in it; so a stage's folder is complete or absent. `done.json` holds a hash of the stage's section and of
all that it read; when that changes, the stage and those after it run again.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import time
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TOP_LEVEL = {"run": "folder for everything the run makes", "model": "the teacher: a folder or a Hub id", "seed": "random seed"}


# Where a stage keeps what it needs to be resumed; deleted once the stage is done.
CHECKPOINTS = "checkpoints"


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `1e-4` is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


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
        _write(self.folder / "recipe.yaml", yaml.safe_dump(dict(self.recipe), sort_keys=False))

    def _mark(self) -> dict[str, str]:
        return {"recipe": os.path.relpath(self.recipe_path.resolve(), self.folder.resolve()), "model": self.model}


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
    recipe = read_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
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
    if type(seed) is not int or seed < 0:
        raise RecipeError(f"seed: {seed!r} is not a whole number from 0 on")
    folder = Path(str(recipe.get("run") or "") or f"runs/{path.resolve().parent.name}").expanduser()
    return Run(folder, str(recipe["model"]), seed, recipe, path)


def read_yaml(text: str, where: str) -> Any:
    """Read YAML, with an error that says where it stands."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {error}") from error


def bind(run: Run, stage: str, args_type: type) -> Any:
    """Make a stage's arguments from its section.

    Raises:
        RecipeError: naming the section, for a missing or an ill-typed value.
    """
    section, values = run.section(stage), {}
    for field in dataclasses.fields(args_type):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in section:
            values[field.name] = _typed(f"{stage}.{field.name}", section[field.name], field.type, field.metadata.get("min"))
        elif required and field.init:
            raise RecipeError(f"{stage}.{field.name} is missing: {field.metadata.get('help', '')}")
    try:
        return args_type(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{stage}: {error}") from error


def done_digest(folder: Path) -> str | None:
    """Return the hash in a stage's `done.json`, or `None` when the stage is not done."""
    return _read_json(folder / "done.json").get("digest")


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


def _check_keys(where: str, found: Mapping, known: Sequence[str]) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise RecipeError(f"Unknown key {key!r} in {where}; {hint}")


def _typed(name: str, value: Any, declared: Any, least: int | None = None) -> Any:
    """Refuse a value that is not of the declared type; types beyond YAML's own are left to the dataclass."""
    union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    kinds = {typing.get_origin(kind) or kind for kind in (typing.get_args(declared) if union else (declared,))}
    if not kinds <= _KINDS.keys():
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and int in kinds and math.isfinite(value) and value == int(value):
        value = int(value)
    elif number and float in kinds:
        value = float(value)
    elif type(value) not in kinds:
        raise RecipeError(f"{name}: {value!r} is not {' or '.join(words for kind, words in _KINDS.items() if kind in kinds)}")
    if least is not None and value is not None and value < least:
        raise RecipeError(f"{name}: {value} must be at least {least}")
    return value


# The types of YAML, in words.
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a section of key: value lines",
    types.NoneType: "null",
}


def _strings(value: Any) -> list[str]:
    """Return what may name a file: all text values, and keys with a suffix (sources of a mixture; no option has one)."""
    if isinstance(value, dict):
        value = [*(key for key in value if Path(str(key)).suffix), *value.values()]
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
