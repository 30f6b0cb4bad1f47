"""What was measured, as values: the report's flat list of entries, and the records of single samples behind them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from hf_minitron.evaluation.significance import Difference, compare_paired, estimate

TEXT = "held-out text"  # stands for a task's name in entries and records of the text
VERSION = 2

_SCHEMA = pyarrow.schema([
    ("task", pyarrow.string()), ("doc", pyarrow.int64()), ("metric", pyarrow.string()),
    ("value", pyarrow.float64()), ("weight", pyarrow.float64()),
])  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One number: what a model reached on a task by a metric.

    Args:
        model (`str`): The model's name in the report.
        task (`str`): lm-eval's name of the task or group, or `TEXT`.
        metric (`str`): The metric.
        value (`float`): The number.
        stderr (`float`, *optional*): Its standard error.
        interval (`tuple[float, float]`, *optional*): Its 95 % confidence interval.
        n (`int`, *optional*): Samples: documents of a task, packed sequences of the text.
        aggregation (`str`, *optional*): How the value comes from its samples, a key of `significance.AGGREGATIONS`; metrics
            without one (a corpus's BLEU) are not compared sample by sample.
        direction (`str`, *optional*, defaults to `"higher"`): Which is better, `"higher"` or `"lower"`.
        unit (`str`, *optional*, defaults to `""`): What it counts; values of different units are not compared.
        of (`tuple[str, ...]`, *optional*): The tasks that a group's value is made of.
        chance (`float`, *optional*): What guessing reaches, where that is known.
        dataset (`tuple[str | None, ...]`, *optional*): The task's dataset on the Hub: its id, configuration and split.
    """

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None
    aggregation: str | None = None
    direction: str = "higher"
    unit: str = ""
    of: tuple[str, ...] = ()
    dataset: tuple[str | None, ...] = ()
    chance: float | None = None

    @classmethod
    def of_samples(cls, model: str, task: str, metric: str, rows: np.ndarray, aggregation: str, **more) -> "Entry":
        """Make an entry of samples, `(samples, 2)` values and weights, with its error and interval."""
        return cls(model, task, metric, *estimate(rows, aggregation), len(rows), aggregation, **more)


@dataclass(frozen=True)
class Comparison(Difference):
    """A model's metric beside a baseline's on the same samples: a `Difference`, and of what.

    Args:
        model (`str`): The model.
        baseline (`str`): The one that it is compared with.
        task (`str`): The task, or `TEXT`.
        metric (`str`): The metric.
    """

    model: str
    baseline: str
    task: str
    metric: str


