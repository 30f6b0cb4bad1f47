"""Documents from files or from a dataset on the Hub, one per row: texts, chats, or tokens."""

import copy
import dataclasses
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from datasets import (
    BuilderConfig,
    Dataset,
    DatasetBuilder,
    IterableDataset,
    LargeList,
    List,
    Value,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import DataFilesDict
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi, try_to_load_from_cache

from hf_minitron.data.columns import HOLDS, columns_of, holds
from hf_minitron.data.formats import (
    FORMATS,
    MEGATRON,
    format_of,
    hub_files,
    hub_name,
    is_saved,
    matching,
    plain_bytes,
    text_files,
)
from hf_minitron.data.megatron import read_megatron
from hf_minitron.errors import one_line

# The commit that a dataset of the Hub was read at: a process reads one, whatever happens to the repository meanwhile.
COMMITS: dict[str, str] = {}
READ_TOGETHER = 64  # rows
LEAVE_OUT = "Leave it out"


def check_text(source: str, block_size: int = 1) -> None:
    """Refuse a text that does not exist, or is too short for one block, without reading it.

    Args:
        source (`str`): A path or a Hub id, as for `load_text`.
        block_size (`int`, *optional*, defaults to 1): Tokens per block.
    """
    files = text_files(source)
    size = plain_bytes(files) if files else None
    if size is not None and size < block_size:  # a token is at least a byte
        raise ValueError(f"{source} is too short for one block: {size:,} bytes, block_size {block_size:,}")


def load_text(
    source: str, split: str = "train", column: str = "text", streaming: bool = False, prompts: bool = False
) -> Dataset | IterableDataset:
    """Load documents: local files, compressed or not, tokens, or a dataset on the Hub.

    Args:
        source (`str`): A file, a pattern such as `shards/*.json.gz`, a folder of shards or of `save_to_disk`, Megatron's `.bin`
            and `.idx`; or a Hub id, with a revision after an at sign, and a configuration after a colon where a dataset has
            several (`Salesforce/wikitext@b08601e:wikitext-2-raw-v1`), or as `hf://datasets/owner/name@revision/files`.
        split (`str`, *optional*, defaults to `"train"`): Split of a folder or a Hub dataset.
        column (`str`, *optional*, defaults to `"text"`): The column that holds the text, messages, tokens, or completions
            beside their `prompt`. Where there is no `text`: `messages`, `conversations`, `completion` or `input_ids`.
        streaming (`bool`, *optional*, defaults to `False`): Read documents as they are asked for, not all of them now.
        prompts (`bool`, *optional*, defaults to `False`): Read them as prompts: where there is no `text`, `messages`,
            `conversations` or `prompt`.

    Returns:
        `Dataset`, or `IterableDataset` when streaming: One document per row, in a column `text`; `messages`; `prompt` and
            `completion`; or `input_ids`. Prompts are in `text` or `messages`.

    Raises:
        ValueError: when it cannot be read, or the column is missing or holds something else than text, with file and row.
    """
    files = text_files(source)
    whole = files[0].is_file() if files else bool(hub_files(source)[1])
    split = "train" if whole else split
    try:
        builder = _builder(source, files)
        if not streaming:
            builder.download_and_prepare()
        documents = builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split)
        first = next(iter(documents.with_format(None)), {})
    except Exception as error:  # of any library below: a file's format, the Hub, the network
        raise unreadable(source, error, files) from error
    if not first:
        raise ValueError(f"{source} cannot be read: it is empty")
    columns, advice = columns_of(source, documents.column_names or list(first), column, first, prompts)
    begins = all(holds(name, first[origin]) for name, origin in columns.items() if name in HOLDS)
    shards = list((builder.config.data_files or {}).get(split, [None]))  # None: of the cache, all in one
    rows = {"shards": shards, "builder": builder, "split": split, "columns": columns, "source": source}
    if not (begins and _is_whole(documents, columns)):
        for _ in _rows(**rows, advice=advice if not begins else LEAVE_OUT):
            pass  # refused by file and row
    if isinstance(documents, IterableDataset):
        return IterableDataset.from_generator(_rows, gen_kwargs=rows)
    documents = documents.select_columns(list(columns.values()))
    return documents.rename_columns({origin: name for name, origin in columns.items() if name != origin})


