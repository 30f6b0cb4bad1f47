"""What lm-eval's results say: an entry of every metric, and the record of every sample."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hf_minitron.evaluation.report import Entry, samples_of, samples_of_entry
from hf_minitron.evaluation.significance import AGGREGATIONS, estimate


def task_entries(model: str, results: Mapping, records: Sequence[Mapping]) -> list[Entry]:
    """Return the entries of lm-eval's results.

    lm-eval does not say how it made a value of its samples, so the known ways are tried; a metric that none of them gives (a
    corpus's BLEU, F1) has no `aggregation`.

    Args:
        model (`str`): The model's name.
        results (`Mapping`): What `simple_evaluate` returns.
        records (`Sequence[Mapping]`): From `records_of`.
    """
    arranged, entries = samples_of(records), []
    for task, metrics in results["results"].items():
        leaves = _leaves(task, results["group_subtasks"])
        samples = sum(results["n-samples"][leaf]["effective"] for leaf in leaves if leaf in results["n-samples"])
        higher = results["higher_is_better"].get(task) or {}
        for metric, value, stderr in _metrics(metrics):
            direction, of = "lower" if higher.get(metric) is False else "higher", tuple(leaves) if leaves != [task] else ()
            more = {"of": of, "dataset": _dataset(results, leaves), "chance": _chance(results, leaves, metric)}
            entry = Entry(model, task, metric, value, stderr, n=samples, direction=direction, **more)
            entries.append(_with_samples(entry, samples_of_entry(arranged, entry)))
    return entries


def _dataset(results: Mapping, leaves: Sequence[str]) -> tuple[str | None, ...]:
    """Return the Hub's id of the dataset that a group's tasks read, and its configuration and split where these are one."""
    parts = [*zip(*(_read_from(results.get("configs", {}).get(leaf) or {}) for leaf in leaves), strict=True)]
    path, *rest = (part[0] if len({*part}) == 1 else None for part in parts)
    return (path, *rest) if path else ()


def _read_from(config: Mapping) -> tuple[str | None, ...]:
    """Return the Hub's id of a task's dataset, its configuration and split; nothing of files that a task brings along."""
    path = config.get("dataset_path")
    if not isinstance(path, str) or path.count("/") != 1:  # json, parquet and the like read the task's own files
        return None, None, None
    return path, config.get("dataset_name"), config.get("test_split") or config.get("validation_split")


def _chance(results: Mapping, leaves: Sequence[str], metric: str) -> float | None:
    """Return how often guessing is right: of tasks whose answers are choices, one in as many as a sample has."""
    kinds = {(results.get("configs", {}).get(leaf) or {}).get("output_type") for leaf in leaves}
    choices = [len(sample["filtered_resps"]) for leaf in leaves for sample in results.get("samples", {}).get(leaf, ())]
    known = metric in ("acc", "acc_norm") and kinds == {"multiple_choice"} and choices and min(choices) > 1
    return float(np.mean([1 / count for count in choices])) if known else None


def _leaves(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    children = subtasks.get(task)
    return [leaf for child in children for leaf in _leaves(child, subtasks)] if children else [task]


def _metrics(metrics: Mapping) -> Iterator[tuple[str, float, float | None]]:
    """Read lm-eval's `metric,filter` keys; of several filters of a metric the first counts."""
    seen = set()
    for key, value in metrics.items():
        name, comma, filtered = key.partition(",")
        if not comma or "_stderr" in key or name in seen or not isinstance(value, int | float):
            continue
        seen.add(name)
        stderr = metrics.get(f"{name}_stderr,{filtered}")
        yield name, float(value), float(stderr) if isinstance(stderr, int | float) and np.isfinite(stderr) else None


def _with_samples(entry: Entry, samples: Mapping[tuple[str, int], tuple[float, float]]) -> Entry:
    """Add aggregation and interval where the value is some aggregation of its samples, and the error that lm-eval lacks."""
    rows = np.array(list(samples.values()), dtype=float)
    if len(rows) == 0 or not rows[:, 1].sum() > 0:
        return entry
    with np.errstate(over="ignore"):
        ways = {name: finish(rows[:, 0].sum() / rows[:, 1].sum()) for name, finish in AGGREGATIONS.items()}
    fits = [name for name, value in ways.items() if np.isclose(value, entry.value, rtol=1e-6, atol=1e-12)]
    if not fits:
        return entry
    _, stderr, interval = estimate(rows, fits[0])
    return replace(entry, aggregation=fits[0], interval=interval, stderr=stderr if entry.stderr is None else entry.stderr)


def records_of(results: Mapping) -> list[dict]:
    """Return the samples' numbers, as a sum and what it is to be divided by.

    A score weighs one, a pair says both, and of a list of truths (IFEval's instructions of a prompt) it is their number.
    """
    records: dict[tuple, dict] = {}
    for task, samples in results["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                value, key = sample[metric], (task, sample["doc_id"], metric)
                pair = value if isinstance(value, tuple | list) else (value, 1)
                if isinstance(value, list) and value and all(isinstance(truth, bool | np.bool_) for truth in value):
                    pair = (sum(value), len(value))
                numbers = len(pair) == 2 and all(isinstance(n, int | float | np.number | np.bool_) for n in pair)
                if numbers and key not in records:  # of several filters the first counts
                    records[key] = dict(zip(("task", "doc", "metric"), key, strict=True))
                    records[key] |= {"value": float(pair[0]), "weight": float(pair[1])}
    return list(records.values())
