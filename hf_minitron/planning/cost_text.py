"""What a recipe takes, in words: a row per stage, whether it fits, and what to change where it does not."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_minitron.planning.costs import CHECKPOINTING, CONTEXT, GB, Cost, Machine, Models, costs, training_cost, training_of
from hf_minitron.tables import markdown_table

# Adapters, where there is no memory to train all weights.
ADAPTERS = {CHECKPOINTING: True, "per_device_train_batch_size": 1, "lora": {}, "base_dtype": "bfloat16"}
# What to do about a stage that does not train and does not fit.
OTHERWISE = {
    "score": "set score.batch_size: 1",
    "prune": "lower prune.sequential_tokens, where sequential is true, or take GPUs with more memory",
    "cache": "set cache.batch_size: 1",
    "evaluate": "accelerate launch with evaluate.tensor_parallel: true",
}


def fitting(recipe: Mapping[str, Any], stage: str, models: Models, machine: Machine) -> str:
    """Say what to change for a training stage to fit, and what it takes then."""
    training = training_of(recipe, stage, machine)
    tried = [
        {} if training.checkpointing else {CHECKPOINTING: True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": training.accumulation * training.batch_size},
        {"optim": "adamw_bnb_8bit"},
    ]
    for gpus in [machine.gpus, *(2**power for power in range(1, 11) if 2**power > machine.gpus)]:
        section, changes = dict(recipe.get(stage) or {}), []
        for change in ({}, *tried):
            changes += [f"{stage}.{k}: {str(value).lower()}" for k, value in change.items() if section.get(k) != value]
            section |= change
            found = training_cost(stage, {**recipe, stage: section}, models, replace(machine, gpus=gpus))
            if found.gpu_bytes <= machine.gpu_bytes:
                more = [f"take {gpus} GPUs"] if gpus > machine.gpus else []
                settings = [f"set {', '.join(changes)}"] if changes else []
                adapters = _with_adapters(recipe, stage, models, machine) if more else ""
                return f"{' and '.join(more + settings)}: {found.gpu_bytes / GB:,.1f} GB{adapters}"
    return "no number of GPUs holds it; shorten block_size, or take GPUs with more memory"


def _with_adapters(recipe: Mapping[str, Any], stage: str, models: Models, machine: Machine) -> str:
    """Say what training adapters takes, where it fits."""
    section = {**(recipe.get(stage) or {}), **ADAPTERS}
    found = training_cost(stage, {**recipe, stage: section}, models, machine)
    if found.gpu_bytes > machine.gpu_bytes:
        return ""
    return f"; or train adapters, {stage}.lora: {{}} and {stage}.base_dtype: bfloat16: {found.gpu_bytes / GB:,.1f} GB"


def cost_text(recipe: Mapping[str, Any], machine: Machine) -> str:
    """Say what every stage takes, whether it fits, and what to change where it does not."""
    models = Models.of(recipe)
    found = costs(recipe, machine, models)
    table = [["stage", "GB per GPU", "GB per host", "GB of disk", "tokens", "FLOPs", "hours", ""]]
    for cost in found:
        sizes = (f"{size / GB:,.1f}" if size else "" for size in (cost.gpu_bytes, cost.host, cost.disk))
        work = (f"{cost.tokens:,}", f"{cost.flops:.1e}", _hours(cost.flops, machine)) if cost.flops else ("", "", "")
        table.append([cost.stage, *sizes, *work, cost.note])
    lines = [markdown_table(table), ""]
    for cost in (cost for cost in found if cost.stage in ("correct", "distill")):
        parts = ", ".join(f"{name} {size / GB:,.1f}" for name, size in cost.gpu.items())
        lines.append(f"{cost.stage}, GB of a GPU: {parts}, CUDA {CONTEXT / GB:,.1f}.")
        if not cost.tokens:
            lines.append(f"{cost.stage}: max_steps is not set, so its tokens and hours depend on the text.")
    total, disk = sum(cost.flops for cost in found), sum(cost.disk for cost in found)
    gpus = f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''}"
    share = f"{machine.utilization:.0%} of {machine.peak / 1e12:,.0f} TFLOP/s each"
    lines.append(f"In all {_hours(total, machine)} hours on {gpus} at {share} (an H100 reached 26 % with 1B, see "
                 f"docs/measurements.md), {disk / GB:,.0f} GB of disk.")  # fmt: skip
    if machine.gpu_bytes:
        lines += _judged(recipe, found, models, machine)
    return "\n".join(lines)


def _hours(flops: float, machine: Machine) -> str:
    hours = machine.hours(flops)
    return "< 0.01" if hours < 0.01 else f"{hours:,.0f}" if hours >= 10 else f"{hours:,.2g}"


def _judged(recipe: Mapping[str, Any], found: list[Cost], models: Models, machine: Machine) -> list[str]:
    large = [cost for cost in found if cost.gpu_bytes > machine.gpu_bytes]
    if not large:
        return [f"Every stage fits into {machine.gpu_bytes / GB:,.0f} GB."]
    lines = []
    for cost in large:
        trains = cost.stage in ("correct", "distill")
        advice = fitting(recipe, cost.stage, models, machine) if trains else OTHERWISE[cost.stage]
        lines.append(f"{cost.stage} needs {cost.gpu_bytes / GB:,.1f} GB of {machine.gpu_bytes / GB:,.0f}: {advice}.")
    return lines