def load_utf8(source: str, *args: Any, **options: Any) -> Dataset | IterableDataset:
    """Load documents, by the arguments of `load_text`; refuse files that are read now and are not UTF-8, by file and line."""
    documents = load_text(source, *args, **options)
    if isinstance(documents, Dataset):
        try:
            for column in documents.column_names:
                documents.data.column(column).validate(full=True)  # which nobody has looked at yet
        except ValueError as error:
            raise unreadable(source, error, text_files(source)) from error
    return documents


def splits_of(source: str) -> list[str]:
    """Return the splits of a text, without reading it: of files `train` alone; none where the Hub cannot be asked."""
    files = text_files(source)
    if files and files[0].is_file() or hub_files(source)[1]:
        return ["train"]
    try:
        builder = _builder(source, files)
    except Exception:  # of any library below; whoever reads the text says what is wrong
        return []
    return builder.splits if isinstance(builder, _Opened) else list(builder.config.data_files or builder.info.splits or ())


def _builder(source: str, files: Sequence[Path] | None) -> DatasetBuilder:
    if files is None:
        return _hub_builder(source)
    if is_saved(files[0]):
        saved = load_from_disk(files[0])
        return _Opened(saved if isinstance(saved, Mapping) else None, saved)
    if len(files) == 2 and files[0].suffix == MEGATRON[0]:
        return _Opened(None, read_megatron(*files))
    if files[0].is_dir():  # by its path, for it may be called as a builder is: text, csv
        return load_dataset_builder(str(files[0].absolute()), source.partition(":")[2] or None)
    builder, options = FORMATS[format_of(files[0])]
    names = [glob.escape(str(file.absolute())) for file in files]  # they exist, so no name is a pattern
    return load_dataset_builder(builder, data_files=names, **options)


class _Opened:
    """What lies on the disk as `datasets` holds it: read as by a builder that has nothing to do."""

    config = BuilderConfig()

    def __init__(self, splits: Mapping[str, Dataset] | None, documents: Dataset):
        self.splits = list(splits or ["train"])
        self._splits, self._documents = splits, documents

    def download_and_prepare(self) -> None:
        pass

    def as_dataset(self, split: str) -> Dataset:
        if self._splits is not None and split not in self._splits:
            raise ValueError(f"Bad split: {split}. Available splits: {list(self._splits)}")
        return self._documents if self._splits is None else self._splits[split]

    as_streaming_dataset = as_dataset


def _hub_builder(source: str) -> DatasetBuilder:
    """Return what reads a dataset of the Hub at one commit, or in the cache where the Hub cannot be asked."""
    (name, revision, configuration), pattern = hub_name(source), hub_files(source)[1]
    builder = load_dataset_builder(name, configuration, data_files=pattern, revision=COMMITS.get(source, revision))
    wanted = COMMITS.get(source)
    if wanted is None and revision and builder.config.data_files is None:  # of the cache: the newest there, whatever was asked
        wanted = _cached_commit(name, revision) or revision
    if wanted not in (None, builder.hash):
        raise ValueError(f"the Hub cannot be asked, and the cache holds commit {builder.hash}, not {wanted}. Connect to the "
                         "Hub, or name the commit that is there")  # fmt: skip
    COMMITS[source] = builder.hash
    return builder


def commit_of(source: str) -> str | None:
    """Return the commit at which this process reads a dataset of the Hub; `None` where neither Hub nor cache can say."""
    if source not in COMMITS:
        try:
            _hub_builder(source)
        except Exception:  # of any library below; whoever reads the text says what is wrong
            return None
    return COMMITS[source]


def hub_commit(dataset: str, revision: str | None = None) -> str | None:
    """Return the commit that a dataset's revision is of on the Hub, asked once; of the cache where it cannot be asked."""
    key = f"{dataset}@{revision or 'main'}"
    if key not in COMMITS:
        try:
            COMMITS[key] = HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
        except Exception:  # offline, without a connection, or without the dataset: whoever reads it says what is wrong
            return _cached_commit(dataset, revision)
    return COMMITS[key]


