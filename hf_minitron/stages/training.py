"""What the stages that train share: their text, their checkpoints, and a model saved as it was stored."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, load_from_disk
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, Trainer

from hf_minitron.checkpoint import DTYPES, Checkpoint, complete_or_absent, require_space, resolve
from hf_minitron.data import check_first_block
from hf_minitron.distillation.adapters import merge_lora
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.documents import check_documents_apart
from hf_minitron.environment import environment
from hf_minitron.evaluation.speed import random_model
from hf_minitron.families.family import family_of
from hf_minitron.inputs import text_files
from hf_minitron.mixture import Source, check_sources, mixed_blocks, read_sources
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.run import Run
from hf_minitron.side_files import copy_side_files
from hf_minitron.stages.resuming import last_checkpoint


@dataclass
class TextArguments:
    """The text of a section that extends `DistillationArguments`; stands before it in the list of base classes."""

    text: str | dict = field(
        default="",
        metadata={
            "help": "Training text: a file, a dataset's Hub id, or a table of several to weights by tokens. Needed.",
            "reads": text_files,
        },
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

    # What is logged, saved, shown and loaded ahead: inherited settings that leave every weight as it is.
    NO_BITS = (
        "logging_dir", "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "log_level",
        "log_level_replica", "log_on_each_node", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm",
        "include_num_input_tokens_seen", "skip_memory_metrics", "save_steps", "save_strategy", "save_total_limit",
        "save_on_each_node", "enable_jit_checkpoint", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "ddp_timeout", "push_to_hub", "hub_model_id",
        "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "torch_empty_cache_steps",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        sources_of(self)
        if self.streaming and self.max_steps <= 0:
            raise ValueError(f"streaming: a stream has no end, so max_steps says when training stops; it is {self.max_steps}")


# What of a section decides which blocks are made of its text.
BLOCK_SETTINGS = (
    "text", "text_column", "split", "block_size", "cross_documents", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps",
)  # fmt: skip


def sources_of(args: TextArguments) -> list[Source]:
    """Return the sources of a section's text; refuse a text that cannot be read as such."""
    return read_sources(args.text, args.split, args.text_column)


def tokens_per_step(args: DistillationArguments) -> int:
    """Count the tokens of an optimizer step on one process."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.block_size


def tokens_of(args: DistillationArguments) -> int:
    """Count the tokens of `max_steps` on one process; 0 where epochs are counted instead."""
    return max(args.max_steps * tokens_per_step(args), 0)


def check_text_for(
    args: TextArguments,
    sources: Sequence[Source],
    configs: Sequence[PreTrainedConfig],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse an unusable text among those that exist already, blocks longer than a model's positions, and models that cannot
    keep documents apart when asked to."""
    for config in configs:
        check_positions(config, args.block_size)
    if sources:
        check_sources(sources, args.block_size, tokens_of(args) * args.world_size or None)
    for source in sources:
        check_first_block(
            source.name, tokenizer, args.block_size, split=source.split, column=source.column, streaming=args.streaming
        )
    for config in configs if not args.cross_documents else ():
        if not isinstance(config, PrunedConfig):  # no family's; it keeps them apart
            check_documents_apart(random_model(config, torch.float32))


