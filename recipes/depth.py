"""Drop layers of a model and distill it, with the public API: a script to copy and change.

    python recipes/prepare_offline.py     # once: a teacher and text that need no Hub
    accelerate launch recipes/depth.py --output_dir out --max_steps 100 --per_device_train_batch_size 2

Where many layers go, let the states teach too (2407.14679, table 17):

    accelerate launch recipes/depth.py --output_dir out --layers 15 --max_steps 1000 \
        --losses '{"forward_kl": 1, "block": 1, "embedding": 1}'
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_minitron import (
    Architecture,
    DistillationArguments,
    DistillationTrainer,
    load_text,
    make_plan,
    prune_model,
    token_blocks,
)
from hf_minitron.importance.removal import layer_scores, removal_costs
from hf_minitron.memory import keep_freed_memory

CACHE = "~/.cache/hf_minitron"


@dataclass
class ScriptArguments:
    """What the script knows beside the training arguments."""

    model: str = f"{CACHE}/SmolLM2-135M-Instruct"
    text: str = f"{CACHE}/stdlib/train.jsonl"
    layers: int = 24
    block_size: int = 512
    calibration_tokens: int = 32_768


def main(script: ScriptArguments, training: DistillationArguments) -> None:
    """Score, drop, distill, save."""
    keep_freed_memory()  # of this process, where it trains on a CPU: a fifth faster
    source = str(Path(script.model).expanduser()) if script.model.startswith("~") else script.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    documents = load_text(script.text).train_test_split(test_size=0.1, seed=training.seed)

    # 1. Which contiguous layers does the model miss least? Single ones cost more skill (2408.11796, figure 8).
    calibration = token_blocks(documents["test"], tokenizer, script.block_size, script.calibration_tokens)
    shape = Architecture.of(teacher.config).shape
    target = shape.cut_to({"layers": script.layers})
    size = shape["layers"] - target["layers"]
    layers = layer_scores(removal_costs(teacher, calibration, "loss", size), size)

    # 2. Drop them.
    student = prune_model(teacher, make_plan({"layers": layers}, shape, target))

    # 3. Let the student learn from the teacher.
    blocks = token_blocks(documents["train"], tokenizer, script.block_size, seed=training.seed)
    trainer = DistillationTrainer(student, teacher, training, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # a stock checkpoint with its tokenizer, in --output_dir


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, DistillationArguments)).parse_args_into_dataclasses())
