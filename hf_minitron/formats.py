"""What a text's name means: a file, files that match a pattern, a folder of shards, or a dataset on the Hub; and its format.

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
MOST_OTHERS = 10_000  # files of other kinds in a folder of texts: more are those of a whole disk
# How a recipe names what its own teacher writes: neither a file nor of the Hub.
SYNTHESIZED = "synthesized"


def text_files(source: str) -> list[Path] | None:
    """Return the local files that a text's name means, or its folder; `None` for a dataset on the Hub.

    Args:
        source (`str`): A file, taken literally when it exists; a pattern with `*`, `?` or `[...]`; a folder, with a
            configuration after a colon where it has several; or a Hub id, see `hub_name`.

    Raises:
        ValueError: when there is nothing, a suffix is unknown, or files are of several formats.
    """
    path = Path(source).expanduser()
    folder = path if path.is_dir() else Path(source.partition(":")[0]).expanduser()
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


def hub_name(source: str) -> tuple[str, str | None, str | None]:
    """Split `owner/name@revision:configuration` into its three parts, of which the last two may be left out."""
    name, _, configuration = source.partition(":")
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
    f"files that end in {', '.join(FORMATS)}, also compressed ({', '.join(COMPRESSIONS)}), a folder of such, "
    "or a dataset's Hub id"
)
