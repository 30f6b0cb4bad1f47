"""What the stages that train share: their text, their checkpoints, and a model saved as it was stored."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from hf_minitron.checkpoint import DTYPES, Checkpoint, copy_side_files, require_space, resolve
from hf_minitron.data import load_text, token_blocks
from hf_minitron.distillation.config import ChunkedArguments
from hf_minitron.run import Run


@dataclass
class TextArguments:
    """The text of a section that extends `ChunkedArguments`; stands before it in the list of base classes."""

    text: str = field(default="", metadata={"help": "Training text: a file or a dataset's Hub id. Needed."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    block_size: int = field(default=512, metadata={"min": 2, "help": "Tokens per block."})

    def __post_init__(self):
        super().__post_init__()
        if not self.text:
            raise ValueError("text is missing: the training text, a file or a dataset's Hub id")


def tokens_per_step(args: ChunkedArguments) -> int:
    """Count the tokens of an optimizer step on one process."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.block_size


def tokens_of(args: ChunkedArguments) -> int:
    """Count the tokens of `max_steps` on one process; 0 where epochs are counted instead."""
    return max(args.max_steps * tokens_per_step(args), 0)


def check_checkpoints(run: Run, args: ChunkedArguments, stage: str) -> None:
    """Refuse a disk that cannot hold the checkpoints of a model as large as the run's."""
    weights = sum(spec.num_bytes * 4 // DTYPES[spec.dtype].itemsize for spec in Checkpoint(resolve(run.model)).specs.values())
    # float32 weights and two moments of Adam, for the checkpoints kept and the one being written
    require_space(run.folder, 3 * weights * ((args.save_total_limit or 1) + 1), f"the checkpoints of {stage}")


def load_blocks(args: TextArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Return as many blocks of a section's text as its steps read."""
    documents = load_text(args.text, args.split, args.text_column)
    return token_blocks(documents, tokenizer, args.block_size, tokens_of(args) * args.world_size or None, seed)


def fit(trainer: Trainer) -> None:
    """Train, on all processes; go on from the last complete checkpoint in the trainer's folder."""
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(trainer.args.output_dir)))
    trainer.accelerator.wait_for_everyone()


def save_log(trainer: Trainer, out: Path) -> None:
    """Write `log.json`: how many tokens were read, and what the trainer logged."""
    args, steps = trainer.args, trainer.state.global_step
    log = {"tokens": steps * tokens_per_step(args) * args.world_size, "history": trainer.state.log_history}
    (out / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def save_model(model: PreTrainedModel, state: dict[str, Tensor], source: Path, target: Path) -> None:
    """Write a trained model's folder: weights in the dtype of the folder that it was loaded from, and its side files."""
    dtype = next(DTYPES[spec.dtype] for spec in Checkpoint(source).specs.values())
    model.to(dtype).save_pretrained(target, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
    copy_side_files(source, target)


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
