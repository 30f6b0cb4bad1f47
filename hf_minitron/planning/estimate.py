"""How long a run takes on this machine, and a run that fits into a given time.

The work of every stage is counted in units (a token scored, a token distilled, an optimizer step). What a unit takes is
measured with the functions that the stages call, on a random model with a few of the run's own layers; the others take as long.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import named_ids
from hf_minitron.checkpoint.checkpoint import best_device, best_dtype, resolve
from hf_minitron.distillation.losses.chunked import chunked_loss
from hf_minitron.distillation.losses.tokens import forward_kl
from hf_minitron.distillation.signals import DenseSignal
from hf_minitron.distillation.teacher import keep_tokens
from hf_minitron.evaluation.speed import generate, random_model, seconds_of
from hf_minitron.evaluation.text import read_text
from hf_minitron.head import head_of, next_token_rows
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.memory import free_memory
from hf_minitron.plan import make_plan
from hf_minitron.probe import base_model
from hf_minitron.pruning.prune import prune_model
from hf_minitron.recipe import bind
from hf_minitron.run import RecipeError, Run
from hf_minitron.stage import Stages
from hf_minitron.stages import prune

# What a run's time allows, in its folder: another start of the same recipe gets the same.
BUDGET = "budget.json"
DEPTH = 4  # layers of the models that are measured
BYTES = 24  # per parameter of them: teacher, student, its gradients, AdamW's moments, and room
TOKENS = 1024  # of their batch, at most
NEW_TOKENS = 8
LEAST = 0.1  # of a recipe's tokens, steps and documents; with less the result would say nothing


def time_allows(run: Run, stages: Stages, estimate: bool, done: Sequence[str] = ()) -> tuple[dict[str, int], str]:
    """Return the values of the recipe that its `minutes` allow, and what to say about its time.

    Args:
        run (`Run`): The run.
        stages (`Stages`): Its stages by name.
        estimate (`bool`): Whether to say how long it takes, but for the stages that are `done`.
    """
    values = stored_values(run) if "minutes" in run.recipe else {}
    return _measured(run, values, stages, done) if estimate or values is None else (values, "")


def _measured(run: Run, values: dict | None, stages: Stages, done: Sequence[str]) -> tuple[dict[str, int], str]:
    """Return the values of a recipe, those that fit its time where there are none yet, and what to say about its time."""
    try:
        rates = rehearse(run, stages)
    except (MemoryError, torch.OutOfMemoryError) as error:
        if values is None:
            raise RecipeError(f"minutes: how long this takes cannot be measured: {error}. Leave minutes out") from error
        return values, f"How long this takes cannot be measured: {error}."
    values = fit(run, stages, rates) if values is None else values
    return values, time_text(run, values, stages, rates, done)


def time_text(run: Run, values: Mapping, stages: Stages, rates: Mapping[str, float], done: Sequence[str] = ()) -> str:
    """Say how long a run takes on this machine, stage by stage, and what its time leaves of the recipe."""
    times = {n: time for n, time in seconds_by_stage(with_values(run, values), stages, rates).items() if n not in done}
    device, said = best_device(), f"Done already: {', '.join(done)}. " if done else ""
    machine = f"{device}, {str(best_dtype(device)).removeprefix('torch.')}, {1 / rates['train']:,.0f} tokens/s of distillation"
    unit, seconds = ("minutes", 60) if sum(times.values()) >= 60 else ("seconds", 1)
    by_stage = ", ".join(f"{name} {time / seconds:.1f}" for name, time in times.items() if time)
    lines = [
        f"About {max(1, sum(times.values()) / seconds):.0f} {unit} on this machine ({machine}): {by_stage}.",
        f"{said}It can be interrupted at any time and goes on when started again.",
    ]
    if values:
        whole, sizes = sum(seconds_by_stage(run, stages, rates).values()), scaled(run, stages, 1.0)
        left = ", ".join(f"{key} {value:,} of {sizes[key]:,}" for key, value in values.items())
        lines.append(f"The whole recipe takes {whole / 60:,.1f} minutes; minutes: {run.recipe['minutes']} leaves {left}.")
    return "\n".join(lines)


def rehearse(run: Run, stages: Stages) -> dict[str, float]:
    """Measure the seconds of every unit of work on this machine.

    Args:
        run (`Run`): The run.
        stages (`Stages`): Its stages by name.

    Returns:
        `dict[str, float]`: `score`, `train`, `read`, `compare`: a token scored, distilled, read by the teacher, and read by a
        student and compared; `step`: an optimizer step; `prune`: all of it; `decode`: a step of generation.
    """
    bound, device = _bound(run, stages), best_device()
    before, after, rows = prune.shapes(bound["prune"], run.model)
    config = AutoConfig.from_pretrained(resolve(run.model))
    depth = _depth(config, before["layers"], device)
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):  # without the stages' progress bars
        teacher = random_model(config, best_dtype(device), depth, vocab=None).to(device)
        block = min(bound["distill"].block_size, TOKENS)
        ids = torch.randint(after["vocab"], (max(1, TOKENS // block), block), device=device)
        student, times = _rehearse_pruning(teacher, ids, bound["prune"])
        times |= _rehearse_reading(teacher, student, ids)
        keep_tokens(teacher, range(after["vocab"]))
        times |= _rehearse_training(teacher, student.float(), ids, bound["distill"])
    more = dict.fromkeys(("score", "prune", "read", "decode"), before["layers"] / depth - 1)
    more |= dict.fromkeys(("compare", "train"), after["layers"] / depth - 1)
    rates = {unit: whole + body * more.get(unit, 0) for unit, (whole, body) in times.items()}
    return rates | {"step": rates["step"] * after.num_parameters(rows) / student.num_parameters()}


def _depth(config: PreTrainedConfig, layers: int, device: torch.device) -> int:
    """Return how many layers are measured: one where more would not fit in memory.

    Raises:
        MemoryError: where not even one does.
    """
    free = free_memory(device)
    for depth in dict.fromkeys((min(DEPTH, layers), 1)):
        with torch.device("meta"):
            size = BYTES * random_model(config, torch.float32, depth, vocab=None).num_parameters()
        if size <= free:
            return depth
    raise MemoryError(f"one layer and the embeddings need {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free")


def _rehearse_pruning(
    teacher: PreTrainedModel, ids: Tensor, args: Any
) -> tuple[PreTrainedModel, dict[str, tuple[float, float]]]:
    """Return a student, and the seconds of scoring a token and of pruning: the model's, and those that its layers take."""
    shape = Architecture.of(teacher.config).shape
    after = shape.cut_to({axis: size for axis, size in args.target.items() if axis not in ("layers", "experts")})
    blocks = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    with TemporaryDirectory() as folder:
        measure = partial(calibrate, teacher, blocks, len(ids), moments=bool(args.corrections), save_to=folder)
        measured = measure()
        tokens = torch.arange(shape["vocab"], 0.0, -1)  # any will do, beside those that the config names
        tokens[[index for index in named_ids(teacher.config.to_dict()) if index < len(tokens)]] = torch.inf
        scores = {**measured.scores, "vocab": tokens}
        plan, used = make_plan(scores, shape, after), measured if args.corrections else None
        score = _seconds(measure) / ids.numel()
        student = prune_model(teacher, plan, used)
        cut = seconds_of(lambda: prune_model(teacher, plan, used))
    return student, {"score": (score, score), "prune": (cut, cut)}


