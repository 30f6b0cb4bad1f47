"""score: one forward pass over some text that says how much every layer, head and channel matters."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from hf_minitron.checkpoint import best_device, best_dtype, load_model, resolve
from hf_minitron.data import check_text, load_text, token_blocks
from hf_minitron.families.family import family_of
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.run import Run

NEEDS = ()


@dataclass(frozen=True)
class Args:
    """The `score:` section."""

    text: str = field(metadata={"help": "Calibration text: .jsonl, .json, .parquet, .csv, .txt, or a dataset's Hub id."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    tokens: int = field(
        default=524_288, metadata={"min": 1, "help": "Tokens to read; 1024 blocks as in 2407.14679, section 4."}
    )
    block_size: int = field(default=512, metadata={"min": 2, "help": "Tokens per block."})
    batch_size: int = field(default=4, metadata={"min": 1, "help": "Blocks per forward pass."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype; auto: bf16 where the processor has it."})


def check(args: Args, run: Run) -> None:
    """Refuse what can be refused before any weight is read."""
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: {args.dtype!r} is none of auto, float32, bfloat16, float16")
    check_text(args.text, args.block_size)
    family_of(AutoConfig.from_pretrained(resolve(run.model)))


def tokens(args: Args) -> dict[str, int]:
    """Return how many tokens pass through each model, counting a forward pass as one and a training step as three."""
    return {"teacher": args.tokens}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `scores.safetensors`."""
    folder, device = resolve(run.model), best_device()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = load_text(args.text, args.split, args.text_column)
    blocks = token_blocks(documents, tokenizer, args.block_size, args.tokens, run.seed)
    dtype = best_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    calibrate(load_model(folder, dtype, device), blocks, args.batch_size).save(out / "scores.safetensors")
