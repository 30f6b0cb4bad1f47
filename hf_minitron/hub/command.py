"""The command that makes a run's student again."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from hf_minitron.hub.public import public, shorten
from hf_minitron.run import Run, made_by
from hf_minitron.yaml_text import load_yaml


def command(run: Run, processes: int = 1) -> str:
    """Return the command that makes a run's student: its recipes, those that made its `model` first, with the values that are
    not their files' own.

    Args:
        run (`Run`): The run.
        processes (`int`, *optional*, defaults to 1): How many trained it.
    """
    start = f"accelerate launch --num_processes {processes} -m hf_minitron" if processes > 1 else "hf-minitron"
    runs = [run]
    while parent := made_by(runs[0].model):
        runs.insert(0, parent)
    given = [_overrides(one) for one in runs]
    files = [shlex.quote(shorten(str(one.recipe_path))) for one in runs]
    if not any(given):
        return " ".join([start, "run", *files])
    each = [" ".join([start, "run", *words]) for words in zip(files, given, strict=True)]  # options hold for all recipes
    return " && ".join(line.rstrip() for line in each)


def _overrides(run: Run) -> str:
    """Return the options that make what was run of a recipe's file: the command line's, and the values that `minutes` left."""
    try:
        written = load_yaml(run.recipe_path.read_text(encoding="utf-8"))
        changed = dict(_changes(written, run.recipe))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):  # it has gone since; the recipe stands in the card
        return ""
    if "minutes" in run.recipe:  # on another machine they would leave other values
        changed["minutes"] = None
    return " ".join(f"--{key} {shlex.quote(_yaml_word(public(value)))}" for key, value in changed.items())


def _changes(written: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield by dotted key, as the command line takes them, the values that make a recipe of what is written.

    A section that has lost keys, or has none and is not written, is given as a whole.
    """
    for name, value in recipe.items():
        was = written.get(name) or {}
        if not isinstance(value, Mapping) or was.keys() - value.keys() or (not value and name not in written):
            if name not in written or written[name] != value:
                yield name, value
        else:
            yield from ((f"{name}.{key}", item) for key, item in value.items() if key not in was or was[key] != item)
    yield from ((name, None) for name in written if name not in recipe)


def _yaml_word(value: Any) -> str:
    """Write a value in one line of YAML."""
    try:
        plain = isinstance(value, str) and "\n" not in value and load_yaml(value) == value
    except (ValueError, yaml.YAMLError):
        plain = False
    return value if plain else json.dumps(value, ensure_ascii=False)
