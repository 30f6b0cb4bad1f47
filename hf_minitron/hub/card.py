"""The model card: from facts only (report, recipe, training log, and what `hub.facts` gathers), rendered by huggingface_hub.

A number that is not in its inputs is not in the card.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from hf_minitron.distillation.training_card import TAGS
from hf_minitron.evaluation.answers import verbatim
from hf_minitron.evaluation.report import TEXT, Report
from hf_minitron.evaluation.wording import (
    ROLES,
    comparison_rows,
    counted,
    described,
    faster,
    headline,
    kept,
    metric_rows,
    of_the_run,
    scored,
    sentence,
    size_rows,
    sized,
    speed_rows,
    title,
    titles,
)
from hf_minitron.export.compare import export_rows
from hf_minitron.export.layouts import MLX
from hf_minitron.shape import Shape
from hf_minitron.tables import code, markdown_table
from hf_minitron.yaml_text import dump_yaml

TEMPLATE = Path(__file__).with_name("card_template.md")
MOST_TEXTS = 5  # that are named before the recipe, which names all
# lm-eval's task to the benchmark that the Hub has registered (https://huggingface.co/docs/hub/eval-results), its task there and
# the metric. GPQA and HLE are left out: published results do not agree on the one's task id, and lm-eval has not the other.
BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "gsm8k", "exact_match"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match"),
}


def write_card(
    report: Report | None, recipe: Mapping[str, Any], log: Mapping[str, Any] | None, facts: Mapping[str, Any]
) -> ModelCard:
    """Render the card of a run's student.

    Args:
        report (`Report` or `None`): Quality and speed of `teacher`, `pruned` and `distilled`; `None` before they are measured.
        recipe (`Mapping`): The recipe with all overrides.
        log (`Mapping` or `None`): The training log: `tokens`, `history` and `machine`; `None` before training.
        facts (`Mapping`): What `hub.facts.gather` returns, and the `pictures` beside the card (name to file).

    Returns:
        `ModelCard`: Ready to `save` as README.md. What is not known is said to be so.
    """
    wanted = ("base_model", "license", "license_name", "license_link", "language", "datasets")
    data = ModelCardData(
        base_model_relation="finetune" if facts.get("base_model") else None,  # the nearest that the Hub documents
        library_name="transformers",
        pipeline_tag=facts.get("pipeline_tag", "text-generation"),
        model_name=facts["name"],
        tags=TAGS,
        eval_results=(_eval_results(report) or None) if report else None,
        **{key: facts[key] for key in wanted if facts.get(key)},
    )
    compared, shown = (report.comparisons, of_the_run(report)) if report else ((), [])
    found, hashes = report.against("teacher", "distilled") if report else [], facts.get("hashes")
    return ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        facts=facts,
        recipe=recipe,
        recipe_text=dump_yaml(dict(recipe)).strip(),
        report=report,
        at_a_glance=at_a_glance(report, log) if report else [],
        headline=markdown_table(metric_rows(report, shown, headline(report))) if report else "",
        described=described(report) if report else {},
        others_shown=[name for name in shown if name not in ROLES],
        verdicts=_verdicts(report) if report else {},
        shapes=markdown_table([("axis", "before", "after"), *_shape_rows(facts["cut"])]) if facts.get("cut") else "",
        sizes=markdown_table(size_rows(report, facts.get("cut"))) if report else "",
        quality=markdown_table(metric_rows(report)) if report else "",
        speed=markdown_table(speed_rows(report)) if report and report.speed else "",
        comparisons=markdown_table(comparison_rows(report)) if found else "",
        sentences=[sentence(report, comparison) for comparison in found],
        others=[sentence(report, c) for c in compared if "distilled" in (c.model, c.baseline) and c.baseline != "teacher"],
        answers=_answers(report) if report else [],
        hashes=markdown_table([("file", "SHA-256"), *((code(name), code(sha)) for name, sha in hashes.items())])
        if hashes
        else "",
        code=code,
        spans=spans,
        counted=counted,
        scored=scored,
        machine=(log or {}).get("machine") or {},
        exports=markdown_table(export_rows(facts["export"])) if facts.get("export") else "",
        loaded=_loaded(facts["export"]) if facts.get("export") else [],
        training=_training(log, recipe.get("distill") or {}) if log else None,
    )


def _loaded(export: Mapping[str, Any]) -> list[str]:
    """Return of the exported files that were loaded the smallest GGUF file, and MLX's."""
    loaded = [file["file"] for file in export["files"] if "runtime" in file]
    return [file for file in loaded if file != MLX][-1:] + [file for file in loaded if file == MLX]


