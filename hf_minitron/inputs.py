"""What the result of a stage depends on: settings and contents of files, as a flat table, so that a change can be named.

It knows no stage. A field of a section's dataclass says by its metadata that it names files (`reads`, a function of its value
and of the section) or that it changes no bits of the result (`bits: False`); inherited fields of the latter kind are listed in
the class's `NO_BITS`.
"""

import dataclasses
import glob
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tqdm.auto import tqdm

from hf_minitron.checkpoint.model_files import pinned, revision_of
from hf_minitron.checkpoint.model_kinds import adapter_base
from hf_minitron.checkpoint.side_files import SIDE_FILES
from hf_minitron.data import formats
from hf_minitron.data.texts import commit_of
from hf_minitron.json_files import read_json, write_whole

# A file; the folder of the Hub's cache that holds a model's commit; a dataset's commit, `None` where nobody can tell it.
Source = Path | str | None
HASHES = "hashes.json"
LARGE = 1 << 20  # bytes; a smaller file is read faster than its hash is looked up
SETTLED = 2  # seconds; a file may be written twice within a tick of its clock


def text_files(value: Any, section: Mapping[str, Any]) -> dict[str, Source]:
    """Return the files of the texts of a setting, a name or a table of several; of those on the Hub the commits."""
    files = {}
    for name in value if isinstance(value, Mapping) else [value]:
        path = Path(name).expanduser() if isinstance(name, str) and name not in ("", formats.SYNTHESIZED) else None
        if path and (pair := _pair(name)):
            files |= {f"{name}: {file.name}": file for file in pair}
        elif path and _is_file(path):
            files[name] = path
        elif path and _is_on_hub(name):
            files[name] = commit_of(name)
        elif path:  # a folder of shards, perhaps with a configuration, or a pattern
            folder = path if path.is_dir() else Path(name.partition(":")[0] or name).expanduser()
            every = formats.matching(f"{glob.escape(str(folder))}/**" if folder.is_dir() else name)
            files |= {f"{name}: {file.name}": file for file in every}
    return files


def _pair(name: str) -> list[Path]:
    try:
        return formats.megatron_files(name)
    except (ValueError, OSError):  # one is missing, or no file system takes the name
        return []


def _is_on_hub(name: str) -> bool:
    try:
        return formats.text_files(name) is None
    except (ValueError, OSError):  # nothing, or no longer
        return False


def model_files(value: Any, section: Mapping[str, Any]) -> dict[str, Source]:
    """Return the files of a model's folder, or of the models in a table; of one on the Hub the folder of its commit."""
    if isinstance(value, Mapping):
        by_model = {name: model_files(model, section) for name, model in value.items()}
        return {f"{name}/{file}": path for name, files in by_model.items() for file, path in files.items()}
    return _files_of(value) if isinstance(value, str) and value else {}


def teacher_files(value: Any, section: Mapping[str, Any]) -> dict[str, Source]:
    """Return the files of a section's teacher, as its `teacher_model_init_kwargs` pin it: the run's model when it has none."""
    kwargs = section.get("teacher_model_init_kwargs")
    model = value or (section["model"] if kwargs else None)
    return _files_of(model, **(kwargs if isinstance(kwargs, Mapping) else {})) if isinstance(model, str) else {}


