"""What the stages that train share: their text, their checkpoints, and a model saved as it was stored."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import text_config
from hf_minitron.checkpoint.checkpoint import complete_or_absent, require_space
from hf_minitron.data.mixture import Source, check_sources, mixed_blocks, read_mixture, read_sources
from hf_minitron.data.packing import bytes_per_token, check_first_block
from hf_minitron.distillation.adapters import BASES, check_base
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.documents import check_documents_apart, check_layer_kinds
from hf_minitron.distillation.stopping import StopOnSigterm
from hf_minitron.distillation.teachers import check_attention
from hf_minitron.evaluation.speed import random_model
from hf_minitron.inputs import text_files
from hf_minitron.run import CHECKPOINTS, Run
from hf_minitron.stages.resuming import NO_BITS, checkpoint_bytes, last_checkpoint
from hf_minitron.stages.validation import check_evaluation, eval_sources_of
from hf_minitron.waiting import wait_for

logger = logging.getLogger(__name__)


@dataclass
class TextArguments:
    """The text of a section that extends `DistillationArguments`; stands before it in the list of base classes."""

    text: str | dict = field(
        default="",
        metadata={
            "help": "Training text: files or a dataset's Hub id, as for score, or a table of several to weights by tokens.",
            "reads": text_files,
        },
    )
    text_column: str = field(
        default="text", metadata={"help": "Column of the text, messages, completions beside their prompt, or tokens."}
    )
    split: str = field(default="train", metadata={"help": "Split of a folder or a Hub dataset."})
    block_size: int = field(default=512, metadata={"min": 2, "help": "Tokens per packed sequence."})
    cross_documents: bool = field(
        default=True,
        metadata={"help": "Attend to earlier documents of a packed sequence; false: document-masked attention."},
    )
    add_bos_token: bool | None = field(
        default=None, metadata={"help": "Begin documents and blocks with the BOS token; as the tokenizer does when left out."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read text as far as it is needed, rather than fetch and convert all of it first."}
    )
    eval_text: str | dict = field(
        default="",
        metadata={
            "help": "Text for eval_strategy, as text: held out, for what is trained on tells nothing.",
            "reads": text_files,
        },
    )
    eval_tokens: int = field(default=65_536, metadata={"min": 1, "help": "Tokens of eval_text."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"min": 1, "help": "Evaluations without a better metric_for_best_model after which training stops."},
    )
    base_dtype: str = field(
        default="float32",
        metadata={"help": f"How the frozen base of adapters (lora) is held: {', '.join(BASES)} (4 bits, by bitsandbytes)."},
    )
    # of the run, not of a section
    output_dir: str | None = field(default=None, metadata={"help": "Not here: set `run`."})
    seed: int | None = field(default=None, metadata={"help": "Not here: set `seed` at the top."})
    NO_BITS = NO_BITS

    def __post_init__(self):
        for setting in fields(self):
            reason = RESERVED.get("hub_" if setting.name.startswith("hub_") else setting.name)
            if reason and setting.name != "hub_token" and getattr(self, setting.name) != setting.default:
                raise ValueError(f"{setting.name}: {getattr(self, setting.name)!r}, but {reason}")
        super().__post_init__()
        for name, tracker in OF_TRACKERS.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and tracker not in self.report_to:
                raise ValueError(f"{name}: {getattr(self, name)!r} has no effect without report_to: {tracker}; leave it out")
        sources_of(self)
        if 0 < self.max_steps <= self.warmup_steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps:g} are not fewer than max_steps: {self.max_steps}; set it lower"
            )
        if self.max_steps > 0 and self.num_train_epochs != type(self).__dataclass_fields__["num_train_epochs"].default:
            raise ValueError(f"num_train_epochs: {self.num_train_epochs:g} has no effect beside max_steps: {self.max_steps}; "
                             "set max_steps: -1 to count epochs, or leave it out")  # fmt: skip
        check_evaluation(self)
        check_base(self.lora, self.base_dtype)


# Settings that one tracker reads.
OF_TRACKERS = dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "trackio")
# What `TrainingArguments` has and a section cannot set, and why; `hub_` stands for all that begin with it.
RESERVED = {
    "output_dir": "a run's folder is said once: set `run` at the top of the recipe",
    "seed": "a run has one seed: set `seed` at the top of the recipe",
    "resume_from_checkpoint": "an interrupted stage goes on by itself: start the same command again",
    "enable_jit_checkpoint": "on SIGTERM a stage writes a checkpoint without it; leave it out",
    "save_only_model": "an interrupted stage could not go on from such a checkpoint; leave it out",
    "push_to_hub": "a run is pushed when it is measured: hf-minitron publish --push",
    "hub_": "a run is pushed when it is measured: set publish.repo_id, publish.private, publish.revision",
    "do_train": "it has no effect; leave it out",
    "do_eval": "it has no effect; set eval_strategy and eval_text",
    "do_predict": "it has no effect; leave it out",
    "local_rank": "it has no effect; use accelerate launch",
}


# What of a section decides which blocks are made of its text.
PACKING_SETTINGS = (
    "text", "text_column", "split", "streaming", "block_size", "cross_documents", "add_bos_token", "eval_text", "eval_tokens",
)  # fmt: skip
BLOCK_SETTINGS = (*PACKING_SETTINGS, "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")


def sources_of(args: TextArguments) -> list[Source]:
    """Return the sources of a section's text; refuse a text that cannot be read as such."""
    return read_sources(args.text, args.split, args.text_column)


