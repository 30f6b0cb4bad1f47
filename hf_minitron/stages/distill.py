"""distill: train the student to say what the teacher says; continues from its last checkpoint when it was interrupted."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hf_minitron.checkpoint import DTYPES, Checkpoint, copy_side_files, load_model, require_space, resolve
from hf_minitron.data import check_text, load_text, token_blocks
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.teacher import check_tokenizers
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.families.family import family_of
from hf_minitron.run import CHECKPOINTS, Run

NEEDS = ("prune",)
USES = ("cache",)

# keys of the section that say which blocks are trained on, and whom they are to be learnt from
BLOCK_SETTINGS = (
    "text", "text_column", "split", "block_size", "teacher", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps",
)  # fmt: skip

# fields that DistillationArguments adds to TrainingArguments or gives another default
OWN_ARGUMENTS = tuple(DistillationArguments.__annotations__)


@dataclass
class Args(DistillationArguments):
    """The `distill:` section: everything that `DistillationArguments` and `TrainingArguments` know, and the text."""

    text: str = field(default="", metadata={"help": "Training text: a file or a dataset's Hub id. Needed."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    block_size: int = field(default=512, metadata={"min": 2, "help": "Tokens per block."})
    teacher: str | None = field(default=None, metadata={"help": "Another teacher than `model`: a folder or a Hub id."})

    def __post_init__(self):
        super().__post_init__()
        if not self.text:
            raise ValueError("text is missing: the training text, a file or a dataset's Hub id")


def check(args: Args, run: Run) -> None:
    """Refuse a missing text, another tokenizer, and a disk that cannot hold the checkpoints."""
    check_blocks(args, run)
    config = AutoConfig.from_pretrained(resolve(run.model))
    family = family_of(config)  # from the config alone: with a cache the teacher's weights may be gone
    weights = 4 * family.shape_of(config).num_parameters(family.rows_of(config))
    # float32 weights and two moments of Adam, for the checkpoints kept and the one being written
    require_space(run.folder, 3 * weights * ((args.save_total_limit or 1) + 1), "the checkpoints of distill")


def check_blocks(args: Args, run: Run) -> None:
    """Refuse a missing text, and a teacher with another tokenizer."""
    check_text(args.text, args.block_size)
    if args.teacher:
        folder = resolve(run.model)
        check_tokenizers(AutoTokenizer.from_pretrained(resolve(args.teacher)), AutoTokenizer.from_pretrained(folder))
        AutoConfig.from_pretrained(resolve(args.teacher))


def tokens(args: Args) -> dict[str, int]:
    """Return how many tokens pass through each model; a training step costs three forward passes."""
    count = args.max_steps * _tokens_per_step(args)
    return {"teacher": max(count, 0), "student": max(3 * count, 0)}


def teacher_of(args: Args, run: Run) -> str | Path:
    """Return where the teacher lies: that of the section, the corrected one, or the model that is pruned."""
    corrected = run.path("correct") / "teacher"
    return args.teacher or (corrected if "correct" in run.recipe and corrected.is_dir() else resolve(run.model))


def training_blocks(args: Args, tokenizer: PreTrainedTokenizerBase, seed: int, max_tokens: int | None = None) -> Dataset:
    """Return the token blocks to train on: as many as all steps need, of so many tokens, or all."""
    count = max_tokens or args.max_steps * _tokens_per_step(args) * args.world_size
    documents = load_text(args.text, args.split, args.text_column)
    return token_blocks(documents, tokenizer, args.block_size, count if count > 0 else None, seed)


def run(args: Args, run: Run, out: Path) -> None:
    """Write `student/` and `log.json`."""
    source = run.path("prune") / "student"
    tokenizer, teacher = AutoTokenizer.from_pretrained(source), teacher_of(args, run)
    if cached := "cache" in run.recipe:
        teacher = _cached_teacher(args, run)
    blocks = training_blocks(args, tokenizer, run.seed)
    if cached:
        teacher.check_blocks(blocks)
    args.output_dir, args.seed = str(out / CHECKPOINTS), run.seed
    student = load_model(source, torch.float32).train()
    trainer = DistillationTrainer(student, teacher, args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=last_checkpoint(out / CHECKPOINTS))
    trainer.accelerator.wait_for_everyone()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        dtype = next(DTYPES[spec.dtype] for spec in Checkpoint(source).specs.values())
        student.to(dtype).save_pretrained(out / "student", state_dict={name: t.to(dtype) for name, t in state.items()})
        copy_side_files(source, out / "student")
        shutil.copyfile(source / "plan.json", out / "student" / "plan.json")
        tokens_per_step = _tokens_per_step(args) * args.world_size
        log = {"tokens": trainer.state.global_step * tokens_per_step, "history": trainer.state.log_history}
        if cached:
            log["cache"] = teacher.meta
        (out / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def _cached_teacher(args: Args, run: Run) -> CachedTeacher:
    """Open the cache; refuse one of another teacher, or one that cannot serve the losses."""
    teacher = CachedTeacher(run.path("cache"))
    teacher.check_teacher(teacher_of(args, run))
    teacher.check_losses(args.losses, args.temperature)
    return teacher


def _tokens_per_step(args: Args) -> int:
    """Count the tokens of an optimizer step on one process."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.block_size


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint; the Trainer writes `trainer_state.json` last.

    Half-written ones, left by a killed process, are deleted.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(re.fullmatch(r"checkpoint-(\d+)", path.name)[1]), path))
        except (OSError, ValueError, TypeError):
            shutil.rmtree(path, ignore_errors=True)
    return str(max(found)[1]) if found else None
