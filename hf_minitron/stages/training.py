"""What the stages that train share: their text, their checkpoints, and a model saved as it was stored."""

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_from_disk
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.core_model_loading import revert_weight_conversion

from hf_minitron.checkpoint import (
    DTYPES,
    NAMES,
    Checkpoint,
    TensorSpec,
    complete_or_absent,
    require_space,
    resolve,
    stored_dtype,
    write_tensors,
)
from hf_minitron.distillation.adapters import merge_lora
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.documents import check_documents_apart
from hf_minitron.environment import environment
from hf_minitron.evaluation.speed import random_model
from hf_minitron.families.family import family_of
from hf_minitron.mixture import Source, check_sources, mixed_blocks, read_sources
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.run import Run
from hf_minitron.saving import copy_side_files, save_config
from hf_minitron.stages.validation import check_evaluation, eval_sources_of


@dataclass
class TextArguments:
    """The text of a section that extends `DistillationArguments`; stands before it in the list of base classes."""

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

    eval_text: str | dict = field(
        default="", metadata={"help": "Text for eval_strategy, as text: held out, for what is trained on tells nothing."}
    )
    eval_tokens: int = field(default=65_536, metadata={"min": 1, "help": "Tokens of eval_text."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"min": 1, "help": "Evaluations without a better metric_for_best_model after which training stops."},
    )
    # of the run, not of a section
    output_dir: str | None = field(default=None, metadata={"help": "Not here: set `run`."})
    seed: int | None = field(default=None, metadata={"help": "Not here: set `seed` at the top."})

    def __post_init__(self):
        for setting in fields(self):
            reason = RESERVED.get("hub_" if setting.name.startswith("hub_") else setting.name)
            if reason and setting.name != "hub_token" and getattr(self, setting.name) != setting.default:
                raise ValueError(f"{setting.name}: {getattr(self, setting.name)!r}, but {reason}")
        super().__post_init__()
        sources_of(self)
        if self.streaming and self.max_steps <= 0:
            raise ValueError(f"streaming: a stream has no end, so max_steps says when training stops; it is {self.max_steps}")
        if 0 < self.max_steps <= self.warmup_steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps:g} are not fewer than max_steps: {self.max_steps}; set it lower"
            )
        check_evaluation(self)


# What `TrainingArguments` has and a section cannot set, and why; `hub_` stands for all that begin with it.
RESERVED = {
    "output_dir": "a run's folder is said once: set `run` at the top of the recipe",
    "seed": "a run has one seed: set `seed` at the top of the recipe",
    "resume_from_checkpoint": "an interrupted stage goes on by itself: start the same command again",
    "save_only_model": "an interrupted stage could not go on from such a checkpoint; leave it out",
    "push_to_hub": "a run is pushed when it is measured: hf-minitron publish --push",
    "hub_": "a run is pushed when it is measured: set publish.repo_id, publish.private, publish.revision",
    "do_train": "it has no effect; leave it out",
    "do_eval": "it has no effect; set eval_strategy and eval_text",
    "do_predict": "it has no effect; leave it out",
    "local_rank": "it has no effect; use accelerate launch",
}


# Size limit of one weights file of a trained model.
MAX_SHARD_BYTES = 5_000_000_000