def tokens_per_step(args: DistillationArguments) -> int:
    """Count the tokens of an optimizer step on one process."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.block_size


def tokens_wanted(args: DistillationArguments) -> int | None:
    """Count the tokens that all steps of all processes need; `None`, all, where epochs are counted instead."""
    return tokens_of(args) * args.world_size or None


def tokens_of(args: DistillationArguments) -> int:
    """Count the tokens of `max_steps` on one process; 0 where epochs are counted instead."""
    return max(args.max_steps * tokens_per_step(args), 0)


def check_text_for(
    args: TextArguments,
    made: Callable[[str], bool],
    configs: Sequence[PreTrainedConfig],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, str]:
    """Refuse an unusable text, blocks longer than a model's positions, and models without document-masked attention.

    Returns: what each text that there is holds, as `check_first_block` says it.

    Args:
        args (`TextArguments`): The section.
        made (`Callable[[str], bool]`): Whether a text is one that an earlier stage will make.
        configs (`Sequence[PreTrainedConfig]`): Those of the models that will read it.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
    """
    for config in configs:
        check_positions(config, args.block_size)
        check_attention(config, args.attn_implementation)
    wanted, kinds = tokens_wanted(args), {}
    for sources, tokens in ((sources_of(args), wanted), (eval_sources_of(args), args.eval_tokens)):
        existing = [source for source in sources if not made(source.name)]
        if existing:
            check_sources(existing, args.block_size, tokens)
        for source in existing:
            streaming = args.streaming and tokens is wanted
            where = (source.split, source.column, streaming)
            kinds[source.name] = check_first_block(source.name, tokenizer, args.block_size, None, *where)
    for config in configs if not args.cross_documents else ():
        check_layer_kinds(config)
        check_documents_apart(random_model(config, torch.float32))
    return kinds


def check_positions(config: PreTrainedConfig, block_size: int) -> None:
    """Refuse blocks of more tokens than a model has positions.

    Raises:
        ValueError: with both numbers.
    """
    longest = getattr(text_config(config), "max_position_embeddings", None)
    if longest is not None and block_size > longest:
        raise ValueError(f"block_size: {block_size} is more than the {longest} positions of the model; set it to that or less")


def check_space(
    run: Run, args: DistillationArguments, stage: str, tokenizer: PreTrainedTokenizerBase, model: Architecture
) -> None:
    """Refuse a disk that cannot hold a section's packed text, and the checkpoints of the model that it trains.

    What an interrupted attempt has left is part of both, or goes first. Adapters and epochs of a text of unknown size count as
    nothing.
    """
    tokens = (tokens_wanted(args) or 0) + (args.eval_tokens if eval_sources_of(args) else 0)
    tokens = 0 if stage == "distill" and tokens_made(run) else tokens
    needed = tokens * bytes_per_token(tokenizer, args.block_size, args.cross_documents, args.add_bos_token)
    if args.lora is None:
        when = (args.save_strategy, args.save_steps, args.save_total_limit, args.max_steps)
        needed += checkpoint_bytes(model.shape.num_parameters(model.rows), *when)
    require_space(run.folder, needed - run.left_bytes(stage), f"the text and the checkpoints of {stage}")


def blocks_of(
    args: TextArguments,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    seed: int,
    max_tokens: int | None = None,
    made: Path | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Return the blocks of a section for training and for evaluation.

    Args:
        args (`TextArguments`): The section.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
        out (`Path`): The folder of the stage that reads them.
        seed (`int`): Shuffles the documents.
        max_tokens (`int`, *optional*): How many tokens for training; all when left out.
        made (`Path`, *optional*): Where the stage `tokenize` has made them; they are made here when left out.
    """
    if made is None:  # another number of processes wants other blocks
        path = out / CHECKPOINTS / f"blocks-{max_tokens or 'all'}"
        return make_blocks(args, tokenizer, path, seed, max_tokens), make_eval_blocks(
            args, tokenizer, path.with_name("eval-blocks")
        )
    blocks = read_mixture(made / "train")
    wanted = len(blocks) if max_tokens is None else max_tokens // args.block_size
    if wanted > len(blocks):
        logger.warning("tokenize has made %s of the %s blocks asked for", f"{len(blocks):,}", f"{wanted:,}")
    blocks = blocks.select(range(min(wanted, len(blocks))))
    return blocks, read_mixture(made / "eval") if eval_sources_of(args) else None