@torch.inference_mode()
def _rehearse_reading(teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor) -> dict[str, tuple[float, float]]:
    """Return the seconds of reading a token, of reading and comparing one, and of a step of generation."""
    rows, prompt = ids.tolist(), ids[:1, :NEW_TOKENS]
    _, reading = read_text(teacher, rows, len(rows), keep=True)
    times = {
        "read": (lambda: read_text(teacher, rows, len(rows)), lambda: _states(teacher, ids), ids.numel()),
        "compare": (lambda: read_text(student, rows, len(rows), reading), lambda: _states(student, ids), ids.numel()),
        "decode": (lambda: generate(teacher, prompt, NEW_TOKENS), lambda: _states(teacher, ids[:1, :1]), NEW_TOKENS),
    }
    seconds = {unit: (_seconds(whole) / count, _seconds(body) / count) for unit, (whole, body, count) in times.items()}
    return seconds | {"decode": (seconds["decode"][0], seconds["decode"][1] * NEW_TOKENS)}


def _rehearse_training(
    teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor, args: Any
) -> dict[str, tuple[float, float]]:
    """Return the seconds of distilling a token, forward and backward, and of an optimizer step."""
    student.train()
    if args.gradient_checkpointing:  # since transformers 5.23 it repeats activation_checkpointing
        student.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0)
    autocast = partial(torch.autocast, ids.device.type, torch.bfloat16, enabled=args.bf16)

    def body() -> None:
        with torch.no_grad():
            _states(teacher, ids)
        with autocast():
            states = _states(student, ids)
        states.backward(torch.ones_like(states))

    def train() -> None:
        with torch.no_grad():
            signal = DenseSignal(next_token_rows(_states(teacher, ids), ids)[0], head_of(teacher))
        with autocast():
            rows, targets = next_token_rows(_states(student, ids), ids)

            def losses(logits: Tensor, part: slice) -> dict[str, Tensor]:
                return {"forward_kl": forward_kl(*signal.aligned_log_probs(logits, part, 1))}

            loss, _ = chunked_loss(rows, head_of(student), losses, {"forward_kl": 1.0}, args.chunk_size)
        (loss / len(targets)).backward()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    return {"train": (_seconds(train) / ids.numel(), _seconds(body) / ids.numel()), "step": (_seconds(step), 0.0)}


