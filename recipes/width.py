"""Prune a model by width and distill it, with the public API: a script to copy and change.

    python recipes/prepare_offline.py     # once: a teacher and text that need no Hub
    accelerate launch recipes/width.py --output_dir out --max_steps 100 --per_device_train_batch_size 2

On eight GPUs with a teacher from the Hub:

    accelerate launch --num_processes 8 recipes/width.py --output_dir out --model meta-llama/Llama-3.1-8B \
        --hidden 3072 --ffn 9216 --text HuggingFaceFW/fineweb-edu:sample-10BT --block_size 4096 --max_steps 1000
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
from hf_minitron.memory import keep_freed_memory

CACHE = "~/.cache/hf_minitron"


@dataclass
class ScriptArguments:
    """What the script knows beside the training arguments."""

    model: str = f"{CACHE}/SmolLM2-135M-Instruct"
    text: str = f"{CACHE}/stdlib/train.jsonl"
    hidden: int = 512
    ffn: int = 1152
    block_size: int = 512
    calibration_tokens: int = 32_768


def main(script: ScriptArguments, training: DistillationArguments) -> None:
    """Score, prune, distill, save."""
    keep_freed_memory()  # of this process, where it trains on a CPU: a fifth faster
    source = str(Path(script.model).expanduser()) if script.model.startswith("~") else script.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    # 1. One forward pass over a little text says what matters.
    documents = load_text(script.text).train_test_split(test_size=0.1, seed=training.seed)
    calibration = token_blocks(documents["test"], tokenizer, script.block_size, script.calibration_tokens)
    statistics = calibrate(teacher, calibration, moments=True)

    # 2. Keep the best-scored channels, and correct the kept weights by least squares.
    student = prune_model(teacher, {"hidden": script.hidden, "ffn": script.ffn}, statistics)

    # 3. Let the student learn from the teacher.
    blocks = token_blocks(documents["train"], tokenizer, script.block_size, seed=training.seed)
    trainer = DistillationTrainer(student, teacher, training, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # a stock checkpoint with its tokenizer, in --output_dir


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, DistillationArguments)).parse_args_into_dataclasses())
