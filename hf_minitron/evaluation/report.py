"""What was measured: the report, and the records of single samples behind it.

It must not measure anything.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from hf_minitron.evaluation.significance import compare_paired

TEXT = "held-out text"  # stands for a task's name in the records of the text's blocks
TEACHER = "teacher"

_SCHEMA = pyarrow.schema([
    ("task", pyarrow.string()), ("doc", pyarrow.int64()), ("metric", pyarrow.string()),
    ("value", pyarrow.float64()), ("weight", pyarrow.float64()),
])  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was measured: the only source of numbers for tables, cards and README.

    Args:
        models (`Mapping`): Name to its facts: `path`, `parameters`, `bytes` (of the weights on disk), `shape`, `perplexity`,
            `bits_per_byte`, `agreement` with the teacher (`top1_match`, `teacher_kl`) and `tasks`, each a value with its
            standard error and 95 % interval.
        text (`Mapping`): The held-out text: hash, tokens, blocks, bytes.
        speed (`Mapping`): Name to a list of settings and what was measured at each, in one run.
        comparisons (`Sequence`): Paired comparisons, see `compare_models`.
        settings (`Mapping`): How the tasks were run: few-shot examples, limit, chat template.
        machine (`Mapping`): Versions and hardware, see `environment`.
    """

    models: Mapping[str, dict]
    text: Mapping[str, object]
    speed: Mapping[str, list[dict]] = field(default_factory=dict)
    comparisons: Sequence[dict] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read what `save` wrote, now or before there were comparisons and several settings of speed."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, speeds in content.get("speed", {}).items():
            if isinstance(speeds, dict):  # tokens per second at batch size 1, a prompt of 512 tokens
                measured = {kind: {"value": value} for kind, value in speeds.items()}
                content["speed"][name] = [{"batch_size": 1, "prompt": 512} | measured]
        return cls(**content)

    def against(self, baseline: str, model: str | None = None) -> list[dict]:
        """Return the comparisons to a model, of one other or of all."""
        return [c for c in self.comparisons if c["baseline"] == baseline and model in (None, c["model"])]


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
    found: dict[tuple[str, str], dict] = {}
    for row in rows:
        samples = found.setdefault((row["task"], row["metric"]), {})
        samples[row["task"], row["doc"]] = (row["value"], row["weight"])
    return found


def compare_models(models: Mapping[str, dict], records: Mapping[str, Sequence[Mapping]], seed: int = 0) -> list[dict]:
    """Compare every model with the teacher and with the models before it, metric by metric, on the samples both have.

    Args:
        models (`Mapping[str, dict]`): Facts of the models, as in `Report.models`; the first is the teacher.
        records (`Mapping[str, Sequence[Mapping]]`): Their records.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.

    Returns:
        `list[dict]`: `model`, `baseline`, `task`, `metric`, the values of `significance.Difference`, and a `sentence`.
    """
    names, found = list(models), []
    arranged = {name: samples_of(rows) for name, rows in records.items()}
    pairs = [(model, baseline) for i, model in enumerate(names) for baseline in names[:i]]
    for model, baseline in pairs:
        for task, metric, entry in _measured(models[model]):
            if task == TEXT and "tokenizer" in (models[model] | models[baseline]) and metric == "perplexity":
                continue  # of other tokens
            ours, theirs = (_samples(arranged[name], entry.get("of", [task]), metric) for name in (model, baseline))
            shared = sorted(ours.keys() & theirs.keys())
            if len(shared) < 2:
                continue
            pair = [np.array([samples[key] for key in shared], dtype=float) for samples in (ours, theirs)]
            difference = compare_paired(*pair, entry["aggregation"], entry["higher_is_better"], seed)
            heading = {"model": model, "baseline": baseline, "task": task, "metric": metric}
            sentence = difference.sentence(model, baseline, metric if task == TEXT else f"{task} {metric}")
            found.append(heading | asdict(difference) | {"difference": difference.difference, "sentence": sentence})
    return found


def _measured(facts: Mapping) -> list[tuple[str, str, Mapping]]:
    """List a model's metrics that its records give."""
    text = {name: facts[name] for name in ("perplexity", "bits_per_byte")} | facts.get("agreement", {})
    entries = [(TEXT, metric, entry) for metric, entry in text.items()]
    entries += [(task, metric, entry) for task, metrics in facts["tasks"].items() for metric, entry in metrics.items()]
    return [entry for entry in entries if entry[2].get("aggregation")]


def _samples(arranged: Mapping, tasks: Sequence[str], metric: str) -> dict:
    """Return the samples of a task, or of a group's tasks together."""
    return {key: value for task in tasks for key, value in arranged.get((task, metric), {}).items()}
