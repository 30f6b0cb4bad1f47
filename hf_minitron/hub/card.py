"""The model card: from facts only (report, plan, recipe, training log), rendered by huggingface_hub.

It must not measure anything: a number that is not in its inputs is not in the card.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import hf_minitron
from hf_minitron.evaluation.report import TEXT, Report
from hf_minitron.hub.training_card import TAGS
from hf_minitron.shape import Shape

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(
    report: Report, before: Shape, after: Shape, recipe: Mapping[str, Any], command: str, log: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> ModelCard:  # fmt: skip
    """Render the card of a distilled model.

    Args:
        report (`Report`): Quality and speed of `teacher`, `pruned` and `distilled`.
        before (`Shape`): The teacher's shape.
        after (`Shape`): The student's shape.
        recipe (`Mapping`): The recipe with all overrides.
        command (`str`): What was typed to make the model.
        log (`Mapping`): The training log: `tokens` and `history`.
        facts (`Mapping`): `name`, `base_model`, and where known `license`, `license_name`, `license_link`, `language`,
            `datasets`, `notes`, the `pictures` beside the card (name to file), `remote_code`, whether code lies beside it;
            `between`, the student of `base_model` that was pruned in its place, `teacher` where it is another, and whether
            it was `corrected`.

    Returns:
        `ModelCard`: Ready to `save` as README.md.
    """
    metadata = {
        key: facts[key] for key in ("license", "license_name", "license_link", "language", "datasets") if facts.get(key)
    }
    data = ModelCardData(
        base_model=facts["base_model"],
        base_model_relation="finetune",  # the nearest that the Hub documents; the tags tell the rest
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=facts["name"],
        tags=TAGS,
        eval_results=_eval_results(report, facts["name"]),
        **metadata,
    )
    return ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        facts=facts,
        command=command,
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False).strip(),
        shape_rows=[(axis, before[axis], after[axis]) for axis in before.axes],
        quality=markdown_table(quality_rows(report)),
        speed=markdown_table(speed_rows(report)) if report.speed else "",
        comparisons=markdown_table(comparison_rows(report)) if report.against("teacher", "distilled") else "",
        sentences=[found["sentence"] for found in report.against("teacher", "distilled")],
        text=report.text,
        training=_training(log),
        parameters={name: model["parameters"] for name, model in report.models.items()},
        version=hf_minitron.__version__,
    )


def quality_rows(report: Report) -> list[list[str]]:
    """Return the table of parameters, quality on text and task metrics: a header, then one row per model."""
    text = {"perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    text = {key: title for key, title in text.items() if any(key in model for model in report.models.values())}
    agreement = {"top1_match": "top-1 match", "teacher_kl": "KL to teacher"}
    agreement = {k: title for k, title in agreement.items() if any(k in m.get("agreement", {}) for m in report.models.values())}
    tasks = {(t, m): None for model in report.models.values() for t, metrics in model["tasks"].items() for m in metrics}
    titles = [*text.values(), *agreement.values(), *(f"{task} {metric}" for task, metric in tasks)]
    rows = [["model", "parameters", *titles]]
    for name, model in report.models.items():
        entries = [model.get(key) for key in text] + [model.get("agreement", {}).get(key) for key in agreement]
        entries += [model["tasks"].get(task, {}).get(metric) for task, metric in tasks]
        rows.append([name, f"{model['parameters'] / 1e6:,.1f} M", *map(measured, entries)])
    return rows


def speed_rows(report: Report) -> list[list[str]]:
    """Return the table of speed: a header, then one row per setting and model."""
    kinds = {"prefill": "prefill, tokens/s", "decode": "decode, tokens/s"}
    more = {"first_token": "first token, ms", "peak_bytes": "peak memory, MB"}
    every = [entry for entries in report.speed.values() for entry in entries]
    more = {kind: title for kind, title in more.items() if any(entry.get(kind) for entry in every)}
    rows = [["model", "batch x prompt", *kinds.values(), *more.values()]]
    for cases in zip(*report.speed.values(), strict=True):  # models side by side
        for name, case in zip(report.speed, cases, strict=True):
            cells = [f"{case[kind]['value']:,.0f}" for kind in kinds]
            cells += [f"{1e3 * case['first_token']['value']:,.0f}"] if "first_token" in more else []
            cells += [f"{(case['peak_bytes'] or 0) / 1e6:,.0f}"] if "peak_bytes" in more else []
            rows.append([name, f"{case['batch_size']} x {case['prompt']}", *cells])
    return rows


def comparison_rows(report: Report, model: str = "distilled", baseline: str = "teacher") -> list[list[str]]:
    """Return the table of paired differences, or no rows where there are none: a header, then one row per metric."""
    rows = [["metric", "difference", "95 % interval", "p", "retained", "verdict"]]
    for found in report.against(baseline, model):
        low, high = found["interval"]
        digits = max(0, 1 - math.floor(math.log10(high - low))) if high > low else 3
        name = found["metric"] if found["task"] == TEXT else f"{found['task']} {found['metric']}"
        kept = "" if found["retention"] is None else f"{found['retention']:.1f} %"
        if found["retention_interval"]:
            kept += " ({:.1f} to {:.1f})".format(*found["retention_interval"])
        p = "< 0.001" if found["p"] < 0.001 else f"{found['p']:.2g}"
        span = f"{low:+,.{digits}f} to {high:+,.{digits}f}"
        rows.append([name, f"{found['difference']:+,.{digits}f}", span, p, kept, found["verdict"]])
    return rows if len(rows) > 1 else []


def measured(entry: Mapping[str, float] | None) -> str:
    """Write a value with its standard error, both to the error's second digit."""
    if entry is None:
        return ""
    value, stderr = entry["value"], entry["stderr"]
    if not math.isfinite(stderr) or stderr == 0:
        return f"{value:,.3g}"
    digits = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:,.{digits}f} ± {stderr:,.{digits}f}"


def markdown_table(rows: list[list[str]]) -> str:
    """Write rows, the first of them a header, as a Markdown table with aligned columns: names left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _training(log: Mapping[str, Any]) -> dict[str, Any]:
    steps = [entry for entry in log["history"] if "loss" in entry]
    summary = next((entry for entry in log["history"] if "train_runtime" in entry), {})
    return {
        "tokens": log["tokens"],
        "steps": steps[-1]["step"] if steps else 0,
        "first_loss": steps[0]["loss"] if steps else None,
        "last_loss": steps[-1]["loss"] if steps else None,
        "minutes": summary.get("train_runtime", 0) / 60,
    }


def _eval_results(report: Report, name: str) -> list[EvalResult]:
    """Return the distilled model's task results in the form of the Hub's model index."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_value=entry["value"],
        )
        for task, metrics in report.models["distilled"]["tasks"].items()
        for metric, entry in metrics.items()
    ]


def load_log(path: Path) -> dict:
    """Read the training log that the distill stage wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
