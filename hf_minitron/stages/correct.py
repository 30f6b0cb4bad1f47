"""correct: fine-tune the teacher on the text that distillation will use, so that it knows what it teaches (optional)."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_minitron.checkpoint import load_model, resolve
from hf_minitron.data import check_text
from hf_minitron.distillation.config import ChunkedArguments
from hf_minitron.distillation.correction import add_lora, correction_trainer, merge_lora
from hf_minitron.distillation.losses.chunked import check_logits
from hf_minitron.run import CHECKPOINTS, Run
from hf_minitron.stages.training import (
    TextArguments,
    check_checkpoints,
    fit,
    load_blocks,
    save_log,
    save_model,
    tokens_of,
)

OPTIONAL = True
NEEDS = ()


@dataclass
class Args(TextArguments, ChunkedArguments):
    """The `correct:` section: everything that `TrainingArguments` knows, the text, and LoRA's settings.

    Score and prune start from the model as it is: correction "does not affect which weights to prune", and pruning the original
    while the teacher is corrected was on par (2408.11796, figure 5). To prune the corrected teacher, name its folder as the
    `model` of another recipe.
    """

    learning_rate: float = field(
        default=2e-5,
        metadata={
            "help": "Peak. The paper takes a fifth of the original training's, which no checkpoint tells: a fifth of "
            "distillation's (2408.11796, teacher correction and table 4)."
        },
    )
    warmup_steps: float = field(default=120, metadata={"help": "Steps of warm-up (2408.11796, teacher correction)."})
    lora: dict | None = field(
        default=None,
        metadata={
            "help": "Train low-rank additions and merge them: fields of peft.LoraConfig, or {}; all weights when left out."
        },
    )


def teacher_of(run: Run) -> Path:
    """Return the folder of a run's teacher: the corrected one when there is a `correct:` section."""
    return run.path("correct") / "teacher" if "correct" in run.recipe else resolve(run.model)


def check(args: Args, run: Run) -> None:
    """Refuse a missing text, a warm-up that never ends, settings that LoRA refuses, a disk that is too full."""
    check_text(args.text, args.block_size)
    config = AutoConfig.from_pretrained(resolve(run.model))
    check_logits(config)
    if 0 < args.max_steps <= args.warmup_steps:
        raise ValueError(f"warmup_steps: {args.warmup_steps:g} are not fewer than max_steps: {args.max_steps}; set it lower")
    if args.lora is None:
        check_checkpoints(run, args, "correct")
        return
    known = [setting.name for setting in dataclasses.fields(LoraConfig)]
    for key in args.lora:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            raise ValueError(f"lora: {key!r} is no field of peft.LoraConfig" + (f"; did you mean {near[0]!r}?" if near else ""))
    with torch.device("meta"):  # no weights
        add_lora(AutoModelForCausalLM.from_config(config), args.lora)


def tokens(args: Args) -> dict[str, int]:
    """Return how many tokens pass through the teacher; a training step costs three forward passes."""
    return {"teacher": 3 * tokens_of(args)}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `teacher/`, a checkpoint like the teacher's, and `log.json`."""
    source = resolve(run.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    args.output_dir, args.seed = str(out / CHECKPOINTS), run.seed
    blocks = load_blocks(args, tokenizer, run.seed)
    model = load_model(source, torch.float32).train()
    set_seed(run.seed)  # the additions begin at random
    tuned = model if args.lora is None else add_lora(model, args.lora)
    trainer = correction_trainer(tuned, args, train_dataset=blocks, processing_class=tokenizer)
    fit(trainer)
    if args.lora is None:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        trainer.save_model(out / CHECKPOINTS / "adapter")  # gathered from all processes, whatever the engine
    if trainer.is_world_process_zero():
        if args.lora is not None:
            model = merge_lora(source, out / CHECKPOINTS / "adapter")
            state = model.state_dict()
        save_model(model, state, source, out / "teacher")
        save_log(trainer, out)
