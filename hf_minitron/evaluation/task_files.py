"""The files behind lm-eval tasks of one's own: what has to be the same for a task's numbers to be the same."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_minitron.checkpoint.model_files import is_hub_id
from hf_minitron.data.texts import hub_commit
from hf_minitron.evaluation.tasks import Tasks, entries_of, leaves

MOST_FILES = 100_000  # lm-eval has 14,000, and reads every folder below one that it is given


def check_folder(include_path: str | None) -> None:
    """Refuse a folder in which nobody would look for tasks: lm-eval would read all of the disk.

    Raises:
        ValueError: naming the folder.
    """
    count = 0
    for _, folders, names in os.walk(Path(include_path).expanduser()) if include_path else ():
        count += len(folders) + len(names)
        if count > MOST_FILES:
            raise ValueError(f"include_path: {include_path} holds more than {MOST_FILES:,} files; name the folder of the tasks")


def task_files(tasks: Sequence[str], section: Mapping[str, Any]) -> dict[str, Path | str | None]:
    """Return the files that define some tasks: their YAML files, what these include, their functions and their data; and the
    commits of datasets on the Hub.

    Files that lm-eval brings along are left out: they are of its version.

    Args:
        tasks (`Sequence[str]`): Names, or paths of YAML files.
        section (`Mapping`): Its `include_path` is where tasks of one's own lie.
    """
    own, files = section.get("include_path"), {}
    include = [Path(own).expanduser()] if isinstance(own, str) and Path(own).expanduser().is_dir() else []
    for task in tasks if isinstance(tasks, list) else ():
        if isinstance(task, str) and Path(task).suffix in (".yaml", ".yml"):
            path = Path(task).expanduser()
            files |= _named(path.parent, _of_file(path, path.parent))
        elif isinstance(task, str) and include:
            files |= _named(include[0], _of_task(task, include[0]))
    return files | _datasets(tasks, own)


def _datasets(tasks: Sequence[str], include_path: str | None) -> dict[str, str | None]:
    """Return the datasets on the Hub that some tasks ask about, and their commits."""
    try:
        chosen = Tasks.find(tasks, include_path)
    except (ValueError, TypeError):  # whoever runs the tasks says what is wrong
        return {}
    found = {}
    for content in (content for task in chosen.names for content in leaves(task, chosen.include_paths)):
        name, revision = content.get("dataset_path"), (content.get("dataset_kwargs") or {}).get("revision")
        if isinstance(name, str) and is_hub_id(name):
            found[name] = hub_commit(name, revision)
    return found


def _of_task(task: str, folder: Path) -> Iterator[Path]:
    for entry in entries_of(task, [folder]):
        if entry.yaml_path and entry.yaml_path.resolve().is_relative_to(folder.resolve()):
            yield from _of_file(entry.yaml_path, folder)


def _of_file(path: Path, folder: Path) -> Iterator[Path]:
    """Yield a task's YAML file, and the files that it names; those of a group's tasks, too."""
    from lm_eval.tasks._yaml_loader import load_yaml  # seconds to import

    try:
        content = load_yaml(path, resolve_func=False, recursive=False)
    except Exception:  # of the reader; whoever runs the task says what is wrong
        content = {}
    if not path.is_file():
        return
    yield path
    includes = content.get("include") or []
    for include in includes if isinstance(includes, list) else [includes]:
        yield from _of_file(path.parent / str(include), folder)
    for text in _strings(content):
        module = Path(text.removeprefix(f"{path.parent.resolve()}/").rpartition(".")[0].replace(".", "/") + ".py")
        if text.startswith(f"{path.parent.resolve()}/"):  # what `!function` became
            yield from _data(path.parent / module)
    for text in _strings([content.get("dataset_path"), content.get("dataset_kwargs")]):
        yield from _data(Path(text).expanduser())
    if isinstance(content.get("task"), list):
        yield from (file for name in _strings(content["task"]) for file in _of_task(name, folder))


def _data(path: Path) -> Iterator[Path]:
    """Yield a data file, the files of a folder, or those of a pattern; nothing of a name on the Hub."""
    found = [path] if path.exists() else path.parent.glob(path.name) if path.parent.is_dir() and path.name else ()
    for item in found:
        yield from (file for file in (sorted(item.rglob("*")) if item.is_dir() else [item]) if file.is_file())


def _strings(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _named(folder: Path, paths: Iterable[Path]) -> dict[str, Path]:
    """Name files from their folder on, where they lie in it."""
    base = folder.resolve()
    return {str(path.resolve().relative_to(base) if path.resolve().is_relative_to(base) else path): path for path in paths}