def tokens_made(run: Run) -> Path | None:
    """Return where the stage `tokenize` has made the blocks of distill's text; `None` without such a section."""
    return run.path("tokenize") if "tokenize" in run.recipe else None


def make_blocks(
    args: TextArguments, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int, max_tokens: int | None
) -> Dataset:
    """Return the training blocks, files that one process makes once, whatever interrupts training later.

    Args:
        args (`TextArguments`): The section.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
        folder (`Path`): Where to keep them.
        seed (`int`): Shuffles the documents.
        max_tokens (`int`, *optional*): How many tokens; all when left out.
    """
    settings = {"streaming": args.streaming, "cross_documents": args.cross_documents, "add_bos_token": args.add_bos_token}
    settings |= {"sources": sources_of(args), "tokenizer": tokenizer, "block_size": args.block_size, "seed": seed}
    return _made_once(folder, partial(mixed_blocks, **settings, max_tokens=max_tokens))


def make_eval_blocks(args: TextArguments, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Dataset | None:
    """Return the blocks for evaluation, files that one process makes once; `None` where nothing is evaluated."""
    if not (sources := eval_sources_of(args)):
        return None
    settings = {"max_tokens": args.eval_tokens, "cross_documents": args.cross_documents, "add_bos_token": args.add_bos_token}
    return _made_once(folder, partial(mixed_blocks, sources, tokenizer, args.block_size, **settings))


def _made_once(path: Path, make: Callable[..., Dataset]) -> Dataset:
    """Return blocks that the first process makes, and all read."""
    if PartialState().is_main_process and not path.exists():
        with complete_or_absent(path) as unfinished:
            make(folder=unfinished)
    wait_for(path)
    return read_mixture(path)


def train_and_resume(trainer: Trainer) -> str | None:
    """Train, on all processes; go on from the last complete checkpoint in the trainer's folder, and return its name.

    Raises:
        ValueError: when SIGTERM has stopped it, its checkpoint written.
    """
    checkpoints = [last_checkpoint(Path(trainer.args.output_dir)) if PartialState().is_main_process else None]
    (checkpoint,) = broadcast_object_list(checkpoints)
    stop = StopOnSigterm()
    trainer.add_callback(stop)
    with stop:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.wait_for_everyone()
    if stop.stopped:
        raise ValueError(f"Stopped by SIGTERM after step {trainer.state.global_step}; its checkpoint is written. "
                         "Start the same command again to go on")  # fmt: skip
    return checkpoint and Path(checkpoint).name
