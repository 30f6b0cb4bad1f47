"""A recipe's file and the command line's overrides: YAML with one section per stage, whose keys and types are checked.

It knows no stage, and imports none: callers hand it what sections may hold.
"""

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_minitron.errors import TOKEN, RecipeError, one_line
from hf_minitron.known_names import RENAMED
from hf_minitron.yaml_text import DEEPEST, load_yaml

TOP_LEVEL = {
    "run": "folder for everything the run makes",
    "model": "the teacher: a folder or a Hub id",
    "seed": "random seed",
    "minutes": "time for all stages on this machine, which it measures first: tokens, steps and documents shrink to fit",
}
# What sections hold: type, default, allowed values and help of their keys. Written by tests/keys_table.py.
KEYS = json.loads(Path(__file__).with_name("keys.json").read_text(encoding="utf-8"))
SIMILAR = 0.75  # share of the letters of a mistyped key that are those of the one that is meant
# A recipe is small: more than this is a mistake.
LARGEST = 1_000_000


def read_recipe(path: Path, overrides: Mapping[str, Any], sections: Mapping[str, Collection[str] | None]) -> dict[str, Any]:
    """Read a recipe, apply overrides, and refuse what no stage knows.

    Args:
        path (`Path`): The YAML file.
        overrides (`Mapping[str, Any]`): Values by dotted key, such as `{"prune.target.ffn": 1152}`.
        sections (`Mapping[str, Collection[str] | None]`): Name of every stage to the keys of its section; `None` where they
            are checked later.

    Raises:
        RecipeError: for an unreadable file, an unknown stage or key (with the nearest one), or a missing model.
    """
    if not path.is_file():
        raise RecipeError(f"No recipe at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    check_no_token(text, f"the recipe {path}")
    recipe = read_yaml(text, str(path)) or {}
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} holds a {type(recipe).__name__}, not sections by name")
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section = recipe
        for parent in parents:
            if section.get(parent) is None:  # a section of comments alone is null
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise RecipeError(f"--{key}: {parent} holds {section!r}, not a section")
        section[last] = value
    check_no_token(yaml.safe_dump(recipe, width=LARGEST), f"the recipe {path}")  # however it was written
    _check_keys("recipe", recipe, [*TOP_LEVEL, *sections], sections)
    for stage, keys in sections.items():
        if not isinstance(recipe.get(stage) or {}, dict):
            raise RecipeError(f"{stage}: {recipe[stage]!r} is not a section of key: value lines")
        if keys is not None:
            _check_keys(stage, recipe.get(stage) or {}, list(keys), sections)
    if not recipe.get("model"):
        raise RecipeError(f"{path} names no model: add `model:` with a folder or a Hub id")
    for key in ("model", "run"):
        _typed(key, recipe.get(key), str | None)
    seed = recipe.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise RecipeError(f"seed: {seed!r} is not a whole number from 0 on")
    if recipe.get("minutes", 1) is None:  # `--minutes null`: all of the recipe, however long it takes
        del recipe["minutes"]
    minutes = recipe.get("minutes", 1)
    if not isinstance(minutes, int | float) or isinstance(minutes, bool) or not 0 < minutes < math.inf:
        raise RecipeError(f"minutes: {minutes!r} is not a number above zero")
    return recipe


def read_yaml(text: str, where: str) -> Any:
    """Read YAML, with an error that says where it stands."""
    if len(text) > LARGEST:
        raise RecipeError(f"{where} has {len(text):,} characters; a recipe has at most {LARGEST:,}")
    try:
        return load_yaml(text)
    except RecursionError:
        raise RecipeError(f"{where} is nested deeper than the {DEEPEST} levels that a recipe may have") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise RecipeError(f"{where} is not YAML: {one_line(error)}") from error


def check_no_token(text: str, where: str) -> None:
    """Refuse an access token or key, which would be shown or published; it is not repeated.

    Raises:
        RecipeError: naming where it stands.
    """
    if TOKEN.search(text):
        raise RecipeError(f"{where} holds an access token (hf_... or another's), which would be published: take it out, renew "
                          "it, and use `hf auth login` or HF_TOKEN")  # fmt: skip


def read_overrides(rest: Sequence[str]) -> dict[str, Any]:
    """Read `--section.key value` and `--section.key=value`.

    Args:
        rest (`Sequence[str]`): What is left of the command line.

    Returns:
        `dict[str, Any]`: Dotted key to value, as `load_recipe` takes them.

    Raises:
        RecipeError: for a word that is neither, a key without a value, or a value that is not YAML.
    """
    overrides, items = {}, list(rest)
    while items:
        item = items.pop(0)
        if not item.startswith("--"):
            raise RecipeError(f"Cannot read {item!r}: overrides are --section.key value")
        key, equals, value = item[2:].partition("=")
        if not equals:
            if not items:
                raise RecipeError(f"--{key} needs a value")
            value = items.pop(0)
        overrides[key] = read_yaml(value, f"--{key} {value}")
    return overrides


