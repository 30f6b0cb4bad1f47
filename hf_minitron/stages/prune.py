"""prune: keep the best-scored part of every axis and write the student as a stock checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig

from hf_minitron.architecture import outline as meta
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import dequantizing
from hf_minitron.architecture.student import student_config, text_alone
from hf_minitron.checkpoint.checkpoint import (
    NAMES,
    Checkpoint,
    TensorSpec,
    best_device,
    best_dtype,
    load_model,
    require_space,
    resolve,
    stored_dtype,
    write_sparse_checkpoint,
)
from hf_minitron.checkpoint.saving import check_generation, copy_side_files, save_config
from hf_minitron.checkpoint.side_files import side_files
from hf_minitron.checkpoint.tensors import CheckpointTensors
from hf_minitron.importance.footprint import fits
from hf_minitron.importance.residuals import read_residuals
from hf_minitron.importance.sequential import check_sequential, sequential_least_squares
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.plan import Plan, make_plan, stand_in
from hf_minitron.pruning.compensate import check_names
from hf_minitron.pruning.effects import check_corrections
from hf_minitron.pruning.nonuniform import layer_parameters, least_parameters, nonuniform_plan
from hf_minitron.pruning.prune import prune_checkpoint
from hf_minitron.pruning.reconstruction import SEQUENTIAL_PASSES
from hf_minitron.pruning.vocab import cut_tokenizer_files, scores_for, vocab_scores
from hf_minitron.ranking import best
from hf_minitron.recipe_file import arguments
from hf_minitron.run import Run, done_digest
from hf_minitron.shape import Shape
from hf_minitron.stage import Stage
from hf_minitron.stages.score import BLOCKS, check_layers_target
from hf_minitron.stages.score import Args as ScoreArgs
from hf_minitron.stages.target import Args, differing, shapes, student, student_rows, teacher, uncut, uses_rotation
from hf_minitron.statistics import Statistics

logger = logging.getLogger(__name__)


def outline(args: Args, model: str, folder: Path) -> None:
    """Write the student's folder as it will be, but for its weights and plan: what checks of a later run look at.

    The layers of a nonuniform one have all that the model has: what stays of each is known after scoring.

    Raises:
        ValueError: for a target that no class holds.
    """
    before, after, _ = shapes(args, model)
    plan = stand_in(before, after)
    if after["vocab"] != before["vocab"]:
        kept = best(vocab_scores(model, torch.zeros(before["vocab"]), after["vocab"]), after["vocab"])
        plan = replace(plan, keep={**plan.keep, "vocab": kept})
    # of a nonuniform one, sizes are known after scoring
    config = student_config(uncut(args, model), plan)
    config = config if args.nonuniform is None else PrunedConfig.from_stock(config)
    config = text_alone(Architecture.of(config))[0] if args.text_only else config
    dtype = stored_dtype(Checkpoint(resolve(model)).specs.values())
    save_config(config, folder, dtype=dtype)
    write_sparse_checkpoint(
        folder, {name: TensorSpec(NAMES[dtype], shape) for name, shape in meta.outline(config).parameters.items()}
    )
    copy_side_files(resolve(model), folder, processors=not args.text_only)
    if "vocab" in plan.keep:
        cut_tokenizer_files(folder, plan.keep["vocab"], before["vocab"])


def cuts_vocab(run: Run) -> bool:
    """Return whether a run's student has fewer tokens than its teacher."""
    target = run.section("prune").get("target")
    return isinstance(target, Mapping) and "vocab" in target


def vocab_needs(run: Run) -> tuple[str, ...]:
    """Return the stage that writes the tokenizer by which a text is read, where the student has one of its own."""
    return ("prune",) if cuts_vocab(run) else ()


def student_of(run: Run) -> Path:
    """Return the folder that tells in which tokens a run's student reads a text: its own where it has fewer."""
    return run.path("prune") / "student" if cuts_vocab(run) else resolve(run.model)


