"""What lm-eval's results say: every metric's value, and the record of every sample."""

from collections.abc import Mapping, Sequence

import numpy as np

from hf_minitron.evaluation.report import samples_of
from hf_minitron.evaluation.significance import AGGREGATIONS, interval


def facts_of(results: Mapping) -> dict[str, dict]:
    """Read lm-eval's results; a group's metrics name the tasks they are made `of`."""
    found = {}
    for task, metrics in results["results"].items():
        leaves = _leaves(task, results["group_subtasks"])
        samples = sum(results["n-samples"][leaf]["effective"] for leaf in leaves if leaf in results["n-samples"])
        found[task] = _metrics(metrics, samples)
        higher = results["higher_is_better"].get(task) or {}
        for name, entry in found[task].items():
            entry["higher_is_better"] = higher.get(name, True) is not False
            if leaves != [task]:
                entry["of"] = leaves
    return found


def _leaves(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    children = subtasks.get(task)
    return [leaf for child in children for leaf in _leaves(child, subtasks)] if children else [task]


def _metrics(metrics: Mapping, samples: int) -> dict[str, dict]:
    """Read lm-eval's `metric,filter` keys; of several filters of a metric the first counts."""
    found = {}
    for key, value in metrics.items():
        name, comma, filtered = key.partition(",")
        if not comma or "_stderr" in key or name in found or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{name}_stderr,{filtered}")
        found[name] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else float("nan"),
            "samples": samples,
        }
    return found


def records_of(results: Mapping) -> list[dict]:
    """Return the samples' numbers: scores weigh one, pairs are a sum of log-likelihoods and what it is to be divided by."""
    found: dict[tuple, dict] = {}
    for task, samples in results["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                value, key = sample[metric], (task, sample["doc_id"], metric)
                pair = value if isinstance(value, tuple | list) else (value, 1)
                numbers = len(pair) == 2 and all(isinstance(n, int | float | np.number | np.bool_) for n in pair)
                if numbers and key not in found:  # of several filters the first counts
                    found[key] = dict(zip(("task", "doc", "metric"), key, strict=True))
                    found[key] |= {"value": float(pair[0]), "weight": float(pair[1])}
    return list(found.values())


def add_samples_view(facts: Mapping[str, dict], records: Sequence[Mapping]) -> None:
    """Add `aggregation` and `interval` to the metrics whose value is some aggregation of their samples.

    lm-eval does not say how it made a value, so the known ways are tried; a metric that none of them gives (a corpus's BLEU,
    F1) is not compared sample by sample.
    """
    arranged = samples_of(records)
    for task, metrics in facts.items():
        for metric, entry in metrics.items():
            rows = [r for leaf in entry.get("of", [task]) for r in arranged.get((leaf, metric), {}).values()]
            rows = np.array(rows, dtype=float)
            if len(rows) == 0 or not rows[:, 1].sum() > 0:
                continue
            with np.errstate(over="ignore"):
                ways = {name: finish(rows[:, 0].sum() / rows[:, 1].sum()) for name, finish in AGGREGATIONS.items()}
            fits = [name for name, value in ways.items() if np.isclose(value, entry["value"], rtol=1e-6, atol=1e-12)]
            if fits:
                entry |= {"aggregation": fits[0], "interval": interval(rows, fits[0])}
