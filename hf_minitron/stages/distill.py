"""distill: train the student to say what the teacher says; continues from its last checkpoint when it was interrupted."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, set_seed

from hf_minitron.checkpoint import load_model, resolve
from hf_minitron.distillation.adapters import add_lora, check_lora
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.teacher import check_tokenizers
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.inputs import model_files
from hf_minitron.run import CHECKPOINTS, Run
from hf_minitron.stages import correct, synthesize
from hf_minitron.stages.training import (
    TextArguments,
    check_checkpoints,
    check_text_for,
    fit,
    make_blocks,
    save_log,
    save_trained,
    sources_of,
    tokens_of,
)

ALL_PROCESSES = True
NEEDS = ("prune",)
USES = ("correct", "synthesize", "cache")
SCALES = ("max_steps",)


@dataclass
class Args(TextArguments, DistillationArguments):
    """The `distill:` section: everything that `DistillationArguments` and `TrainingArguments` know, and the text."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Another teacher than `model` or, with a `correct:` section, the corrected one.",
            "reads": model_files,
        },
    )
    lora: dict | None = field(
        default=None,
        metadata={"help": "Train low-rank additions to the student and merge them: fields of peft.LoraConfig, or {}."},
    )


def check(args: Args, run: Run) -> None:
    """Refuse an unusable text, another tokenizer, a model that cannot keep documents apart, and too small a disk."""
    check_blocks(args, run)
    if args.lora is None:
        check_checkpoints(run, args, "distill")
    else:
        check_lora(args.lora, AutoConfig.from_pretrained(resolve(run.model)))


def check_blocks(args: Args, run: Run) -> None:
    """Refuse an unusable text, and a teacher with another tokenizer."""
    folder = resolve(run.model)
    models = [folder, resolve(args.teacher)] if args.teacher else [folder]
    if args.teacher:
        check_tokenizers(AutoTokenizer.from_pretrained(models[-1]), AutoTokenizer.from_pretrained(folder))
    there = [source for source in sources_of(args) if not synthesize.names(run, source.name)]
    configs = [AutoConfig.from_pretrained(model) for model in models]
    check_text_for(args, there, configs, AutoTokenizer.from_pretrained(folder))


def work(args: Args, run: Run) -> dict[str, float]:
    """Return the units of work, see `hf_minitron.estimate`."""
    return {"train": tokens_of(args), "step": max(args.max_steps, 0)}


def teacher_of(args: Args, run: Run) -> str | Path:
    """Return where the teacher lies: that of the section, the corrected one, or the model that is pruned."""
    return args.teacher or correct.teacher_of(run)


def run(args: Args, run: Run, out: Path) -> None:
    """Write `student/` and `log.json`."""
    source = run.path("prune") / "student"
    tokenizer, teacher, facts = AutoTokenizer.from_pretrained(source), teacher_of(args, run), {}
    if "cache" in run.recipe:
        teacher = _cached_teacher(args, run)
        facts["cache"] = teacher.meta
    args.text, args.output_dir, args.seed = synthesize.text_of(run, args.text), str(out / CHECKPOINTS), run.seed
    student = load_model(source, torch.float32)
    blocks = make_blocks(args, tokenizer, out / CHECKPOINTS, run.seed)
    set_seed(run.seed)  # LoRA's additions begin at random
    student = student.train() if args.lora is None else add_lora(student.train(), args.lora)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=blocks, processing_class=tokenizer)
    fit(trainer)
    save_trained(trainer, source, out / "student")
    save_log(trainer, out, **facts)
    if trainer.is_world_process_zero():
        shutil.copyfile(source / "plan.json", out / "student" / "plan.json")


def _cached_teacher(args: Args, run: Run) -> CachedTeacher:
    """Open the cache; refuse one of another teacher."""
    teacher = CachedTeacher(run.path("cache"))
    teacher.check_teacher(teacher_of(args, run))
    return teacher