def uses_layer_merge(args: Args) -> bool:
    """Return whether to read what dropped layers added, with another pass over the text."""
    return "layer_merge" in args.corrections and "layers" in args.target


def check(args: Args, run: Run) -> None:
    """Refuse an illegal target, a damaged or quantized checkpoint and a full disk before any weight is read."""
    check_names(args.corrections)
    if args.corrections and run.section("score").get("moments", True) is False:
        raise ValueError("corrections need what score measures with moments: true; set that, or corrections: []")
    if args.nonuniform is not None:
        check_nonuniform(args, run)
    elif args.nonuniform_axes is not None:
        raise ValueError(
            f"nonuniform_axes: {args.nonuniform_axes} says what nonuniform chooses by layer: set that, such as 0.75"
        )
    full, after, _ = shapes(args, run.model)
    check_effects(args, run.model, full, after)
    check_tokens(args, run)
    if args.sequential:
        plan = replace(stand_in(full, after), rotated=uses_rotation(args))
        check_sequential(teacher(run.model, args.dequantize), student(args, run.model), plan)
    rows, device = student_rows(args, run.model), best_device()
    check_layers_target(run.section("score"), full["layers"], args.target.get("layers", after["layers"]))
    folder = resolve(run.model)
    check_generation(folder)
    side_files(folder)
    if "vocab" in args.target:
        vocab_scores(run.model, torch.zeros(full["vocab"]), after["vocab"])
    if uses_layer_merge(args) and not fits(folder, best_dtype(device), device):
        raise ValueError("corrections: layer_merge runs the whole model, which does not fit in memory; leave it out")
    tensors = CheckpointTensors(folder, dequantize=args.dequantize)
    stored = [tensors.spec(name) for name in tensors.names()]
    before = sum(torch.Size(spec.shape).numel() for spec in stored)
    num_bytes = sum(spec.num_bytes for spec in stored) * after.num_parameters(rows) // before
    if done_digest(run.path("prune")) is None:  # what an interrupted attempt has left goes first
        require_space(run.folder, num_bytes - run.left_bytes("prune"), "the student")


def check_effects(args: Args, model: str, before: Shape, after: Shape) -> None:
    """Refuse corrections that have no effect on the target."""
    cut = [axis for axis in after.axes if after[axis] != before[axis]]
    if args.nonuniform is not None:  # how many heads of a KV group stay, and which layers, is known after scoring
        cut = differing(args, model)
    check_corrections(teacher(model, args.dequantize), Plan(before, after, dict.fromkeys(cut, [])), args.corrections)


def check_nonuniform(args: Args, run: Run) -> None:
    """Refuse what a nonuniform cut cannot be made with."""
    architecture, score = teacher(run.model, args.dequantize), run.section("score")
    if not 0 < args.nonuniform < 1:
        raise ValueError(f"nonuniform: {args.nonuniform} is not a share between 0 and 1, such as 0.75")
    if given := {axis: size for axis, size in args.target.items() if axis != "vocab"}:
        raise ValueError(f"nonuniform chooses the sizes of layers, target {given} gives them: set target: {{}}, or leave "
                         "nonuniform out")  # fmt: skip
    if reason := architecture.not_nonuniform:
        kind = architecture.config.model_type
        raise ValueError(f"nonuniform: layers of {kind} cannot differ in size: {reason}. Set a target")
    if score.get("sublayers") is not True or score.get("moments", True) is False:
        raise ValueError("nonuniform needs what score measures with sublayers: true and moments: true; set both in score:")
    by_layer = differing(args, run.model)
    whole, least = all_layers(architecture), least_parameters(architecture, by_layer)
    if least > args.nonuniform * whole:
        raise ValueError(f"nonuniform: {args.nonuniform} of the layers' parameters is less than what stays of them "
                         f"in any case, {least / whole:.3f}: {' and '.join(by_layer)} alone can be cut; take more")  # fmt: skip


