"""A recipe as a run, and its sections as typed arguments.

It knows no stage: the command hands it the table of stages.
"""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_minitron.recipe_file import arguments, items_of, read_recipe
from hf_minitron.run import Run


def load_recipe(path: Path, overrides: Mapping[str, Any], stages: Mapping[str, type]) -> Run:
    """Return the run of a recipe with overrides; refuse what no stage knows.

    Args:
        path (`Path`): The YAML file.
        overrides (`Mapping[str, Any]`): Values by dotted key, such as `{"prune.target.ffn": 1152}`.
        stages (`Mapping[str, type]`): Name of every stage to the dataclass of its section.

    Raises:
        RecipeError: as `read_recipe`.
    """
    keys = {stage: [field.name for field in dataclasses.fields(args) if field.init] for stage, args in stages.items()}
    recipe = read_recipe(path, overrides, keys)
    for stage, args in stages.items():  # a list of one item may be written as the item
        for name, declared in typing.get_type_hints(args).items():
            if isinstance((recipe.get(stage) or {}).get(name), str) and declared in (list, list | None):
                recipe[stage][name] = items_of(recipe[stage][name])
    folder = Path(str(recipe.get("run") or "") or f"runs/{path.resolve().parent.name}").expanduser()
    return Run(folder, str(recipe["model"]), recipe.get("seed", 0), recipe, path, stages)


def bind(run: Run, stage: str, args_type: type) -> Any:
    """Make a stage's arguments from its section.

    Raises:
        RecipeError: naming the section, for a missing or an ill-typed value.
    """
    return arguments(run.section(stage), stage, args_type)