def _files_of(model: str, **which: Any) -> dict[str, Source]:
    """Return a model's files, and those of the model that it is an adapter of; `which` is as for `from_pretrained`."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        base = adapter_base(folder)
        files = {path.name: path for path in sorted((folder / (which.get("subfolder") or "")).iterdir()) if _counts(path)}
        return files | (_files_of(base, **which) if base else {})
    name, revision = pinned(model)
    config = "/".join(filter(None, (which.get("subfolder"), "config.json")))
    try:
        config_file = try_to_load_from_cache(name, config, which.get("cache_dir"), revision or which.get("revision"))
    except HFValidationError:  # a path of nothing
        return {}
    return {model: Path(config_file).parent if isinstance(config_file, str) else None}


def _counts(path: Path) -> bool:
    """Return whether a file in a model's folder is of the model: a card written anew is no reason to do later runs again."""
    return _is_file(path) and path.suffix not in (".md", ".png", ".yaml") and path.name != "report.json"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def settings(section: Mapping[str, Any], args_type: type | None, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the settings of a section that change its result: flat, keys of tables after a dot.

    Args:
        section (`Mapping`): The section as the recipe has it.
        args_type (`type`, *optional*): Its dataclass.
        keys (`Iterable[str]`, *optional*): Only these; all when left out.
    """
    fields = {field.name: field for field in dataclasses.fields(args_type)} if args_type else {}
    quiet = {name for name, field in fields.items() if not field.metadata.get("bits", True)}
    if not section.get("load_best_model_at_end"):  # which takes one of the checkpoints
        quiet |= set(getattr(args_type, "NO_BITS", ()))
    table: dict[str, Any] = {}
    for key in section if keys is None else [key for key in keys if key in section]:
        if key in quiet:
            continue
        value = section[key]
        table |= _flat(key, value)
        if isinstance(value, Mapping) and len(value) > 1 and key in fields and "reads" in fields[key].metadata:
            table[f"order of {key}"] = list(value)  # sources take turns in it, and reports list models in it
    return table


def files(section: Mapping[str, Any], args_type: type | None, keys: Iterable[str] | None = None) -> dict[str, Source]:
    """Return the files that settings of a section name, as `setting: file`, and what they name on the Hub."""
    sources = {}
    for field in dataclasses.fields(args_type) if args_type else ():
        reads, value = field.metadata.get("reads"), section.get(field.name)
        if reads and (keys is None or field.name in keys):
            sources |= {f"{field.name}: {name}": path for name, path in reads(value, section).items()}
    return sources


def contents(sources: Mapping[str, Source], before: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what sources hold: the hash of a file, the commit of what lies on the Hub.

    Args:
        sources (`Mapping`): From `files`.
        before (`Mapping`): What they held when they were last read. It holds still where the Hub cannot be asked, and for a
            model that has moved to a commit with the same config, weights and tokenizer.
        folder (`Path`): Where hashes of large files are kept.
    """
    hashes = hashes_of([path for path in sources.values() if isinstance(path, Path) and not path.is_dir()], folder)
    return {name: hashes[source] if source in hashes else _commit(source, before.get(name)) for name, source in sources.items()}


def _commit(source: Source, before: str | None) -> str | None:
    if isinstance(source, Path):
        commit = revision_of(source)
        old = Path(str(source).replace(commit, str(before).removeprefix("commit ")))
        if old != source and _loaded(old) == _loaded(source) and any(source.glob("*.safetensors")):
            return before
        return f"commit {commit}"
    return before if source is None else f"commit {source}"


def _loaded(snapshot: Path) -> dict[str, str]:
    """Return the hashes of those files of a model that are fetched to load it."""
    return {path.name: _hash_of(path, {}) for kind in ("*.json", "*.safetensors", *SIDE_FILES) for path in snapshot.glob(kind)}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {key: item for inner, content in value.items() for key, item in _flat(f"{name}.{inner}", content).items()}
    return {name: value}


def digest(table: Mapping[str, Any]) -> str:
    """Return the hash of a table."""
    return hashlib.sha256(json.dumps(table, sort_keys=True, default=str).encode()).hexdigest()


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Say what differs between two tables, such as `learning_rate 0.001 -> 0.002, text: train.jsonl has changed`."""
    before, after = (json.loads(json.dumps(table, default=str)) for table in (before, after))
    words = []
    for name in dict.fromkeys([*after, *before]):
        old, new = (table.get(name, "default") for table in (before, after))
        if old == new:
            continue
        if all(str(value).startswith("commit ") for value in (old, new)):
            words.append(f"{name} has moved from {old} to {new}")
        elif ": " in name:
            words.append(f"{name} {'is new' if name not in before else 'is gone' if name not in after else 'has changed'}")
        else:
            words.append(f"{name} {_shown(old)} -> {_shown(new)}")
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:60] + "..."


def hashes_of(paths: Iterable[Path], folder: Path | None = None) -> dict[Path, str]:
    """Return the hashes of some files' contents, several at a time.

    Args:
        paths (`Iterable[Path]`): The files.
        folder (`Path`, *optional*): Where hashes of large files are kept, by size and times, once the folder exists.
    """
    paths, known = list(paths), _load(folder / HASHES) if folder else {}
    cache = dict(known)
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda path: _hash_of(path, cache), paths)
        hashes = dict(zip(paths, tqdm(digests, "Hashing files", len(paths), unit="file", leave=False, delay=2), strict=True))
    if cache != known and folder and folder.is_dir():
        write_whole(folder / HASHES, json.dumps(cache, indent=1) + "\n")
    return hashes


def _hash_of(path: Path, cache: dict[str, list]) -> str:
    """Return the hash of a file's content; a blob of the Hub's cache has its own for a name."""
    if path.is_symlink() and path.parent.parent.name == "snapshots":
        return path.readlink().name
    stat, key = path.stat(), str(path.resolve())
    mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    if cache.get(key, [None])[:-1] == mark:
        return cache[key][-1]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(LARGE):
            digest.update(part)
    if stat.st_size >= LARGE and time.time() - stat.st_mtime > SETTLED:
        cache[key] = [*mark, digest.hexdigest()]
    return digest.hexdigest()


def contents_of(paths: Mapping[str, Path]) -> dict[str, list]:
    """Return size, time and hash of some files, by their names."""
    hashes = hashes_of(paths.values())
    return {name: [path.stat().st_size, path.stat().st_mtime_ns, hashes[path]] for name, path in paths.items()}


def holds(path: Path, content: list) -> bool:
    """Return whether a file is there and holds what it did; it is only read when its time has changed."""
    size, written, known = content
    if not path.is_file() or path.stat().st_size != size:
        return False
    return path.stat().st_mtime_ns == written or _hash_of(path, {}) == known


def _load(path: Path) -> dict:
    content = read_json(path)
    return {key: mark for key, mark in content.items() if isinstance(mark, list) and mark}
