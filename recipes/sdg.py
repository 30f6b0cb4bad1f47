"""Let the teacher write the text that its student learns from, with the public API: a script to copy and change.

    python recipes/prepare_offline.py     # once: a teacher and text that need no Hub
    python recipes/sdg.py --output_dir out --documents 200 --max_steps 50 --per_device_train_batch_size 2

`--losses '{"cross_entropy": 1}'` fine-tunes on what was written; the default, forward KL, is classical distillation on it. A
recipe does the same with a `synthesize:` section, on many GPUs, and goes on after an interruption.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_minitron import (
    DistillationArguments,
    DistillationTrainer,
    calibrate,
    load_text,
    prune_model,
    token_blocks,
)
from hf_minitron.distillation.prompts import start_ids
from hf_minitron.distillation.synthesis import Sieve, generate_batch, sampling
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
    documents: int = 200
    prompt_tokens: int = 32
    document_tokens: int = 256
    min_tokens: int = 16
    batch_size: int = 16


def written(script: ScriptArguments, teacher, tokenizer, prompts: Dataset, seed: int) -> Dataset:
    """Return documents that the teacher continues, but those that are empty, short, repetitive or a copy."""
    config = sampling(teacher, tokenizer, script.document_tokens, temperature=0.8, top_p=0.95)
    sieve, kept = Sieve(script.min_tokens, max_repeated=0.1), []
    prompts = prompts.select(range(min(script.documents, len(prompts))))
    for number, batch in enumerate(tqdm(prompts.iter(script.batch_size), "Writing", unit=" batches")):
        starts = start_ids(tokenizer, batch["text"], script.prompt_tokens)
        for start, new in zip(starts, generate_batch(teacher, starts, config, seed + number), strict=True):
            text = tokenizer.decode([*start, *new], skip_special_tokens=True)
            if sieve.keeps(text, new, len(start) + len(new)):
                kept.append(text)
    print(f"{len(kept)} texts kept, rejected: {dict(sieve.rejected)}")
    return Dataset.from_dict({"text": kept})


def main(script: ScriptArguments, training: DistillationArguments) -> None:
    """Score, prune, write, train on what was written, save."""
    keep_freed_memory()  # of this process, where it trains on a CPU: a fifth faster
    source = str(Path(script.model).expanduser()) if script.model.startswith("~") else script.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    documents = load_text(script.text).train_test_split(test_size=0.1, seed=training.seed)

    # 1. A student, as in width.py.
    calibration = token_blocks(documents["test"], tokenizer, script.block_size, script.calibration_tokens)
    statistics = calibrate(teacher, calibration, moments=True)
    student = prune_model(teacher, {"ffn": script.ffn}, statistics)

    # 2. The teacher goes on from the beginnings of documents.
    texts = written(script, teacher, tokenizer, documents["train"], training.seed)

    # 3. The student learns from the teacher on them.
    blocks = token_blocks(texts, tokenizer, script.block_size, seed=training.seed)
    trainer = DistillationTrainer(student, teacher, training, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # a stock checkpoint with its tokenizer, in --output_dir


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, DistillationArguments)).parse_args_into_dataclasses())
