"""Evaluation while a stage trains: its text, which student is the best one, and when to stop early."""

from dataclasses import MISSING, fields

from transformers import EarlyStoppingCallback, TrainerCallback

from hf_minitron.data.mixture import Source, read_sources
from hf_minitron.distillation.config import DistillationArguments

# Settings of evaluation while a stage trains.
OF_EVALUATION = (
    "eval_steps", "eval_delay", "eval_accumulation_steps", "eval_tokens", "per_device_eval_batch_size", "prediction_loss_only",
    "metric_for_best_model", "greater_is_better", "batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object",
    "include_for_metrics",
)  # fmt: skip


def check_evaluation(args: DistillationArguments) -> None:
    """Refuse an evaluation without a text, and what needs an evaluation without one."""
    evaluates = args.eval_on_start or args.eval_strategy != "no"
    if evaluates != bool(args.eval_text):
        raise ValueError(f"eval_strategy: {args.eval_strategy.value} and eval_text: {args.eval_text!r} do not go together: "
                         "evaluation needs both, a text and steps or epoch; leave out both for none")  # fmt: skip
    if evaluates:
        eval_sources_of(args)
    choosing = {
        "load_best_model_at_end": args.load_best_model_at_end,
        "save_strategy": args.save_strategy == "best",
        "early_stopping_patience": args.early_stopping_patience is not None,
    }
    chosen = next((name for name, given in choosing.items() if given), None)
    if chosen and args.eval_strategy == "no":
        raise ValueError(f"{chosen} needs an evaluation: set eval_strategy and eval_text")
    if choosing["early_stopping_patience"] and not args.load_best_model_at_end:
        raise ValueError(f"early_stopping_patience: {args.early_stopping_patience} needs load_best_model_at_end: true")
    for setting in fields(args) if not evaluates else ():
        default = setting.default if setting.default is not MISSING else setting.default_factory()
        if setting.name in OF_EVALUATION and getattr(args, setting.name) != default:
            raise ValueError(f"{setting.name}: {getattr(args, setting.name)!r} has no effect without evaluation: set "
                             "eval_strategy and eval_text, or leave it out")  # fmt: skip
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in ("loss", *args.losses):
        raise ValueError(f"metric_for_best_model: {metric!r} is none of loss, {', '.join(args.losses)}")
    if choosing["early_stopping_patience"]:  # or the count would begin again after an interruption
        args.restore_callback_states_from_checkpoint = True


def eval_sources_of(args: DistillationArguments) -> list[Source]:
    """Return the sources of a section's text for evaluation; none where nothing is evaluated."""
    return read_sources(args.eval_text, args.split, args.text_column) if args.eval_text else []


def eval_tokens_of(args: DistillationArguments) -> int:
    """Count the tokens that are read for evaluation in `max_steps`; 0 where epochs are counted instead."""
    if args.eval_strategy != "steps" or args.max_steps < 0:
        return 0
    return args.eval_tokens * int(args.max_steps / args.eval_steps if args.eval_steps >= 1 else 1 / args.eval_steps)


class Patience(EarlyStoppingCallback):
    """Early stopping that stays stopped when training is started again behind its end."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Stop at once when the patience has ended before."""
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience


def callbacks_of(args: DistillationArguments) -> list[TrainerCallback]:
    """Return what a section adds to the Trainer's callbacks."""
    return [] if args.early_stopping_patience is None else [Patience(args.early_stopping_patience)]
