"""distill: train the student to say what the teacher says; continues from its last checkpoint when it was interrupted."""

import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_from_disk
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hf_minitron.checkpoint import DTYPES, Checkpoint, complete_or_absent, copy_side_files, load_model, require_space, resolve
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.documents import check_documents_apart
from hf_minitron.distillation.teacher import check_tokenizers
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.evaluation.speed import random_layer
from hf_minitron.mixture import Source, check_sources, mixed_blocks, read_sources
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.run import CHECKPOINTS, Run

ALL_PROCESSES = True
NEEDS = ("prune",)

# fields that DistillationArguments adds to TrainingArguments or gives another default
OWN_ARGUMENTS = tuple(DistillationArguments.__annotations__)


@dataclass
class Args(DistillationArguments):
    """The `distill:` section: everything that `DistillationArguments` and `TrainingArguments` know, and the text."""

    text: str | dict = field(
        default="",
        metadata={"help": "Training text: a file, a dataset's Hub id, or a table of several to weights by tokens. Needed."},
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    block_size: int = field(default=512, metadata={"min": 2, "help": "Tokens per block."})
    cross_documents: bool = field(
        default=True, metadata={"help": "Tokens see the documents before theirs in a block; false keeps documents apart."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read and tokenize while training; needs max_steps."})
    shuffle_buffer: int = field(
        default=10_000, metadata={"min": 1, "help": "Documents of each source among which streaming shuffles."}
    )
    teacher: str | None = field(default=None, metadata={"help": "Another teacher than `model`: a folder or a Hub id."})

    def __post_init__(self):
        super().__post_init__()
        _sources(self)
        if self.streaming and self.max_steps <= 0:
            raise ValueError(f"streaming: a stream has no end, so max_steps says when training stops; it is {self.max_steps}")


def check(args: Args, run: Run) -> None:
    """Refuse an unusable text, another tokenizer, a model that cannot keep documents apart, and too small a disk."""
    check_sources(_sources(args), args.block_size, _max_tokens(args))
    folder = resolve(run.model)
    models = [folder, resolve(args.teacher)] if args.teacher else [folder]
    if args.teacher:
        check_tokenizers(AutoTokenizer.from_pretrained(models[-1]), AutoTokenizer.from_pretrained(folder))
    for config in map(AutoConfig.from_pretrained, models):
        if not args.cross_documents and not isinstance(config, PrunedConfig):  # no family's; it keeps them apart
            check_documents_apart(random_layer(config, torch.float32))
    text = 0 if args.streaming else (_max_tokens(args) or 0) * (4 if args.cross_documents else 8)  # int32 ids, positions
    weights = sum(spec.num_bytes * 4 // DTYPES[spec.dtype].itemsize for spec in Checkpoint(folder).specs.values())
    # float32 weights and two moments of Adam, for the checkpoints kept and the one being written
    require_space(run.folder, 3 * weights * ((args.save_total_limit or 1) + 1) + text, "the checkpoints of distill")


def tokens(args: Args) -> dict[str, int]:
    """Return how many tokens pass through each model; a training step costs three forward passes."""
    count = args.max_steps * _tokens_per_step(args)
    return {"teacher": max(count, 0), "student": max(3 * count, 0)}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `student/` and `log.json`."""
    source = run.path("prune") / "student"
    tokenizer = AutoTokenizer.from_pretrained(source)
    args.output_dir, args.seed = str(out / CHECKPOINTS), run.seed
    student = load_model(source, torch.float32)
    if not args.cross_documents:
        check_documents_apart(student)
    blocks = _blocks(args, tokenizer, out / CHECKPOINTS)
    trainer = DistillationTrainer(
        student.train(), args.teacher or resolve(run.model), args, train_dataset=blocks, processing_class=tokenizer
    )
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
        (out / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def _tokens_per_step(args: Args) -> int:
    """Count the tokens of an optimizer step on one process."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.block_size


def _max_tokens(args: Args) -> int | None:
    """Count the tokens that all processes train on; `None` when epochs say it."""
    return args.max_steps * _tokens_per_step(args) * args.world_size if args.max_steps > 0 else None


def _sources(args: Args) -> list[Source]:
    return read_sources(args.text, args.split, args.text_column)


def _blocks(args: Args, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Dataset | IterableDataset:
    """Return the training blocks: a stream, or a file that one process makes once, whatever interrupts training later."""
    wanted = _max_tokens(args)
    settings = {"streaming": args.streaming, "cross_documents": args.cross_documents, "shuffle_buffer": args.shuffle_buffer}
    settings |= {"sources": _sources(args), "tokenizer": tokenizer, "block_size": args.block_size, "seed": args.seed}
    if args.streaming:
        return mixed_blocks(**settings)
    path = folder / f"blocks-{wanted or 'all'}"  # another number of processes wants other blocks
    if PartialState().is_main_process and not path.exists():
        with complete_or_absent(path) as unfinished:
            mixed_blocks(**settings, max_tokens=wanted).save_to_disk(unfinished)
    while not path.exists():  # a collective call would give up after some minutes
        time.sleep(0.2)
    return load_from_disk(path).with_format("torch")


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
