"""A chain: several recipes in order, where a later one builds on what an earlier one will have made.

All can be checked before the first is begun: what does not exist yet is stood in for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_minitron.recipe import bind
from hf_minitron.run import RecipeError, Run
from hf_minitron.stages import prune


def check_chain(runs: Sequence[Run], overrides: Mapping[str, Any]) -> None:
    """Refuse several recipes with one folder, or with an override that would give them one or the same model.

    Raises:
        RecipeError: naming the recipe or the override.
    """
    for key in {"run", "model"} & overrides.keys() if len(runs) > 1 else ():
        raise RecipeError(f"--{key} is for one recipe; with several, write it into each")
    folders = [run.folder.resolve() for run in runs]
    for run in runs:
        if folders.count(run.folder.resolve()) > 1:
            raise RecipeError(f"{run.recipe_path}: another recipe of the chain has the folder {run.folder} too; set `run:`")


def with_placeholders(run: Run, made: Mapping[Path, Path]) -> Run:
    """Return a run whose recipe names stand-ins in place of what earlier runs will make."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return str(made.get(Path(value).expanduser().resolve(), value)) if isinstance(value, str) else value

    return dataclasses.replace(run, model=replaced(run.model), recipe=replaced(dict(run.recipe)))


def placeholder_models(run: Run, ahead: Run, folder: Path) -> dict[Path, Path]:
    """Return what stands in for the models that a run will make: its student's outline, and its teacher for the corrected one.

    Args:
        run (`Run`): The run.
        ahead (`Run`): The same with stand-ins for what it reads.
        folder (`Path`): Where to write the outline.
    """
    prune.outline(bind(ahead, "prune", prune.Args), ahead.model, folder)
    students = [run.path("prune") / "student", run.path("distill") / "student", run.path("publish") / "model"]
    teachers = {run.path("correct") / "teacher": Path(ahead.model).expanduser()} if "correct" in run.recipe else {}
    return {path.resolve(): found for path, found in (dict.fromkeys(students, folder) | teachers).items()}