def _answers(report: Report) -> list[tuple[str, dict[str, str]]]:
    """Return each prompt, and what every model writes after it."""
    return [
        (verbatim(row["prompt"]), {name: verbatim(text) for name, text in row.items() if name != "prompt"})
        for row in report.answers
    ]


def at_a_glance(report: Report, log: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return the four facts that a reader looks for first, those that are known: size, speed, quality kept, training."""
    teacher, student = (report.models[name] for name in ("teacher", "distilled"))
    share = f"{student['parameters'] / teacher['parameters']:.0%} of the teacher's parameters"
    rows = [
        (
            "Size",
            f"{counted(student['parameters'])} parameters, {share}; {sized(student['bytes'])} in {student['dtype']}",
        )
    ]
    if times := faster(report):
        span = " to ".join(dict.fromkeys(f"{value:.2f}" for value in times))
        rows.append(
            (
                "Speed",
                f"decodes {span} times as fast as the teacher on {report.machine.get('hardware', 'the machine that made it')}",
            )
        )
    if share := kept(report):
        value, low, high, of = share
        rows.append(("Quality kept", f"{value:.0f} % ({low:.0f} to {high:.0f}) {of}"))
    if log:
        rows.append(("Distillation", f"{log['tokens']:,} tokens{repeats(log)}"))
    return rows


def repeats(log: Mapping[str, Any]) -> str:
    """Say how often the packed text was read; nothing where no sequence of it was read twice."""
    seen, packed = log["tokens"], log.get("packed_tokens") or log["tokens"]
    return f", {packed:,} of packed text read {seen / packed:.1f} times" if seen > packed else ""


def _verdicts(report: Report) -> dict[str, list[str]]:
    """Group the headline metrics by how the distilled model stands beside the teacher."""
    shown, found = headline(report), {}
    for comparison in report.against("teacher", "distilled"):
        if (comparison.task, comparison.metric) in shown:
            found.setdefault(comparison.verdict, []).append(title(comparison.task, comparison.metric))
    return {verdict: found[verdict] for verdict in ("better", "not distinguishable", "worse") if verdict in found}


def forest(report: Report) -> dict[str, tuple[str, float, float, float]]:
    """Return what one picture can show of the comparisons with the teacher, by title: verdict, difference in percent of the
    teacher's value and the ends of its interval; of held-out text, and of one metric a task.

    Perplexities have no scale in common with them; bits per byte say the same on one that has.
    """
    columns, found = headline(report, None), {(c.task, c.metric): c for c in report.against("teacher", "distilled")}
    rows = {}
    for name, (task, metric) in zip(titles(report, columns), columns, strict=True):
        comparison = found.get((task, metric))
        if comparison and comparison.baseline_value and "perplexity" not in metric:
            entry = report.entry("distilled", metric, task)
            rows[name] = (comparison.verdict, *comparison.relative(entry.aggregation))
    return rows


def scatter(report: Report) -> dict[str, tuple[float, float, float, float]]:
    """Return the parameters and the bits per byte, with their interval, of each model; nothing where all have one size."""
    found = {name: report.entry(name, "bits_per_byte") for name in report.models}
    known = {name: entry for name, entry in found.items() if entry and entry.interval}
    points = {name: (report.models[name]["parameters"], entry.value, *entry.interval) for name, entry in known.items()}
    return points if len({parameters for parameters, *_ in points.values()}) > 1 else {}


def _shape_rows(cut: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List every axis with its size before and after; after from the least to the most of the layers that stay."""
    before, after, rows = Shape(cut["before"]), Shape(cut["after"]), []
    for axis, size in before.axes.items():
        sizes = {n for layer, n in enumerate(cut["by_layer"].get(axis, [])) if layer not in cut["dropped"]} or {after[axis]}
        span = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else str(max(sizes))
        rows.append((axis, str(size), span if sizes == {size} else f"**{span}**"))
    return rows


def spans(numbers: Sequence[int]) -> list[str]:
    """Write rising numbers, three or more in a row by the first and the last of them."""
    rows = [[number for _, number in row] for _, row in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [text for row in rows for text in ([f"{row[0]} to {row[-1]}"] if len(row) > 2 else map(str, row))]


def loss_parts(log: Mapping[str, Any]) -> list[str]:
    """Return the names of the losses whose sum was trained on, where there are several."""
    logged = {key for entry in log["history"] if "loss" in entry for key in entry}
    names = [name for name in log["losses"] if name in logged]
    return names if len(names) > 1 else []


def _training(log: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    steps = [entry for entry in log["history"] if "loss" in entry]
    summary = next((e for e in reversed(log["history"]) if "train_runtime" in e and "loss" not in e), {})
    names, ends = ["loss", *loss_parts(log)], [steps[0], steps[-1]] if steps else []
    return {
        **{key: log.get(key) for key in ("tokens", "steps", "precision", "resumed", "best")},
        "again": repeats(log),
        "losses": [(name, *(f"{end[name]:.3f}" if name in end else "" for end in ends)) for name in names if ends],
        "eval_losses": [f"{entry['eval_loss']:.3f}" for entry in log["history"] if "eval_loss" in entry],
        "hours": summary["train_runtime"] / 3600 if summary else None,
        "weights": log["losses"],
        "lora": section.get("lora"),
        **_texts(section.get("text")),
    }


def _texts(text: Any) -> dict[str, Any]:
    """Return what a recipe trains on: the largest `texts`, and the share of each where there are several; and what is left."""
    if not isinstance(text, Mapping):
        return {"texts": {str(name): "" for name in ([text] if isinstance(text, str) else text or [])}, "other_texts": ""}
    weights = {name: value.get("weight") if isinstance(value, Mapping) else value for name, value in text.items()}
    whole = sum(weights.values())
    shown = sorted(weights, key=weights.get, reverse=True)[:MOST_TEXTS]
    left, rest = len(weights) - len(shown), 1 - sum(weights[name] for name in shown) / whole
    others = f" and {left} other{'s' if left > 1 else ''} ({rest:.0%})" if left else ""
    return {"texts": {name: f"{weights[name] / whole:.0%}" for name in shown}, "other_texts": others}


def _eval_results(report: Report) -> list[EvalResult]:
    """Return the distilled model's task results in the form of the Hub's model index: of a group of tasks its own; numbers."""
    results = []
    for entry in report.headings("distilled"):
        if entry.task == TEXT or not math.isfinite(entry.value):
            continue
        path, config, split = entry.dataset or (entry.task, None, None)
        error = {"stderr": entry.stderr} if entry.stderr is not None and math.isfinite(entry.stderr) else None
        results.append(
            EvalResult(
                "text-generation",
                path,
                entry.task,
                entry.metric,
                entry.value,
                dataset_config=config,
                dataset_split=split,
                metric_args=error,
            )  # fmt: skip
        )
    return results


def benchmark_files(report: Report, section: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of `.eval_results/`: what the distilled model reached, in percent, on benchmarks that the Hub knows.

    Args:
        report (`Report`): What was measured.
        section (`Mapping`): The recipe's `evaluate:` section. Only whole tasks count, and only lm-eval's own.

    Returns:
        `dict[str, str]`: Path to YAML text; none where nothing fits.
    """
    files, settings = {}, report.settings
    whole = "limit" in settings and settings["limit"] is None and section.get("include_path") is None
    for task, (dataset, benchmark, metric) in BENCHMARKS.items() if whole else ():
        entry = report.entry("distilled", metric, task)
        if entry and task in section.get("tasks", []):
            shots = "the task's own examples" if settings.get("few_shot") is None else f"{settings['few_shot']}-shot"
            notes = f"lm-eval {task}, {shots}" + (", chat template" if settings.get("chat_template") else "")
            result = EvalResultEntry(dataset, benchmark, round(100 * entry.value, 2), notes=notes)
            text = dump_yaml(eval_result_entries_to_yaml([result]))
            files[f".eval_results/{task}.yaml"] = text
    return files
