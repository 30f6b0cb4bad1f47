"""A report in words: titles, digits, sentences and tables, all made when they are shown."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hf_minitron.checkpoint.model_files import HUB_ID
from hf_minitron.evaluation.report import TEXT, Comparison, Entry, Report
from hf_minitron.shape import Shape

# What metrics of held-out text are called; others are called by their names.
TITLES = {
    "perplexity": "perplexity", "bits_per_byte": "bits per byte", "top1_match": "top-1 match", "teacher_kl": "KL to teacher",
    "dropped_mass": "mass of dropped tokens",
}  # fmt: skip
# Percent of the teacher's score: more than this is no share of it, and an interval wider than that says little.
MOST_RETAINED, WIDEST = 110, 50
HEADLINES = 5  # metrics that a reader takes in at a glance
# Of several metrics of a task, the first of these says most: lm-eval's own order is the alphabet's.
PREFERRED = ("acc_norm", "exact_match", "acc")
ARROWS = {"higher": " ↑", "lower": " ↓"}
# What models are to their run; all others are there for comparison.
ROLES = {
    "teacher": "which was pruned", "corrected": "the teacher, fine-tuned first", "pruned": "the student before distillation",
    "distilled": "this model",
}  # fmt: skip
# What a run calls the models that it makes: the ends of their paths, behind the run's name.
MADE = {
    "correct/teacher": "fine-tuned teacher", "prune/student": "pruned student", "distill/student": "distilled student",
    "publish/model": "published student",
}  # fmt: skip


def title(task: str, metric: str) -> str:
    """Return what a metric of a task, or of held-out text, is called."""
    return TITLES.get(metric, metric) if task == TEXT else f"{task} {metric}"


def titles(report: Report, columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return what metrics are called, an arrow where better is."""
    directions = {(entry.task, entry.metric): entry.direction for entry in report.entries}
    return [title(*column) + ARROWS[directions[column]] for column in columns]


def scored(tokens: int, answers: bool) -> str:
    """Say on how many tokens a text was measured, and which where it is not all that have others before them."""
    return f"{tokens:,} tokens" + (" (the answers alone)" if answers else "")


def measured(entry: Entry | None) -> str:
    """Write a value with its standard error, both to the error's second digit."""
    if entry is None:
        return ""
    if not entry.stderr:
        return f"{entry.value:,.0f}" if abs(entry.value) >= 1000 else f"{entry.value:.3g}"
    digits = _digits(entry.stderr)
    return f"{entry.value:,.{digits}f} ± {entry.stderr:,.{digits}f}"


def with_interval(entry: Entry | None) -> str:
    """Write a value with its 95 % interval, to the second digit of its width; with its standard error where it has none."""
    if entry is None or entry.interval is None:
        return measured(entry)
    low, high = entry.interval
    digits = _digits(high - low)
    return f"{entry.value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def sentence(report: Report, found: Comparison) -> str:
    """Say a comparison of a report in plain words."""
    low, high = found.interval
    digits = _digits(high - low)
    metric = title(found.task, found.metric)
    words = (
        f"{found.value:,.{digits}f} against {found.baseline_value:,.{digits}f}, difference {found.difference:+,.{digits}f}, "
    )
    words += f"95 % interval {low:+,.{digits}f} to {high:+,.{digits}f}, "
    words += "p < 0.001" if found.p < 0.001 else f"p = {found.p:.2g}"
    if retained(report, found):
        words += f"; {found.retention:.1f} % retained"
    if found.verdict != "not distinguishable":
        return f"{found.model} is {found.verdict} than {found.baseline} on {metric} ({words})."
    needed = found.samples_needed
    more = f"; about {_rounded(needed):,} would be needed for a difference of this size" if needed else ""
    return (f"{found.model} and {found.baseline} are not distinguishable on {metric} with these {found.samples:,} samples "
            f"({words}){more}.")  # fmt: skip