def check_tokens(args: Args, run: Run) -> None:
    """Refuse tokens for a sequential fit that is not made, and more than the text that is scored has."""
    tokens, scored = args.sequential_tokens, _scored(run)
    if tokens is not None and not args.sequential:
        raise ValueError(f"sequential_tokens: {tokens} has no effect without sequential: true; set that, or leave it out")
    if tokens is not None and tokens > scored:
        raise ValueError(f"sequential_tokens: {tokens} are more than score.tokens: {scored}, which it reads again; lower one "
                         "or raise the other")  # fmt: skip


def all_layers(architecture: Architecture) -> int:
    """Count the parameters of all layers, with the sizes that they have."""
    shape = architecture.shape
    return sum(layer_parameters(architecture, shape.at(layer)) for layer in range(shape["layers"]))


def work(args: Args, run: Run) -> dict[str, float]:
    """Return the units of work, see `hf_minitron.planning.estimate`."""
    return {"prune": 1, "read": SEQUENTIAL_PASSES * args.fitted_tokens(_scored(run))}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `student/`."""
    before, after, _ = shapes(args, run.model)
    statistics, source, residuals = Statistics.load(run.path("score")), resolve(run.model), None
    if args.nonuniform is not None:
        plan = _nonuniform_plan(args, run, statistics)
    else:
        plan = make_plan(scores_for(run.model, statistics, before, after), before, after)
    names = args.corrections
    if uses_layer_merge(args) and plan.dropped_after:
        device = best_device()
        blocks = Dataset.from_parquet(escape(str((run.path("score") / BLOCKS).absolute())), keep_in_memory=True)
        model = load_model(source, best_dtype(device), device, **dequantizing(AutoConfig.from_pretrained(source)))
        residuals = read_residuals(model, blocks, plan)
    elif uses_layer_merge(args):
        logger.warning("corrections: layer_merge merges nothing: no kept layer stands before a dropped one")
        names = [name for name in names if name != "layer_merge"]
    used = statistics if names else None
    how = {"text_only": args.text_only, "dequantize": args.dequantize}
    prune_checkpoint(source, plan, out / "student", args.max_shard_bytes, used, names, residuals, **how)
    if args.sequential:
        _fit_sequentially(args, run, plan, out / "student")


def _fit_sequentially(args: Args, run: Run, plan: Plan, student: Path) -> None:
    """Fit a student's projections again, on the text that was scored."""
    device = best_device()
    blocks = Dataset.from_parquet(escape(str((run.path("score") / BLOCKS).absolute())), keep_in_memory=True)
    source = CheckpointTensors(resolve(run.model), dequantize=args.dequantize)
    tokens = args.fitted_tokens(_scored(run))
    sequential_least_squares(source, student, plan, blocks, tokens, best_dtype(device), device)


def _scored(run: Run) -> int:
    """Return the tokens that are scored."""
    return arguments(run.section("score"), "score", ScoreArgs).tokens


def _nonuniform_plan(args: Args, run: Run, statistics: Statistics) -> Plan:
    """Return the plan that spends `nonuniform` of the parameters of all layers."""
    tensors = CheckpointTensors(run.model, dequantize=args.dequantize)
    architecture, before = tensors.architecture, tensors.architecture.shape
    plan = nonuniform_plan(tensors, statistics, int(args.nonuniform * all_layers(architecture)), args.nonuniform_axes)
    if "vocab" not in args.target:
        return plan
    count, after = args.target["vocab"], before.cut_to(args.target)
    kept = best(scores_for(run.model, statistics, before, after)["vocab"], count)
    return replace(
        plan, after=replace(plan.after, sizes={**plan.after.sizes, "vocab": count}), keep={**plan.keep, "vocab": kept}
    )


STAGE = Stage("prune", __doc__, Args, check, run, work, needs=("score",))
