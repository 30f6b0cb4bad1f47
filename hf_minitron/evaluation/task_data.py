"""Whether the data of lm-eval's tasks can be had and fits them: its first rows are looked at before anything slow."""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import metadata, requires
from unittest.mock import patch

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from packaging.requirements import Requirement

from hf_minitron.errors import one_line

FIRST_ROWS = 16
LOCAL = ("json", "csv", "parquet", "text")  # builders of files on this machine
OFFLINE = "HF_HUB_OFFLINE is set, and it is not in the cache: load it once without"
ONLINE = "look for its name on the Hub, log in with `hf auth login` if it is gated, or leave the task out"


class _NoData(ValueError):
    """A data set, or a split of it, that cannot be had."""


class _Splits(DatasetDict):
    """Splits by name; one that is missing is told together with those that are there."""

    def __missing__(self, split: str):
        raise _NoData(f"it has no split {split!r}; it has {', '.join(self)}")


class _Loader:
    """Stands in for `datasets.load_dataset`, which lm-eval and the code of tasks call, and knows what was asked for last."""

    def __init__(self, whole: bool):
        self.whole, self.asked = whole, "none"

    def __call__(self, path: str, name: str | None = None, **kwargs) -> DatasetDict | Dataset:
        self.asked = f"{path} ({name})" if name else path
        whole = self.whole or datasets.config.HF_HUB_OFFLINE or path in LOCAL or "streaming" in kwargs
        try:
            data = load_dataset(path, name, **kwargs if whole else kwargs | {"streaming": True})
            rows = (lambda split: split) if whole else _first
            return _Splits({name: rows(split) for name, split in data.items()}) if isinstance(data, dict) else rows(data)
        except Exception as error:  # of the Hub, the network or a file's format
            said = one_line(error.__cause__ or error).rstrip(".")
            advice = "name other files" if path in LOCAL else OFFLINE if datasets.config.HF_HUB_OFFLINE else ONLINE
            raise _NoData(f"{said}; {advice}") from error


def _first(rows: IterableDataset) -> Dataset:
    return Dataset.from_list(list(rows.take(FIRST_ROWS)), features=rows.features)


def _download(fetch: Callable[..., bool]) -> Callable[..., bool]:
    """Return `nltk.download` that raises where it would only say that it has failed."""

    def download(resource: str, *args, **kwargs) -> bool:
        if not fetch(resource, *args, **kwargs | {"quiet": True}):
            raise _NoData(f"nltk's {resource} cannot be fetched: python -m nltk.downloader {resource} on a machine with a "
                          "network, and copy ~/nltk_data here")  # fmt: skip
        return True

    return download


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _install(task: str, module: str) -> str:
    """Say how to install a missing package: with lm-eval's extra that has it, that of the task before others."""
    needs = [requirement for requirement in map(Requirement, requires("lm_eval")) if requirement.marker]
    extras = [
        extra
        for extra in metadata("lm_eval").get_all("Provides-Extra") or ()
        if any(need.name.lower() == module.lower() and need.marker.evaluate({"extra": extra}) for need in needs)
    ]
    extras.sort(key=lambda extra: not task.startswith(extra))
    return f'pip install "lm-eval[{extras[0]}]"' if extras else f"pip install {module}"


def check_data(name: str, load: Callable[[], Mapping], key: str = "tasks") -> None:
    """Make the first question of every task that a name stands for, as lm-eval will. Offline, the data must be in the cache.

    Args:
        name (`str`): A task, a group or a tag.
        load (`Callable[[], Mapping]`): Makes lm-eval's tasks of that name.
        key (`str`, *optional*, defaults to `"tasks"`): What errors call it.

    Raises:
        ValueError: naming the task, its data set or its missing package, and what to do.
    """
    import nltk  # as slow as lm-eval, which needs it

    for whole in (False, True):  # a task that picks its rows, by a subject or a number, may want none of the first
        loader = _Loader(whole)
        try:
            with patch.object(datasets, "load_dataset", loader), patch.object(nltk, "download", _download(nltk.download)):
                return _first_questions(load())
        except Exception as error:  # of lm-eval, of the data, or of the task's own functions
            causes = list(_chain(error))
            if missing := next((cause.name for cause in causes if isinstance(cause, ModuleNotFoundError) and cause.name), None):
                package = missing.partition(".")[0]
                raise ValueError(f"{key}: {name} needs the package {package}: {_install(name, package)}") from error
            none = next((cause for cause in causes if isinstance(cause, _NoData)), None)
            if whole or none:
                said = one_line(none or error.__cause__ or error)
                raise ValueError(f"{key}: {name} cannot be run: data set {loader.asked}: {said}") from error


def _first_questions(tasks: Mapping) -> None:
    for task in tasks.values():
        documents = task.test_docs() if task.has_test_docs() else task.validation_docs()
        document = next(iter(documents))
        task.doc_to_text(document)
        task.doc_to_target(document)
