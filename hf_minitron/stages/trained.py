"""What a stage that trains leaves behind: its log, and the model in the dtypes and files of the one that it came from."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Trainer, set_seed
from transformers.core_model_loading import revert_weight_conversion

from hf_minitron.checkpoint.checkpoint import DTYPES, NAMES, Checkpoint, TensorSpec, load_model, stored_dtype, write_tensors
from hf_minitron.checkpoint.saving import copy_side_files, save_config
from hf_minitron.distillation.adapters import add_lora, load_base, merge_lora
from hf_minitron.distillation.batch import rows_read
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.engine import sharded_loading
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.environment import environment
from hf_minitron.probe import base_name
from hf_minitron.run import CHECKPOINTS, Run
from hf_minitron.stages.training import TextArguments, blocks_of, tokens_wanted, train_and_resume
from hf_minitron.stages.validation import callbacks_of
from hf_minitron.terminal import show_stage

# Size limit of one weights file of a trained model.
MAX_SHARD_BYTES = 5_000_000_000


def train_model(
    args: TextArguments,
    run: Run,
    source: Path,
    teacher: CachedTeacher | str | Path | None,
    out: Path,
    name: str,
    made: Path | None = None,
    **facts,
) -> DistillationTrainer:
    """Train the model of a folder; write it to a folder in `out`, beside `log.json`.

    Args:
        args (`TextArguments`): The section, which is also `DistillationArguments`.
        run (`Run`): The run.
        source (`Path`): The folder of the model.
        teacher (`CachedTeacher`, `str`, `Path` or `None`): As for `DistillationTrainer`.
        out (`Path`): The stage's folder.
        name (`str`): Of the folder of the trained model.
        made (`Path`, *optional*): Where its blocks are, as for `blocks_of`.
        **facts: More for the log.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    args.output_dir, args.seed = str(out / CHECKPOINTS), run.seed
    blocks, eval_blocks = blocks_of(args, tokenizer, out, run.seed, tokens_wanted(args), made)
    if args.lora is None:
        sharding = sharded_loading(args, AutoConfig.from_pretrained(source), trained=True)
        model = load_model(source, torch.float32, distributed_config=sharding).train()
        set_seed(run.seed)
    else:
        model = load_base(source, args.base_dtype, args.device).train()
        set_seed(run.seed)  # LoRA's additions begin at random
        model = add_lora(model, args.lora)
    callbacks = callbacks_of(args)
    data = {"train_dataset": blocks, "eval_dataset": eval_blocks, "processing_class": tokenizer}
    trainer = DistillationTrainer(model, teacher, args, callbacks=callbacks, **data)
    show_stage(trainer, out.name.removesuffix(".tmp"))
    resumed = train_and_resume(trainer)
    save_trained(trainer, source, out / name)
    save_log(trainer, out, resumed=resumed, **facts)
    return trainer


def save_log(trainer: Trainer, out: Path, **facts) -> None:
    """Write `log.json`, once for all processes: steps, tokens, losses and their weights, what was logged, on what, more."""
    if not trainer.is_world_process_zero():
        return
    args, state = trainer.args, trainer.state
    log = {
        "steps": state.global_step,
        "tokens": rows_read(trainer) * args.block_size,
        "packed_tokens": len(trainer.train_dataset) * args.block_size,  # fewer where they are read again
        "losses": dict(args.losses),
        "precision": "bf16 mixed" if args.bf16 else "fp16 mixed" if args.fp16 else "float32",
        "history": state.log_history,
        "machine": environment(),
        **facts,
    }
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
    stored, prefix = Checkpoint(source).specs, f"{base_name(model)}."
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
