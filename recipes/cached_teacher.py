"""Precompute a teacher's outputs and distill from them without it, with the public API: a script to copy and change.

    python recipes/prepare_offline.py     # once: a teacher and text that need no Hub
    accelerate launch recipes/cached_teacher.py --output_dir out --max_steps 100 --per_device_train_batch_size 2

The cache stays in the output folder: another run with the same text and teacher finds it, whatever its student and settings.
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


@dataclass
class ScriptArguments:
    """What the script knows beside the training arguments."""

    model: str = f"{CACHE}/SmolLM2-135M-Instruct"
    text: str = f"{CACHE}/stdlib/train.jsonl"
    ffn: int = 1024
    block_size: int = 512
    calibration_tokens: int = 32_768
    tokens: int = 102_400
    draws: int = 50


def main(script: ScriptArguments, training: DistillationArguments) -> None:
    """Score, prune, precompute the teacher, train, save."""
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

    # 2. Precompute the teacher's outputs; started again, this goes on where it was interrupted.
    blocks = token_blocks(documents["train"], tokenizer, script.block_size, script.tokens, seed=training.seed)
    facts = write_cache(teacher, blocks, cache, {"random": script.draws}, seed=training.seed)
    print(f"{facts['tokens']:,} tokens, {facts['bytes_per_token']:.1f} bytes each")
    del teacher

    # 3. Train from the cache; rows are found by their tokens.
    trainer = DistillationTrainer(student, cache, training, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # a stock checkpoint with its tokenizer, in --output_dir


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, DistillationArguments)).parse_args_into_dataclasses())