def _cached_commit(dataset: str, revision: str | None) -> str | None:
    """Return the commit that a dataset's revision was of when its card was last fetched; `None` where it never was."""
    card = try_to_load_from_cache(dataset, "README.md", repo_type="dataset", revision=revision)
    return Path(card).parent.name if isinstance(card, str) else None


def _rows(
    shards: Sequence[str | None],
    builder: DatasetBuilder,
    split: str,
    columns: Mapping[str, str],
    source: str,
    advice: str = LEAVE_OUT,
) -> Iterator[dict[str, Any]]:
    """Yield the documents of some shards; refuse a row that holds something else, by its file and row."""
    for shard in shards:
        where = source if shard is None or len(builder.config.data_files[split]) == 1 else _shown(shard)
        for number, row in enumerate(_read(builder, split, shard, where), 1):
            for name, column in columns.items():
                if name in HOLDS and not holds(name, row.get(column)):
                    raise ValueError(f"{where}, row {number:,}: column {column!r} holds {str(row.get(column))[:40]!r}, not "
                                     f"{HOLDS[name][2]}. {advice}")  # fmt: skip
            yield {name: row.get(column) for name, column in columns.items()}


def _read(builder: DatasetBuilder, split: str, shard: str | None, where: str) -> Iterator[dict]:
    """Yield the rows of one shard of what a builder reads; say where it is broken."""
    one = copy.copy(builder)
    if shard is not None:
        config = dataclasses.replace(builder.config, data_files=DataFilesDict({split: [shard]}))
        one.__dict__ = vars(builder) | {"config": config}  # a copy's attributes are the builder's own
    try:
        for rows in one.as_streaming_dataset(split).iter(READ_TOGETHER):  # all, by whichever worker of a DataLoader it is asked
            yield from (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True))
    except Exception as error:  # of any library below: a file's format, the Hub, the network
        raise unreadable(where, error, shard and [Path(shard)]) from error


def _shown(shard: str) -> str:
    """Return a shard's name: its path, below this folder where it lies there; that of a dataset's repository on the Hub."""
    path = Path(shard)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else shard.removeprefix("hf://datasets/")


def _is_whole(documents: Dataset | IterableDataset, columns: Mapping[str, str]) -> bool:
    """Return whether columns are of one type, text or a list, and, where all of it is here, without nulls."""
    for column in (column for name, column in columns.items() if name in HOLDS):
        kind = (documents.features or {}).get(column, Value("string"))  # a stream's features may not be known
        if isinstance(documents, Dataset) and documents.data.column(column).null_count:
            return False
        if not isinstance(kind, List | LargeList) and getattr(kind, "dtype", None) not in ("string", "large_string"):
            return False
    return True


def unreadable(source: str, error: Exception, files: Sequence[Path] | None = None) -> ValueError:
    """Return an error in one line: which line of a text's files is broken, else what was said by the library that read it."""
    for file in files or ():
        for path in sorted(matching(f"{glob.escape(str(file))}/**")) if file.is_dir() else [file]:
            if broken := broken_line(path):
                return ValueError(f"{source if [path] == files else _shown(str(path))}, {broken}. Mend or remove it")
    said = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    return ValueError(f"{source} cannot be read: {'it is empty' if isinstance(said, StopIteration) else one_line(said)}")


def broken_line(path: Path) -> str | None:
    """Say which line of a text file is not UTF-8 or not a JSON object, and why; `None` when it is not for that."""
    form = format_of(path)
    if not path.is_file() or form in (None, ".parquet"):
        return None
    number = 0
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            for number, line in enumerate(file, 1):
                text = line.decode()
                if number == 1 and form == ".json" and not _is_object(text):  # one document, not one per line
                    form = ".txt"
                if form in (".json", ".jsonl") and text.strip() and not isinstance(row := json.loads(text), dict):
                    return f'line {number:,} holds {str(row)[:40]}, not an object such as {{"text": ...}}'
    except UnicodeDecodeError as error:
        return f"line {number:,} is not UTF-8: byte {error.object[error.start]:#04x}"
    except (json.JSONDecodeError, RecursionError) as error:
        return f"line {number:,} is not JSON: {getattr(error, 'msg', error)}"
    except Exception as error:  # every compression's own kinds
        return f"line {number + 1:,} cannot be decompressed: {one_line(error)}"
    return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