def counted(parameters: int) -> str:
    """Write a number of parameters, in millions or billions where there are some."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:,.2f} B"
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e6 else f"{parameters:,}"


def sized(num_bytes: int) -> str:
    """Write a number of bytes with the unit that suits it."""
    unit, name = next((unit for unit in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= unit[0]), (1e3, "kB"))
    return f"{num_bytes / unit:,.1f} {name}"


def described(report: Report) -> dict[str, str]:
    """Say of every model of a report what it is: where it comes from, its parameters, and its part in the run."""
    found = {}
    for name, model in report.models.items():
        size, role = f"({counted(model['parameters'])} parameters)", ROLES.get(name, "for comparison")
        made_here = name in ROLES and name != "teacher"
        found[name] = f"{role} {size}" if made_here else f"{_origin(model)} {size}, {role}"
    return found


def _origin(model: Mapping[str, Any]) -> str:
    """Say where a model comes from: the Hub, a run, or a folder, of which the name is enough."""
    hub, path = model["path"].partition("@")[0], PurePath(model["path"])
    if "revision" in model and HUB_ID.fullmatch(hub):
        return f"[{hub}](https://huggingface.co/{hub}/tree/{model['revision']})"
    made, run = MADE.get("/".join(path.parts[-2:])), path.parent.parent.name
    if not made:
        return f"`{path.name}`"
    return f"the {made} of the run `{run}`" if run.strip(".") else f"the {made} of a run"


def quality_rows(report: Report) -> list[list[str]]:
    """Return the table of parameters, quality on text and task metrics: a header, then one row per model."""
    columns = _columns(report)
    rows = [["model", "parameters", *(title(*column) for column in columns)]]
    for name, model in report.models.items():
        cells = [measured(report.entry(name, metric, task)) for task, metric in columns]
        rows.append([name, counted(model["parameters"]), *cells])
    return rows


def headline(report: Report, most: int | None = HEADLINES) -> list[tuple[str, str]]:
    """Return the metrics, task and name, that say most of the distilled model: perplexity, then one of each task or group;
    more of the text where tasks are few.

    Args:
        report (`Report`): What was measured.
        most (`int` or `None`, *optional*, defaults to 5): How many; `None` for one of every task, and all of the text.
    """
    tasks: dict[str, list[str]] = {}
    for entry in report.headings("distilled"):
        tasks.setdefault(entry.task, []).append(entry.metric)
    of_text = tasks.pop(TEXT, [])
    text = [(TEXT, metric) for metric in TITLES if metric in of_text]
    best = [(task, next((name for name in PREFERRED if name in names), names[0])) for task, names in tasks.items()]
    chosen = [*text[:1], *best, *text[1:]][:most]
    return sorted(chosen, key=lambda column: column[0] != TEXT)


def retained(report: Report, found: Comparison) -> bool:
    """Return whether the share of a score that a comparison retains says something: it is the teacher's, who is better than
    chance, and the share is no more than nearly all of it, its interval not wider than half of it.
    """
    return _above_chance(report, found) and _useful(found.retention, *found.retention_interval)


def _above_chance(report: Report, found: Comparison) -> bool:
    """Return whether a comparison is with the teacher, whose score is better when higher and with its interval above chance."""
    entry = report.entry(found.baseline, found.metric, found.task)
    if found.baseline != "teacher" or found.retention_interval is None or entry is None:
        return False
    return (entry.interval or (entry.value,))[0] > (entry.chance or 0)


def _useful(share: float, low: float, high: float) -> bool:
    return share <= MOST_RETAINED and high - low <= WIDEST


def kept(report: Report) -> tuple[float, float, float, str] | None:
    """Return the share of the teacher's quality that is kept, in percent, its 95 % interval, and what it is a share of.

    It is the mean of the headline tasks' retentions, whose samples are independent, of those in which the teacher is above
    chance; else of the tokens both models agree on.
    """
    shown = set(headline(report))
    tasks = [c for c in report.against("teacher", "distilled") if (c.task, c.metric) in shown and c.retention is not None]
    found = [c for c in tasks if _above_chance(report, c)]
    if found:
        mean, count = sum(c.retention for c in found) / len(found), len(found)
        down, up = (math.sqrt(sum((c.retention_interval[side] - c.retention) ** 2 for c in found)) / count for side in range(2))
        names = title(found[0].task, found[0].metric) if count == 1 else f"mean of {count} tasks"
        left = len(tasks) - count
        names += f"; not of {left} task{'s' if left > 1 else ''}, where the teacher is not above chance" if left else ""
        if _useful(mean, mean - down, mean + up):
            return mean, mean - down, mean + up, f"of the teacher's score, {names}"
    match = report.entry("distilled", "top1_match")
    if match is None or match.interval is None:
        return None
    some = ", of the tokens that both have" if report.models["distilled"].get("tokenizer") else ""
    return (100 * match.value, *(100 * bound for bound in match.interval), f"of tokens are predicted as by the teacher{some}")


def faster(report: Report) -> tuple[float, float] | None:
    """Return how many times as fast as the teacher the distilled model decodes, the least and the most of all settings."""
    pairs = zip(report.speed.get("teacher", ()), report.speed.get("distilled", ()), strict=False)
    ratios = [ours["decode"]["value"] / theirs["decode"]["value"] for theirs, ours in pairs]
    return (min(ratios), max(ratios)) if ratios else None


def of_the_run(report: Report) -> list[str]:
    """Return the teacher, its student before and after distillation, and of the other models the one nearest in size to it."""
    own = [name for name in ("teacher", "pruned", "distilled") if name in report.models]
    sizes = {name: model["parameters"] for name, model in report.models.items() if name not in ROLES}
    target = report.models[own[-1]]["parameters"]
    return own + sorted(sizes, key=lambda name: abs(sizes[name] - target))[:1]


def metric_rows(
    report: Report, models: Sequence[str] | None = None, columns: Sequence[tuple[str, str]] | None = None
) -> list[list[str]]:
    """Return the table of quality with 95 % intervals: a header, then one row per metric, an arrow where better is.

    Args:
        report (`Report`): What was measured.
        models (`Sequence[str]`, *optional*): The models to show; all when left out.
        columns (`Sequence[tuple[str, str]]`, *optional*): The metrics to show, task and name; all when left out.
    """
    models = report.models if models is None else models
    columns = _columns(report) if columns is None else columns
    rows = [["metric", *models]]
    for name, (task, metric) in zip(titles(report, columns), columns, strict=True):
        rows.append([name, *(with_interval(report.entry(model, metric, task)) for model in models)])
    return rows


def _columns(report: Report) -> list[tuple[str, str]]:
    """List what any model was measured by, task and metric: held-out text first."""
    return sorted({(e.task, e.metric): None for e in report.entries}, key=lambda column: column[0] != TEXT)


def size_rows(report: Report, cut: Mapping[str, Any] | None) -> list[list[str]]:
    """Return the table of sizes: a header, then one row per model; the KV cache where the shape is known from the plan."""
    rows = [["model", "parameters", "weights on disk", "dtype", *(["KV cache per token"] if cut else [])]]
    for name, model in report.models.items():
        row = [name, counted(model["parameters"]), sized(model["bytes"]), model["dtype"]]
        side = {"teacher": "before", "corrected": "before", "pruned": "after", "distilled": "after"}.get(name)
        rows.append(row + ([sized(_cache_bytes(cut, side)) if side else ""] if cut else []))
    return rows


def _cache_bytes(cut: Mapping[str, Any], side: str) -> int:
    """Count the bytes that a token adds to the KV cache, two for every number."""
    windows, by_layer = (cut.get(key, {}).get(side, {}) for key in ("windows", "layer_sizes"))
    return Shape(cut[side], windows=tuple(windows), by_layer=by_layer).kv_cache_bytes_per_token(2)


def speed_rows(report: Report) -> list[list[str]]:
    """Return the table of speed: a header, then one row per setting and model."""
    every = [case for cases in report.speed.values() for case in cases]
    more = {"first_token": "first token, ms", "peak_bytes": "peak memory, MB"}
    more = {kind: name for kind, name in more.items() if any(case.get(kind) for case in every)}
    rows = [["model", "batch x prompt", "prefill, tokens/s", "decode, tokens/s", *more.values()]]
    for cases in zip(*report.speed.values(), strict=True):  # models side by side
        for name, case in zip(report.speed, cases, strict=True):
            cells = [f"{case[kind]['value']:,.0f}" for kind in ("prefill", "decode")]
            cells += [f"{1e3 * case['first_token']['value']:,.0f}"] if "first_token" in more else []
            cells += [f"{case['peak_bytes'] / 1e6:,.0f}" if case["peak_bytes"] else ""] if "peak_bytes" in more else []
            rows.append([name, f"{case['batch_size']} x {case['prompt']}", *cells])
    return rows


def comparison_rows(report: Report, model: str = "distilled", baseline: str = "teacher") -> list[list[str]]:
    """Return the table of paired differences, or no rows where there are none: a header, then one row per metric."""
    rows = [["metric", "difference", "95 % interval", "p", "retained", "verdict"]]
    for found in report.against(baseline, model):
        low, high = found.interval
        digits = _digits(high - low)
        share = (found.retention, *(found.retention_interval or ()))
        kept = "{:.1f} % ({:.1f} to {:.1f})".format(*share) if retained(report, found) else ""
        p = "< 0.001" if found.p < 0.001 else f"{found.p:.2g}"
        span = f"{low:+,.{digits}f} to {high:+,.{digits}f}"
        difference = f"{found.difference:+,.{digits}f}"
        rows.append([title(found.task, found.metric), difference, span, p, kept, found.verdict])
    return rows if len(rows) > 1 else []


def _digits(width: float) -> int:
    """Return the decimals that show two digits of a width."""
    return max(0, 1 - math.floor(math.log10(width))) if math.isfinite(width) and width > 1e-9 else 3


def _rounded(count: int) -> int:
    """Return a number with two digits that count."""
    return round(count, 1 - math.floor(math.log10(count)))
