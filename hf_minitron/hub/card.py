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
from hf_minitron.evaluation.compare import Report
from hf_minitron.shape import Shape

TEMPLATE = Path(__file__).with_name("card_template.md")
TAGS = ["hf_minitron", "minitron", "pruning", "structured-pruning", "knowledge-distillation"]


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
            `datasets`, `notes` and the `pictures` beside the card (name to file); `between`, the student of `base_model` that
            was pruned in its place, `teacher` where it is another model, and whether it was `corrected`.

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
        text=report.text,
        training=_training(log),
        parameters={name: model["parameters"] for name, model in report.models.items()},
        version=hf_minitron.__version__,
    )


def quality_rows(report: Report) -> list[list[str]]:
    """Return the table of parameters, perplexity and task metrics: a header, then one row per model."""
    tasks = {(t, m): None for model in report.models.values() for t, metrics in model["tasks"].items() for m in metrics}
    rows = [["model", "parameters", "perplexity", *(f"{task} {metric}" for task, metric in tasks)]]
    for name, model in report.models.items():
        cells = [measured(model["tasks"].get(task, {}).get(metric)) for task, metric in tasks]
        rows.append([name, f"{model['parameters'] / 1e6:,.1f} M", measured(model["perplexity"]), *cells])
    return rows


def speed_rows(report: Report) -> list[list[str]]:
    """Return the table of tokens per second: a header, then one row per model."""
    kinds = list(next(iter(report.speed.values())))
    rows = [["model", *(f"{kind}, tokens/s" for kind in kinds)]]
    return rows + [[name, *(f"{speeds[kind]:,.0f}" for kind in kinds)] for name, speeds in report.speed.items()]


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