def check_positions(config: PreTrainedConfig, block_size: int) -> None:
    """Refuse blocks of more tokens than a model has positions.

    Raises:
        ValueError: with both numbers.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and block_size > longest:
        raise ValueError(f"block_size: {block_size} is more than the {longest} positions of the model; set it to that or less")


def check_checkpoints(run: Run, args: DistillationArguments, stage: str) -> None:
    """Refuse a disk that cannot hold a section's blocks, and the checkpoints of a model as large as the run's.

    What an interrupted attempt has left is part of both, or goes first.
    """
    text = 0 if args.streaming else tokens_of(args) * args.world_size * (4 if args.cross_documents else 8)  # ids, positions
    config = AutoConfig.from_pretrained(resolve(run.model))
    family = family_of(config)  # from the config alone: with a cache the teacher's weights may be gone
    weights = 4 * family.shape_of(config).num_parameters(family.rows_of(config))
    # float32 weights and two moments of Adam, for the checkpoints kept and the one being written
    needed = 3 * weights * ((args.save_total_limit or 1) + 1) + text
    require_space(run.folder, needed - run.left_bytes(stage), f"the checkpoints of {stage}")


def make_blocks(
    args: TextArguments, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int, max_tokens: int | None = None
) -> Dataset | IterableDataset:
    """Return the training blocks: a stream, or a file that one process makes once, whatever interrupts training later.

    Args:
        args (`TextArguments`): The section.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
        folder (`Path`): Where to keep them.
        seed (`int`): Shuffles the documents.
        max_tokens (`int`, *optional*): How many tokens; what all steps of all processes need when left out.
    """
    wanted = max_tokens or tokens_of(args) * args.world_size or None
    settings = {"streaming": args.streaming, "cross_documents": args.cross_documents, "shuffle_buffer": args.shuffle_buffer}
    settings |= {"sources": sources_of(args), "tokenizer": tokenizer, "block_size": args.block_size, "seed": seed}
    if args.streaming:
        return mixed_blocks(**settings)
    path = folder / f"blocks-{wanted or 'all'}"  # another number of processes wants other blocks
    if PartialState().is_main_process and not path.exists():
        with complete_or_absent(path) as unfinished:
            mixed_blocks(**settings, max_tokens=wanted).save_to_disk(unfinished)
    while not path.exists():  # a collective call would give up after some minutes
        time.sleep(0.2)
    return load_from_disk(path).with_format("torch")


def fit(trainer: Trainer) -> None:
    """Train, on all processes; go on from the last complete checkpoint in the trainer's folder.

    Raises:
        ValueError: when SIGTERM has stopped it, its checkpoint written.
    """
    found = [last_checkpoint(Path(trainer.args.output_dir)) if PartialState().is_main_process else None]
    trainer.train(resume_from_checkpoint=broadcast_object_list(found)[0])
    trainer.accelerator.wait_for_everyone()
    if trainer.terminated:
        raise ValueError(f"Stopped by SIGTERM after step {trainer.state.global_step}; its checkpoint is written. "
                         "Start the same command again to go on")  # fmt: skip


def save_log(trainer: Trainer, out: Path, **facts) -> None:
    """Write `log.json`, once for all processes: how many tokens were read, what the trainer logged, on what, more."""
    if not trainer.is_world_process_zero():
        return
    args, steps = trainer.args, trainer.state.global_step
    log = {"tokens": steps * tokens_per_step(args) * args.world_size, "history": trainer.state.log_history}
    log |= {"machine": environment()} | facts
    (out / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def save_trained(trainer: Trainer, source: Path, target: Path) -> None:
    """Write a trained model's folder, gathered from all processes: LoRA merged, in the dtype it was stored in, with side files.

    Args:
        trainer (`Trainer`): It has trained a model of `source`, or a PEFT model made of it.
        source (`Path`): The folder that the model was loaded from.
        target (`Path`): The folder to write.
    """
    model, adapter = trainer.accelerator.unwrap_model(trainer.model_wrapped), Path(trainer.args.output_dir) / "adapter"
    if isinstance(model, PeftModel):
        trainer.save_model(adapter)
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        if isinstance(model, PeftModel):
            model = merge_lora(source, adapter)
            state = model.state_dict()
        dtype, tied = next(DTYPES[spec.dtype] for spec in Checkpoint(source).specs.values()), model.all_tied_weights_keys
        # a tied head is written once, with the embedding; transformers cannot see that two copies are one tensor
        state = {name: tensor.to(dtype) for name, tensor in state.items() if name not in tied}
        model.to(dtype).save_pretrained(target, state_dict=state)
        copy_side_files(source, target)
