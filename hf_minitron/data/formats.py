"""What a text's name means: a file, files that match a pattern, a folder, or a dataset on the Hub; and its format.

It must not read a document.
"""

import glob
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from datasets import config
from datasets.data_files import FILES_TO_IGNORE

# Suffix to the builder of `datasets` and its options. An empty field of a table is an empty document, "NA" is a word.
FORMATS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".txt": ("text", {}),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
MEGATRON = (".bin", ".idx")
HUB = "hf://"
MOST_OTHERS = 10_000  # files of other kinds in a folder of texts: more are those of a whole disk
# How a recipe names what its own teacher writes: neither a file nor of the Hub.
SYNTHESIZED = "synthesized"


def text_files(source: str) -> list[Path] | None:
    """Return the local files that a text's name means, or its folder; `None` for a dataset on the Hub.

    Args:
        source (`str`): A file, taken literally when it exists; a pattern with `*`, `?` or `[...]`; a folder, with a
            configuration after a colon where it has several, or one that `save_to_disk` has written; Megatron's `.bin` and
            `.idx`, by either or what they have in common; or a Hub id, see `hub_name`.

    Raises:
        ValueError: when there is nothing, a suffix is unknown, or files are of several formats.
    """
    path = Path(source).expanduser()
    folder = path if path.is_dir() else Path(source.partition(":")[0]).expanduser()
    if source.startswith(HUB):
        return None
    if is_saved(path):
        return [path]
    if files := megatron_files(source):
        return files
    if path.is_file():
        files = [path]
    elif folder.is_dir():
        _check_folder(folder)
        return [folder]
    elif glob.has_magic(source):
        files = matching(source)
    elif format_of(path) is None and not source.startswith((".", "/", "~")):
        return None
    else:
        files = []
    if not files:
        raise ValueError(f"No text at {source!r}: want {WANTED}")
    _check_formats(source, files)
    return files


def megatron_files(source: str) -> list[Path]:
    """Return the two files of a Megatron dataset that a text names, in the order `.bin`, `.idx`; none for another text.

    Raises:
        ValueError: when one of the two is missing.
    """
    path = Path(source).expanduser()
    if not path.name:
        return []
    stem = path.with_suffix("") if path.suffix in MEGATRON else path
    files = [stem.with_name(stem.name + suffix) for suffix in MEGATRON]
    there = [file for file in files if file.is_file()]
    if path.suffix not in MEGATRON and (len(there) < len(files) or path.exists()):
        return []
    if len(there) == 1:
        (missing,) = set(files) - set(there)
        raise ValueError(f"{missing} is missing beside {there[0]}: a Megatron dataset is both")
    return there


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of `datasets` has written a folder."""
    files = [folder / name for name in ("dataset_dict.json", "dataset_info.json", "state.json")]
    return files[0].is_file() or (files[1].is_file() and files[2].is_file())


def hub_files(source: str) -> tuple[str, str | None]:
    """Split `hf://datasets/owner/name@revision/pattern` into a Hub id and a pattern of files; a Hub id alone has none.

    Raises:
        ValueError: for what is no dataset.
    """
    if not source.startswith(HUB):
        return source, None
    owner, name, *pattern = [*source.removeprefix(f"{HUB}datasets/").split("/", 2), ""][:3]
    if not source.startswith(f"{HUB}datasets/") or not name:
        raise ValueError(f"{source!r} is no dataset: write {HUB}datasets/owner/name, and after it a file or a pattern")
    return f"{owner}/{name}", "".join(pattern) or None


def files_in(source: str, pattern: str) -> str:
    """Return the name of some files, by their path or pattern, of a folder or of a dataset of the Hub.

    Raises:
        ValueError: for a pattern that is no text, or something that holds no files.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"text: {source}: data_files {pattern!r} is no path or pattern of files")
    if Path(source).expanduser().is_dir():
        return f"{source}/{pattern}"
    if text_files(source) is not None or ":" in source:
        raise ValueError(f"text: {source}: data_files are those of a folder or of a dataset on the Hub without a configuration")
    return f"{HUB}datasets/{source}/{pattern}"


def hub_name(source: str) -> tuple[str, str | None, str | None]:
    """Split `owner/name@revision:configuration` into its three parts, of which the last two may be left out."""
    name, _, configuration = hub_files(source)[0].partition(":")
    name, at, revision = name.partition("@")
    if at and not revision:
        raise ValueError(f"{source!r} names no revision: write {name}@ with a branch, a tag or a commit, or {name} alone")
    return name, revision or None, configuration or None


def matching(pattern: str) -> list[Path]:
    """Return the files that a pattern matches, hidden ones left out, in order."""
    paths = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207 (Path.glob takes hidden files)
    return sorted(path for path in map(Path, paths) if path.is_file())


def format_of(path: Path) -> str | None:
    """Return the suffix of a text file without that of its compression, such as `.json` of `c4.json.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS]
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def plain_bytes(files: Sequence[Path]) -> int | None:
    """Return how many bytes of text some files hold at most; `None` where compression hides it."""
    if all(file.suffix.lower() in FORMATS.keys() - {".parquet"} for file in files):
        return sum(file.stat().st_size for file in files)
    return None


def _check_formats(source: str, files: Sequence[Path]) -> None:
    """Refuse files of which some would not be read."""
    formats = {format_of(file): file for file in files}
    if None in formats:
        raise ValueError(f"{formats[None]} has no known suffix: want {WANTED}")
    if len(formats) > 1:
        names = " and ".join(sorted(formats))
        raise ValueError(f"{source} holds {names} files, and one text is of one format: name one kind, such as *{min(formats)}")
    for file in files:
        if file.suffix.lower() == ".zst" and not config.ZSTANDARD_AVAILABLE:
            raise ValueError(f"{file} is compressed by Zstandard, which needs a package: pip install zstandard")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that `datasets` would read in part or not at all."""
    if glob.has_magic(str(folder)):
        raise ValueError(f"{folder}: a folder's name cannot hold *, ? or [, which datasets takes for a pattern: rename it")
    others = (name for _, _, names in os.walk(folder) for name in names if format_of(Path(name)) is None)
    if next(islice(others, MOST_OTHERS, None), None):
        raise ValueError(f"{folder} holds more than {MOST_OTHERS:,} files that are no texts: name the folder of the texts")
    files = [file for file in matching(f"{folder}/**") if format_of(file) and file.name not in FILES_TO_IGNORE]
    if not files:
        raise ValueError(f"{folder} is a folder without texts: want {WANTED}")
    _check_formats(str(folder), files)


WANTED = (
    f"files that end in {', '.join(FORMATS)}, also compressed ({', '.join(COMPRESSIONS)}), a folder of such or of "
    f"save_to_disk, Megatron's {' and '.join(MEGATRON)}, a dataset's Hub id, or {HUB}datasets/ with files of one"
)
