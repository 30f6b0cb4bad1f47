"""distill: train the student to say what the teacher says; continues from its last checkpoint when it was interrupted."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from hf_minitron.checkpoint import load_model, resolve
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.documents import check_documents_apart
from hf_minitron.distillation.teacher import check_tokenizers
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.run import CHECKPOINTS, Run
from hf_minitron.stages.training import (
    TextArguments,
    check_checkpoints,
    check_text_for,
    fit,
    make_blocks,
    save_log,
    save_model,
    tokens_of,
)

ALL_PROCESSES = True
NEEDS = ("prune",)
USES = ("cache",)


@dataclass
class Args(TextArguments, DistillationArguments):
    """The `distill:` section: everything that `DistillationArguments` and `TrainingArguments` know, and the text."""

    teacher: str | None = field(default=None, metadata={"help": "Another teacher than `model`: a folder or a Hub id."})


def check(args: Args, run: Run) -> None:
    """Refuse an unusable text, another tokenizer, a model that cannot keep documents apart, and too small a disk."""
    check_blocks(args, run)
    check_checkpoints(run, args, "distill")


def check_blocks(args: Args, run: Run) -> None:
    """Refuse an unusable text, and a teacher with another tokenizer."""
    folder = resolve(run.model)
    models = [folder, resolve(args.teacher)] if args.teacher else [folder]
    if args.teacher:
        check_tokenizers(AutoTokenizer.from_pretrained(models[-1]), AutoTokenizer.from_pretrained(folder))
    check_text_for(args, [AutoConfig.from_pretrained(model) for model in models])


def tokens(args: Args) -> dict[str, int]:
    """Return how many tokens pass through each model; a training step costs three forward passes."""
    return {"teacher": tokens_of(args), "student": 3 * tokens_of(args)}


def teacher_of(args: Args, run: Run) -> str | Path:
    """Return where the teacher lies: that of the section, or the model that is pruned."""
    return args.teacher or resolve(run.model)


def run(args: Args, run: Run, out: Path) -> None:
    """Write `student/` and `log.json`."""
    source = run.path("prune") / "student"
    tokenizer, teacher, facts = AutoTokenizer.from_pretrained(source), teacher_of(args, run), {}
    if "cache" in run.recipe:
        teacher = _cached_teacher(args, run)
        facts["cache"] = teacher.meta
    args.output_dir, args.seed = str(out / CHECKPOINTS), run.seed
    student = load_model(source, torch.float32)
    if not args.cross_documents:
        check_documents_apart(student)
    blocks = make_blocks(args, tokenizer, out / CHECKPOINTS, run.seed)
    trainer = DistillationTrainer(student.train(), teacher, args, train_dataset=blocks, processing_class=tokenizer)
    fit(trainer)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        save_model(student, state, source, out / "student")
        shutil.copyfile(source / "plan.json", out / "student" / "plan.json")
        save_log(trainer, out, **facts)


def _cached_teacher(args: Args, run: Run) -> CachedTeacher:
    """Open the cache; refuse one of another teacher."""
    teacher = CachedTeacher(run.path("cache"))
    teacher.check_teacher(teacher_of(args, run))
    return teacher
