"""The model card: from facts only (report, recipe, training log, and what `hub.facts` gathers), rendered by huggingface_hub.

It must not measure anything: a number that is not in its inputs is not in the card.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.evaluation.report import TEXT, Report
from hf_minitron.hub.training_card import TAGS
from hf_minitron.shape import Shape
from hf_minitron.yaml_text import dump_yaml

TEMPLATE = Path(__file__).with_name("card_template.md")
# lm-eval's task to the benchmark that the Hub has registered (https://huggingface.co/docs/hub/eval-results), its task there and
# the metric. GPQA and HLE are left out: published results do not agree on the one's task id, and lm-eval has not the other.
BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "gsm8k", "exact_match"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match"),
}
# What held-out text gives: metric to its words.
TITLES = {"perplexity": "perplexity", "bits_per_byte": "bits per byte"}
AGREEMENT = {"top1_match": "top-1 match", "teacher_kl": "KL to teacher"}
NOT_LOSSES = ("loss", "step", "epoch", "grad_norm", "learning_rate", "num_tokens", "num_input_tokens_seen")


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
        pipeline_tag="text-generation",
        model_name=facts["name"],
        tags=TAGS,
        eval_results=_eval_results(report) if report else None,
        **{key: facts[key] for key in wanted if facts.get(key)},
    )
    found = report.against("teacher", "distilled") if report else []
    return ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        facts=facts,
        recipe=recipe,
        recipe_text=dump_yaml(dict(recipe)).strip(),
        report=report,
        shape_rows=_shape_rows(facts["cut"]) if facts.get("cut") else [],
        sizes=markdown_table(size_rows(report, facts.get("cut"))) if report else "",
        quality=markdown_table(metric_rows(report)) if report else "",
        speed=markdown_table(speed_rows(report)) if report and report.speed else "",
        comparisons=markdown_table(comparison_rows(report)) if found else "",
        sentences=[comparison["sentence"] for comparison in found],
        others=_other_sentences(report) if report else [],
        machine=(log or {}).get("machine") or {},
        training=_training(log, recipe.get("distill") or {}) if log else None,
    )


def quality_rows(report: Report) -> list[list[str]]:
    """Return the table of parameters, quality on text and task metrics: a header, then one row per model."""
    text = {key: title for key, title in TITLES.items() if any(key in model for model in report.models.values())}
    agreement = {k: title for k, title in AGREEMENT.items() if any(k in m.get("agreement", {}) for m in report.models.values())}
    tasks = {(t, m): None for model in report.models.values() for t, metrics in model["tasks"].items() for m in metrics}
    titles = [*text.values(), *agreement.values(), *(f"{task} {metric}" for task, metric in tasks)]
    rows = [["model", "parameters", *titles]]
    for name, model in report.models.items():
        entries = [model.get(key) for key in text] + [model.get("agreement", {}).get(key) for key in agreement]
        entries += [model["tasks"].get(task, {}).get(metric) for task, metric in tasks]
        rows.append([name, f"{model['parameters'] / 1e6:,.1f} M", *map(measured, entries)])
    return rows


def metric_rows(report: Report) -> list[list[str]]:
    """Return the table of quality with 95 % intervals: a header, then one row per metric, an arrow where better is."""
    rows = [["metric", *report.models]]
    for task, metric in _metrics(report):
        entries = [_entry(model, task, metric) for model in report.models.values()]
        higher = next((e["higher_is_better"] for e in entries if e and "higher_is_better" in e), None)
        arrow = {None: "", True: " ↑", False: " ↓"}[False if task == TEXT and higher is None else higher]
        title = {"top1_match": "top-1 match", "teacher_kl": "KL to teacher", "bits_per_byte": "bits per byte"}.get(
            metric, metric
        )
        rows.append([(title if task == TEXT else f"{task} {metric}") + arrow, *map(_with_interval, entries)])
    return rows


def size_rows(report: Report, cut: Mapping[str, Any] | None) -> list[list[str]]:
    """Return the table of sizes: a header, then one row per model; the KV cache where the shape is known from the plan."""
    rows = [["model", "parameters", "weights on disk", *(["KV cache per token"] if cut else [])]]
    for name, model in report.models.items():
        row = [name, f"{model['parameters'] / 1e6:,.1f} M", f"{model['bytes'] / 1e6:,.1f} MB" if "bytes" in model else ""]
        side = {"teacher": "before", "corrected": "before", "pruned": "after", "distilled": "after"}.get(name)
        rows.append(row + ([f"{_cache_bytes(cut, side) / 1e3:,.1f} kB" if side else ""] if cut else []))
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
        metric = found["metric"]
        name = (TITLES | AGREEMENT).get(metric, metric) if found["task"] == TEXT else f"{found['task']} {metric}"
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


def _other_sentences(report: Report) -> list[str]:
    """List what was found between the distilled student and all but the teacher."""
    pairs = [({found["model"], found["baseline"]}, found["sentence"]) for found in report.comparisons]
    return [sentence for pair, sentence in pairs if "distilled" in pair and "teacher" not in pair]


def _with_interval(entry: Mapping[str, Any] | None) -> str:
    """Write a value with its 95 % interval, to the second digit of its width; with its standard error where it has none."""
    if entry is None or not entry.get("interval"):
        return measured(entry)
    low, high = entry["interval"]
    digits = max(0, 1 - math.floor(math.log10(high - low))) if high > low else 3
    return f"{entry['value']:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _metrics(report: Report) -> list[tuple[str, str]]:
    """List what any model was measured by: task, or `TEXT`, and metric."""
    models = report.models.values()
    found = [(TEXT, metric) for metric in TITLES | AGREEMENT if any(_entry(model, TEXT, metric) for model in models)]
    return found + list({(t, m): None for model in models for t, metrics in model["tasks"].items() for m in metrics})


def _entry(model: Mapping[str, Any], task: str, metric: str) -> dict | None:
    if task != TEXT:
        return model["tasks"].get(task, {}).get(metric)
    return model.get(metric) or model.get("agreement", {}).get(metric)


def _cache_bytes(cut: Mapping[str, Any], side: str) -> int:
    """Count the bytes that a token adds to the KV cache, two for every number."""
    shape, by_layer = Shape(cut[side]), cut["by_layer"] if side == "after" else {}
    groups = by_layer.get("kv_heads") or by_layer.get("heads")
    return 4 * sum(groups) * shape["head_dim"] if groups else shape.kv_cache_bytes_per_token(2)


def markdown_table(rows: list[list[str]]) -> str:
    """Write rows, the first of them a header, as a Markdown table with aligned columns: names left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _shape_rows(cut: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List every axis with its size before and after; after from the least to the most of the layers that stay."""
    before, after, rows = Shape(cut["before"]), Shape(cut["after"]), []
    for axis, size in before.axes.items():
        found = {n for layer, n in enumerate(cut["by_layer"].get(axis, [])) if layer not in cut["dropped"]} or {after[axis]}
        span = f"{min(found)} to {max(found)}" if len(found) > 1 else str(max(found))
        rows.append((axis, str(size), span if found == {size} else f"**{span}**"))
    return rows


def loss_parts(log: Mapping[str, Any]) -> list[str]:
    """Return the names of the losses whose sum was trained on, where there are several."""
    names = {key: None for entry in log["history"] if "loss" in entry for key in entry if key not in NOT_LOSSES}
    return list(names) if len(names) > 1 else []


def _training(log: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    steps = [entry for entry in log["history"] if "loss" in entry]
    measured = [entry["eval_loss"] for entry in log["history"] if "eval_loss" in entry]
    summary = next((entry for entry in log["history"] if "train_runtime" in entry), {})
    losses, usual = section.get("losses"), DistillationArguments.__dataclass_fields__["losses"].default_factory()
    names, ends = ["loss", *loss_parts(log)], [steps[0], steps[-1]] if steps else []
    return {
        "tokens": log["tokens"],
        "steps": steps[-1]["step"] if steps else 0,
        "losses": [(name, *(f"{end[name]:.3f}" if name in end else "" for end in ends)) for name in names if ends],
        "eval_losses": [f"{loss:.3f}" for loss in measured],
        "hours": summary["train_runtime"] / 3600 if "train_runtime" in summary else None,
        "weights": losses if isinstance(losses, Mapping) else usual,
        "lora": section.get("lora"),
    }


def _eval_results(report: Report) -> list[EvalResult]:
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
        entry = report.models["distilled"]["tasks"].get(task, {}).get(metric)
        if entry and task in section.get("tasks", []):
            shots = "the task's own examples" if settings.get("few_shot") is None else f"{settings['few_shot']}-shot"
            notes = f"lm-eval {task}, {shots}" + (", chat template" if settings.get("chat_template") else "")
            found = EvalResultEntry(dataset, benchmark, round(100 * entry["value"], 2), notes=notes)
            text = dump_yaml(eval_result_entries_to_yaml([found]))
            files[f".eval_results/{task}.yaml"] = text
    return files


def load_log(path: Path) -> dict:
    """Read the training log that the distill stage wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
