"""correct: fine-tune the teacher on the text that distillation will use, so that it knows what it teaches (optional)."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.checkpoint import resolve
from hf_minitron.checkpoint.saving import check_generation
from hf_minitron.checkpoint.side_files import side_files
from hf_minitron.data.packing import adds_bos_token
from hf_minitron.distillation.adapters import check_lora
from hf_minitron.distillation.config import CROSS_ENTROPY, DistillationArguments
from hf_minitron.run import Run
from hf_minitron.stage import Stage
from hf_minitron.stages.trained import train_model
from hf_minitron.stages.training import TextArguments, check_space, check_text_for, tokens_of
from hf_minitron.stages.validation import eval_tokens_of

TEACHERS = ("temperature", "beta", "top_k", "layer_pairs", "state_distance", "balance", "teacher_model_init_kwargs")


@dataclass
class Args(TextArguments, DistillationArguments):
    """The `correct:` section: everything that `TrainingArguments` knows, the text, and LoRA's settings.

    Score and prune start from the model as it is: correction "does not affect which weights to prune", and pruning the original
    while the teacher is corrected was on par (2408.11796, figure 5). To prune the corrected teacher, name its folder as the
    `model` of another recipe.
    """

    losses: dict | str | None = field(
        default_factory=lambda: {CROSS_ENTROPY: 1.0}, metadata={"help": "cross_entropy: nobody teaches the teacher."}
    )
    learning_rate: float = field(
        default=2e-5,
        metadata={
            "help": "Peak. The paper takes a fifth of the original training's, which no checkpoint tells: a fifth of "
            "distillation's (2408.11796, teacher correction and table 4)."
        },
    )
    warmup_steps: float = field(default=120, metadata={"help": "Steps of warm-up (2408.11796, teacher correction)."})
    lora: dict | None = field(
        default=None,
        metadata={
            "help": "Train low-rank additions and merge them: fields of peft.LoraConfig, or {}; all weights when left out."
        },
    )


def teacher_of(run: Run) -> str | Path:
    """Return where a run's teacher lies: the corrected one when there is a `correct:` section, else the run's model."""
    return run.path("correct") / "teacher" if "correct" in run.recipe else run.model


def check(args: Args, run: Run) -> None:
    """Refuse an unusable text, a warm-up that never ends, settings that LoRA refuses, a disk that is too full."""
    config = AutoConfig.from_pretrained(resolve(run.model))
    side_files(resolve(run.model))
    if list(args.losses) != [CROSS_ENTROPY]:
        raise ValueError(f"losses: {args.losses}, but nobody teaches the teacher: {CROSS_ENTROPY} is all there is")
    for setting in fields(args):
        if setting.name in TEACHERS and getattr(args, setting.name) != setting.default:
            raise ValueError(f"{setting.name}: {getattr(args, setting.name)!r} has no effect, for nobody teaches the teacher; "
                             "leave it out")  # fmt: skip
    check_generation(resolve(run.model))
    tokenizer = AutoTokenizer.from_pretrained(resolve(run.model))
    if args.add_bos_token:
        adds_bos_token(tokenizer, True)
    check_text_for(args, lambda name: False, [config], tokenizer)
    if args.lora is not None:
        check_lora(args.lora, config)
    check_space(run, args, "correct", tokenizer, Architecture.of(config))


def work(args: Args, run: Run) -> dict[str, float]:
    """Return the units of work, see `hf_minitron.planning.estimate`; the teacher is trained as the student is."""
    return {"train": tokens_of(args), "step": max(args.max_steps, 0), "read": eval_tokens_of(args)}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `teacher/`, a checkpoint like the teacher's, and `log.json`."""
    train_model(args, run, resolve(run.model), None, out, "teacher")


STAGE = Stage("correct", __doc__, Args, check, run, work, optional=True, distributed=True)