def arguments(section: Mapping[str, Any], stage: str, args_type: type) -> Any:
    """Make a stage's arguments from its section.

    Raises:
        RecipeError: naming the section, for a missing or an ill-typed value.
    """
    values = {}
    declared = typing.get_type_hints(args_type)  # not the fields' types, which HfArgumentParser changes
    for field in dataclasses.fields(args_type):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in section:
            least, kind = field.metadata.get("min"), declared[field.name]
            if field.metadata.get("const") is True:  # such as fsdp, whose declared type is that of an older form
                kind = kind | bool
            values[field.name] = _typed(f"{stage}.{field.name}", section[field.name], kind, least)
        elif required and field.init:
            raise RecipeError(f"{stage}.{field.name} is missing: {field.metadata.get('help', '')}")
    try:
        return args_type(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{stage}: {error}") from error


def check_listed(recipe: Mapping[str, Any]) -> None:
    """Refuse values that `keys.json` excludes, before any library is imported.

    Raises:
        RecipeError: naming the key.
    """
    for stage in KEYS["stages"]:
        for key, value in (recipe.get(stage) or {}).items():
            listed(stage, key, value)


def listed(stage: str, key: str, value: Any) -> Any:
    """Return a value as the type that `keys.json` lists for its key; what may be of several types is left to the stage.

    Raises:
        RecipeError: naming the key, for a value that the type, a bound or the choices exclude.
    """
    entry = KEYS["stages"][stage]["keys"].get(key, {})
    words = entry.get("type", "")
    kind = {words: kind for kind, words in KINDS.items()}.get(words.removesuffix(OR_NULL))
    if value is None or kind is None:
        return value
    value = _typed(f"{stage}.{key}", value, kind | None if words.endswith(OR_NULL) else kind, entry.get("min"))
    for one in value if isinstance(value, list) else [value]:
        if one not in entry.get("choices", [one]):
            raise RecipeError(f"{stage}.{key}: {one!r} is none of {', '.join(map(str, entry['choices']))}")
    return value


def _check_keys(where: str, found: Mapping, known: Sequence[str], sections: Mapping[str, Collection[str] | None]) -> None:
    """Refuse an unknown key, naming the nearest: of this place, or of a section where the key may belong."""
    for key in found:
        if key not in known:
            near = _nearest(str(key).replace("-", "_"), known, sections)
            raise RecipeError(f"Unknown key {key!r} in {where}; {f'did you mean {near}?' if near else _listing(where, known)}")


def _listing(where: str, known: Sequence[str]) -> str:
    """List the keys of a place; of a section of training those that are not Transformers' own alone."""
    own = [key for key in known if key in KEYS["stages"].get(where, {}).get("keys", known)]
    more = " and the fields of transformers.TrainingArguments" if len(own) < len(known) else ""
    return f"known: {', '.join(sorted(own))}{more}"


def _nearest(key: str, known: Sequence[str], sections: Mapping[str, Collection[str] | None]) -> str | None:
    """Return the key that is meant by one that is not known, or by a name of elsewhere, quoted, and where it stands."""
    names = RENAMED.get(key, ())
    if here := next((name for name in (key, *names) if name.partition(".")[0] in known), None):
        return repr(here)
    if above := next((name for name in (key, *names) if name in TOP_LEVEL), None):
        return f"{above!r} at the top of the recipe"
    order = ("distill", "prune", "score", "evaluate")  # what is mostly meant first
    places = sorted(sections, key=lambda name: order.index(name) if name in order else len(order))
    for name in (*names, key):
        if place := next((place for place in places if name.partition(".")[0] in (sections[place] or ())), None):
            return repr(f"{place}.{name}")
    near = next(iter(difflib.get_close_matches(key, [*known, *RENAMED], n=1, cutoff=SIMILAR)), None)
    return repr(near) if near in known else near and _nearest(near, known, sections)


def items_of(text: str) -> list[str]:
    """Return the items of a list that is written as text: `arc_easy`, `arc_easy,piqa`."""
    return [item.strip() for item in text.split(",") if item.strip()]


def _typed(name: str, value: Any, declared: Any, least: int | None = None) -> Any:
    """Refuse a value that is not of the declared type; types beyond YAML's own are left to the dataclass."""
    union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    kinds = {typing.get_origin(kind) or kind for kind in (typing.get_args(declared) if union else (declared,))}
    if not kinds <= KINDS.keys():
        return value
    if list in kinds and str not in kinds and isinstance(value, str):
        value = items_of(value)
    if bool in kinds and str not in kinds and isinstance(value, str):
        value = YES_NO.get(value.lower(), value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    finite = number and abs(value) <= sys.float_info.max
    if finite and int in kinds and value == int(value):
        value = int(value)
    elif finite and float in kinds:
        value = float(value)
    elif number or type(value) not in kinds:
        quotes = "; put it in quotes" if number and str in kinds else ""
        wanted = " or ".join(words for kind, words in KINDS.items() if kind in kinds)
        raise RecipeError(f"{name}: {_written(value)} is not {wanted}{quotes}")
    if least is not None and value is not None and value < least:
        raise RecipeError(f"{name}: {value} must be at least {least}")
    for item in value if isinstance(value, list) else ():
        if isinstance(item, list | dict):
            raise RecipeError(f"{name}: {item!r} is no item of its list, which takes names and numbers; write [a, b]")
    return value


def _written(value: Any) -> str:
    """Return a value as it stands in a recipe."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


# Truth values of YAML 1.1, which are text in 1.2, where nothing but a truth value is meant.
YES_NO = {"yes": True, "on": True, "no": False, "off": False}
# The types of YAML, in words.
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a section of key: value lines",
    types.NoneType: "null",
}
OR_NULL = f" or {KINDS[types.NoneType]}"