@dataclass(frozen=True)
class Report:
    """What was measured: the only source of numbers for tables, cards and README.

    Args:
        models (`Mapping`): Name to what a model is: `path`, `revision`, `parameters`, `bytes` (of the weights on disk), `dtype`
            (of most of them), `shape`; the teacher first.
        entries (`Sequence[Entry]`): What every model reached on held-out text and tasks.
        comparisons (`Sequence[Comparison]`): Paired comparisons, see `compare_models`.
        speed (`Mapping`): Name to a list of settings and what was measured at each, in one run.
        text (`Mapping`): The held-out text: hash, tokens, how many of them were `scored`, whether those of `answers` alone,
            blocks, bytes.
        settings (`Mapping`): How it was measured: few-shot examples, limit, chat template, dtype.
        machine (`Mapping`): Versions and hardware, see `environment`.
        answers (`Sequence[Mapping[str, str]]`): For each prompt the `prompt`, and what every model writes after it, by name.

    Example:

    ```python
    >>> entry = Entry("student", "arc_easy", "acc", 0.41, stderr=0.03, n=200)
    >>> report = Report({"student": {"parameters": 100_000_000}}, [entry])
    >>> report.value("student", "acc", "arc_easy")
    0.41
    ```
    """

    models: Mapping[str, Mapping]
    entries: Sequence[Entry] = ()
    comparisons: Sequence[Comparison] = ()
    speed: Mapping[str, list[dict]] = field(default_factory=dict)
    text: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)
    answers: Sequence[Mapping[str, str]] = ()

    def __post_init__(self):
        for name in ("entries", "comparisons", "answers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def entry(self, model: str, metric: str, task: str = TEXT) -> Entry | None:
        """Return a model's entry of a metric, of held-out text unless a task is named; `None` where there is none."""
        return next((e for e in self.entries if (e.model, e.task, e.metric) == (model, task, metric)), None)

    def value(self, model: str, metric: str, task: str = TEXT) -> float:
        """Return a model's value of a metric, of held-out text unless a task is named.

        Raises:
            ValueError: naming what there is.
        """
        found = self.entry(model, metric, task)
        if found is None:
            there = ", ".join(f"{e.task} {e.metric}" for e in self.entries if e.model == model)
            raise ValueError(f"No {metric!r} of {task!r} was measured of {model!r}; there is {there or 'nothing'}")
        return found.value

    def of_tasks(self, model: str) -> list[Entry]:
        """Return a model's entries but for those of held-out text."""
        return [e for e in self.entries if e.model == model and e.task != TEXT]

    def headings(self, model: str) -> list[Entry]:
        """Return a model's entries but for those of tasks that are part of a group."""
        entries = [e for e in self.entries if e.model == model]
        inside = {task for entry in entries for task in entry.of}
        return [e for e in entries if e.task not in inside]

    def against(self, baseline: str, model: str | None = None) -> list[Comparison]:
        """Return the comparisons to a model, of one other or of all."""
        return [c for c in self.comparisons if c.baseline == baseline and model in (None, c.model)]

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read what `save` wrote.

        Raises:
            ValueError: for a report of another version.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        version = content.pop("version", 1)
        if version != VERSION:
            raise ValueError(f"{path} is a report of version {version}, and only version {VERSION} is read: delete it and "
                             "measure again")  # fmt: skip
        for key, kind in (("entries", Entry), ("comparisons", Comparison)):
            content[key] = tuple(kind(**_tuples(row)) for row in content[key])
        return cls(**content)


def _tuples(row: Mapping) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def save_samples(rows: Sequence[Mapping], path: Path) -> None:
    """Write records of single samples as Parquet.

    A record's columns are `task`, `doc` (its number in the task, or the block's in the text), `metric`, `value` and `weight`. A
    metric is made of the sum of the values over the sum of the weights: values are scores with weights of one, or
    log-likelihoods in nats with weights that count words, tokens or bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=_SCHEMA), path)


def load_samples(path: Path) -> list[dict]:
    """Read what `save_samples` wrote."""
    return parquet.read_table(path).to_pylist()


def samples_of(rows: Sequence[Mapping]) -> dict[tuple[str, str], dict[tuple[str, int], tuple[float, float]]]:
    """Arrange records: by task and metric, then by sample."""
    arranged: dict[tuple[str, str], dict] = {}
    for row in rows:
        samples = arranged.setdefault((row["task"], row["metric"]), {})
        samples[row["task"], row["doc"]] = (row["value"], row["weight"])
    return arranged


def compare_models(entries: Sequence[Entry], records: Mapping[str, Sequence[Mapping]], seed: int = 0) -> tuple[Comparison, ...]:
    """Compare every model with the teacher and with the models before it, metric by metric, on the samples both have.

    Args:
        entries (`Sequence[Entry]`): What every model reached.
        records (`Mapping[str, Sequence[Mapping]]`): The records of every model, the teacher first.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
    """
    arranged = {name: samples_of(rows) for name, rows in records.items()}
    units, comparisons, names = {(e.model, e.task, e.metric): e.unit for e in entries}, [], list(records)
    for model, baseline in ((model, baseline) for i, model in enumerate(names) for baseline in names[:i]):
        for entry in (e for e in entries if e.model == model and e.aggregation):
            if units.get((baseline, entry.task, entry.metric)) != entry.unit:
                continue  # not measured, or per token of another tokenizer
            samples = [samples_of_entry(arranged[name], entry) for name in (model, baseline)]
            shared = sorted(samples[0].keys() & samples[1].keys())
            if len(shared) >= 2:
                ours, theirs = (np.array([rows[key] for key in shared], dtype=float) for rows in samples)
                difference = compare_paired(ours, theirs, entry.aggregation, entry.direction == "higher", seed)
                comparisons.append(
                    Comparison(**vars(difference), model=model, baseline=baseline, task=entry.task, metric=entry.metric)
                )
    return tuple(comparisons)


def samples_of_entry(arranged: Mapping, entry: Entry) -> dict[tuple[str, int], tuple[float, float]]:
    """Return the samples behind an entry, of a group's tasks together, from arranged records."""
    return {k: v for task in entry.of or (entry.task,) for k, v in arranged.get((task, entry.metric), {}).items()}
