"""distill: train the student to say what the teacher says; continues from its last checkpoint when it was interrupted."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from hf_minitron.checkpoint import load_model, resolve
from hf_minitron.data import check_text
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.teacher import check_tokenizers
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.run import CHECKPOINTS, Run
from hf_minitron.stages import correct, synthesize
from hf_minitron.stages.training import (
    TextArguments,
    check_checkpoints,
    fit,
    load_blocks,
    save_log,
    save_model,
    tokens_of,
)

NEEDS = ("prune",)
USES = ("correct", "synthesize")


@dataclass
class Args(TextArguments, DistillationArguments):
    """The `distill:` section: everything that `DistillationArguments` and `TrainingArguments` know, and the text."""

    teacher: str | None = field(
        default=None, metadata={"help": "Another teacher than `model` or, with a `correct:` section, the corrected one."}
    )


def check(args: Args, run: Run) -> None:
    """Refuse a missing text, another tokenizer, and a disk that cannot hold the checkpoints."""
    if not synthesize.names(run, args.text):
        check_text(args.text, args.block_size)
    if args.teacher:
        teacher, folder = resolve(args.teacher), resolve(run.model)
        check_tokenizers(AutoTokenizer.from_pretrained(teacher), AutoTokenizer.from_pretrained(folder))
        AutoConfig.from_pretrained(teacher)
    check_checkpoints(run, args, "distill")


def tokens(args: Args) -> dict[str, int]:
    """Return how many tokens pass through each model; a training step costs three forward passes."""
    return {"teacher": tokens_of(args), "student": 3 * tokens_of(args)}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `student/` and `log.json`."""
    source = run.path("prune") / "student"
    tokenizer = AutoTokenizer.from_pretrained(source)
    args.text, args.output_dir, args.seed = synthesize.text_of(run, args.text), str(out / CHECKPOINTS), run.seed
    blocks = load_blocks(args, tokenizer, run.seed)
    student, teacher = load_model(source, torch.float32).train(), args.teacher or correct.teacher_of(run)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=blocks, processing_class=tokenizer)
    fit(trainer)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        save_model(student, state, source, out / "student")
        shutil.copyfile(source / "plan.json", out / "student" / "plan.json")
        save_log(trainer, out)