def _states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return base_model(model)(input_ids=ids, use_cache=False).last_hidden_state


def _seconds(work: Callable[[], object]) -> float:
    """Return how long some work takes once it has been done before: the median of two, or of more if it is short."""
    work()
    times = [seconds_of(work), seconds_of(work)]
    while len(times) < 7 and sum(times) < 1:
        times.append(seconds_of(work))
    return statistics.median(times)


def seconds_by_stage(run: Run, stages: Stages, rates: Mapping[str, float]) -> dict[str, float]:
    """Return how long every stage takes: its units of work times the seconds of each."""
    return {
        name: sum(count * rates[unit] for unit, count in stages[name].work(args, run).items())
        for name, args in _bound(run, stages).items()
    }


def fit(run: Run, stages: Stages, rates: Mapping[str, float]) -> dict[str, int]:
    """Return the values of a recipe that make its run as long as its `minutes` say.

    Args:
        run (`Run`): The run, whose recipe has `minutes`.
        stages (`Stages`): Its stages by name; `scales` of each lists the arguments that shrink.
        rates (`Mapping[str, float]`): The seconds of every unit of work, from `rehearse`.

    Returns:
        `dict[str, int]`: Values by dotted key; none when the whole recipe fits.

    Raises:
        RecipeError: when a tenth of the recipe's tokens, steps and documents would still take longer.
    """

    def seconds(share: float) -> float:
        return sum(seconds_by_stage(with_values(run, scaled(run, stages, share)), stages, rates).values())

    limit, whole = 60 * run.recipe["minutes"], seconds(1.0)
    if whole <= limit:  # a share of a recipe so short may not even be one
        return {}
    least = seconds(LEAST)
    if least > limit:
        raise RecipeError(
            f"minutes: {run.recipe['minutes']} is too little on this machine: a tenth of the recipe's tokens, steps and "
            f"documents takes {least / 60:.1f} minutes, all of them {whole / 60:.1f}. Set minutes to {least / 60 + 1:.0f} or "
            "more, or leave it out"
        )
    return scaled(run, stages, LEAST + (1 - LEAST) * (limit - least) / (whole - least))  # work is linear in what shrinks


def scaled(run: Run, stages: Stages, share: float) -> dict[str, int]:
    """Return a share of the recipe's tokens (in whole blocks), steps and documents, by dotted key."""
    values = {}
    for name, args in _bound(run, stages).items():
        for key in stages[name].scales:
            size, step = getattr(args, key), args.block_size if key == "tokens" else 1
            least = 0 if key == "warmup_steps" else step
            if size is not None and size >= 1:  # a warm-up may be a share already
                values[f"{name}.{key}"] = max(least, int(size * share) // step * step)
    return values


def with_values(run: Run, values: Mapping[str, int]) -> Run:
    """Return the run with other values in its recipe, by dotted key."""
    recipe = dict(run.recipe)
    for key, value in values.items():
        name, _, argument = key.partition(".")
        recipe[name] = {**(recipe.get(name) or {}), argument: value}
    return dataclasses.replace(run, recipe=recipe)


def stored_values(run: Run) -> dict[str, int] | None:
    """Return the values that an earlier start of the same recipe was given, if there was one."""
    try:
        stored = json.loads((run.folder / BUDGET).read_text(encoding="utf-8"))
        return stored["values"] if stored["recipe"] == _digest(run) else None
    except (OSError, ValueError, KeyError):
        return None


def store_values(run: Run, values: Mapping[str, int]) -> None:
    """Keep what `stored_values` returns; `run` is the one without these values."""
    (run.folder / BUDGET).write_text(json.dumps({"recipe": _digest(run), "values": values}, indent=1) + "\n", encoding="utf-8")


def _digest(run: Run) -> str:
    return hashlib.sha256(json.dumps(dict(run.recipe), sort_keys=True, default=str).encode()).hexdigest()


def _bound(run: Run, stages: Stages) -> dict[str, Any]:
    return {name: bind(run, name, stage.args) for name, stage in stages.items()}
