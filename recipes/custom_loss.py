"""Distill with a loss of your own, from a live or a cached teacher, with the public API: a script to copy and change.

    python recipes/prepare_offline.py     # once: a teacher and text that need no Hub
    accelerate launch recipes/custom_loss.py --output_dir out --max_steps 100 --per_device_train_batch_size 2
    accelerate launch recipes/custom_loss.py --output_dir out --max_steps 100 --per_device_train_batch_size 2 --cache_top_k 64

A loss gets the log-probabilities of student and teacher, one row per token, and returns one number per row. It never sees a
model, a mask, a chunk or a cache, and so works with all of them. In the log it has its name.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_minitron import (
    DistillationArguments,
    DistillationTrainer,
    calibrate,
    load_text,
    prune_model,
    token_blocks,
)
from hf_minitron.distillation.cache import write_cache
from hf_minitron.memory import keep_freed_memory

CACHE = "~/.cache/hf_minitron"


def hellinger(student_logp: torch.Tensor, teacher_logp: torch.Tensor) -> torch.Tensor:
    """Return the squared Hellinger distance of two distributions, between 0 and 1, for each row."""
    return 1 - ((student_logp + teacher_logp) / 2).exp().sum(-1)


@dataclass
class ScriptArguments:
    """What the script knows beside the training arguments."""

    model: str = f"{CACHE}/SmolLM2-135M-Instruct"
    text: str = f"{CACHE}/stdlib/train.jsonl"
    ffn: int = 1024
    block_size: int = 512
    calibration_tokens: int = 32_768
    tokens: int = 102_400
    cache_top_k: int | None = None


def main(script: ScriptArguments, training: DistillationArguments) -> None:
    """Score, prune, distill with the loss above, save."""
    keep_freed_memory()  # of this process, where it trains on a CPU: a fifth faster
    source = str(Path(script.model).expanduser()) if script.model.startswith("~") else script.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    documents = load_text(script.text).train_test_split(test_size=0.1, seed=training.seed)

    # 1. A student, as in width.py.
    calibration = token_blocks(documents["test"], tokenizer, script.block_size, script.calibration_tokens)
    cache = Path(training.output_dir) / "cache"
    statistics = calibrate(teacher, calibration, moments=True)
    student = prune_model(teacher, {"ffn": script.ffn}, statistics)

    # 2. The teacher itself, or its likeliest tokens with the mass of the rest.
    blocks = token_blocks(documents["train"], tokenizer, script.block_size, script.tokens, seed=training.seed)
    if script.cache_top_k is not None:
        write_cache(teacher, blocks, cache, {"top_k": script.cache_top_k})
        teacher = cache

    # 3. The loss is a key of `losses`, here with a quarter of the usual one beside it.
    trainer = DistillationTrainer(student, teacher, training, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # a stock checkpoint with its tokenizer, in --output_dir


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, DistillationArguments))
    parser.set_defaults(losses={hellinger: 1.0, "forward_kl": 0.25})
    main(*parser.parse_args_into_dataclasses())