# What of a section decides which blocks are made of its text.
BLOCK_SETTINGS = (
    "text", "text_column", "split", "block_size", "cross_documents", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "eval_text", "eval_tokens",
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


def check_text_for(args: TextArguments, made: Callable[[str], bool], configs: Sequence[PreTrainedConfig]) -> None:
    """Refuse an unusable text, and models that cannot keep documents apart when asked to.

    Args:
        args (`TextArguments`): The section.
        made (`Callable[[str], bool]`): Whether a text is one that an earlier stage will make.
        configs (`Sequence[PreTrainedConfig]`): Those of the models that will read it.
    """
    wanted = tokens_of(args) * args.world_size or None
    for sources, tokens in ((sources_of(args), wanted), (eval_sources_of(args), args.eval_tokens)):
        if there := [source for source in sources if not made(source.name)]:
            check_sources(there, args.block_size, tokens)
    for config in configs if not args.cross_documents else ():
        if not isinstance(config, PrunedConfig):  # no family's; it keeps them apart
            check_documents_apart(random_model(config, torch.float32))


def check_checkpoints(run: Run, args: DistillationArguments, stage: str) -> None:
    """Refuse a disk that cannot hold a section's blocks, and the checkpoints of a model as large as the run's."""
    text = 0 if args.streaming else tokens_of(args) * args.world_size * (4 if args.cross_documents else 8)  # ids, positions
    config = AutoConfig.from_pretrained(resolve(run.model))
    family = family_of(config)  # from the config alone: with a cache the teacher's weights may be gone
    weights = 4 * family.shape_of(config).num_parameters(family.rows_of(config))
    # float32 weights and two moments of Adam, for the checkpoints kept and the one being written
    require_space(run.folder, 3 * weights * ((args.save_total_limit or 1) + 1) + text, f"the checkpoints of {stage}")


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
    # another number of processes wants other blocks
    return _made_once(folder / f"blocks-{wanted or 'all'}", partial(mixed_blocks, **settings, max_tokens=wanted))


def make_eval_blocks(args: TextArguments, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Dataset | None:
    """Return the blocks for evaluation, a file that one process makes once; `None` where nothing is evaluated."""
    if not (sources := eval_sources_of(args)):
        return None
    settings = {"max_tokens": args.eval_tokens, "cross_documents": args.cross_documents}
    return _made_once(folder / "eval-blocks", partial(mixed_blocks, sources, tokenizer, args.block_size, **settings))


def _made_once(path: Path, make: Callable[[], Dataset]) -> Dataset:
    """Return a dataset that the first process makes, and all read."""
    if PartialState().is_main_process and not path.exists():
        with complete_or_absent(path) as unfinished:
            make().save_to_disk(unfinished)
    while not path.exists():  # a collective call would give up after some minutes
        time.sleep(0.2)
    return load_from_disk(path).with_format("torch")


def fit(trainer: Trainer) -> None:
    """Train, on all processes; go on from the last complete checkpoint in the trainer's folder.

    Raises:
        ValueError: when SIGTERM has stopped it, its checkpoint written.
    """
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(trainer.args.output_dir)))
    trainer.accelerator.wait_for_everyone()
    if trainer.terminated:
        raise ValueError(f"Stopped by SIGTERM after step {trainer.state.global_step}; its checkpoint is written. "
                         "Start the same command again to go on")  # fmt: skip


def save_log(trainer: Trainer, out: Path, **facts) -> None:
    """Write `log.json`, once for all processes: how many tokens were read, what the trainer logged, on what, more."""
    if not trainer.is_world_process_zero():
        return
    args, state = trainer.args, trainer.state
    # as many rows as were found to fit, with auto_find_batch_size
    rows = state.global_step * state.train_batch_size * args.gradient_accumulation_steps * args.world_size
    log = {"tokens": rows * args.block_size, "history": state.log_history, "machine": environment()} | facts
    if args.load_best_model_at_end:
        log["best"] = {"step": state.best_global_step, args.metric_for_best_model: state.best_metric}
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
        write_model(model, state, source, target)


def write_model(model: PreTrainedModel, state: Mapping[str, Tensor], source: Path, target: Path) -> None:
    """Write weights in the dtypes, and all else, of the folder that a model comes from.

    Args:
        model (`PreTrainedModel`): The model, for the names of its tensors on disk.
        state (`Mapping[str, Tensor]`): Its weights, by their names in memory.
        source (`Path`): The folder that the model was loaded from.
        target (`Path`): The folder to write.
    """
    stored, prefix = Checkpoint(source).specs, f"{model.base_model_prefix}."
    # a tied head is written once, with the embedding; transformers cannot see that two copies are one tensor
    state = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    state = revert_weight_conversion(model, state)
    specs, usual = {}, NAMES[stored_dtype(stored.values())]
    for name, tensor in state.items():
        like = stored.get(name) or stored.get(name.removeprefix(prefix)) or stored.get(prefix + name)
        specs[name] = TensorSpec(like.dtype if like else usual, tuple(tensor.shape))
    target.mkdir(parents=True, exist_ok=True)
    tensors = ((name, [tensor.detach().cpu().to(DTYPES[specs[name].dtype])]) for name, tensor in state.items())
    write_tensors(target, specs, tensors, MAX_SHARD_BYTES)
    # the folder's own config: the Trainer has changed the model's for training (use_cache, special tokens)
    save_config(AutoConfig.from_pretrained(source), target, dtype=stored_dtype(specs.values()))
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
