"""score: one forward pass over some text that says how much every layer, head and channel matters."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, AutoTokenizer

from hf_minitron.checkpoint import Checkpoint, best_device, best_dtype, load_model, resolve
from hf_minitron.data import check_text, load_text, token_blocks
from hf_minitron.families.family import family_of
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.pruning.prune import stored_names
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
    moments: bool = field(
        default=True, metadata={"help": "Measure what prune.corrections need as well; takes disk and some time."}
    )
    device_map: str | None = field(default=None, metadata={"help": "auto: spread a large model over all GPUs and the CPU."})
    layer_by_layer: bool | None = field(
        default=None, metadata={"help": "Read one layer at a time from disk; by itself when the model does not fit in memory."}
    )
    state_bytes: int = field(
        default=4_000_000_000, metadata={"min": 0, "help": "Memory for states between layers; what is beyond goes to disk."}
    )


def check(args: Args, run: Run) -> None:
    """Refuse what can be refused before any weight is read."""
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: {args.dtype!r} is none of auto, float32, bfloat16, float16")
    if args.device_map not in (None, "auto"):
        raise ValueError(f"device_map: {args.device_map!r} is neither auto nor left out")
    if args.device_map and PartialState().num_processes > 1:
        raise ValueError("device_map spreads one model over all devices; several processes hold one model each: unset it")
    if args.device_map and args.layer_by_layer:
        raise ValueError("device_map spreads a whole model, layer_by_layer holds one layer: set one of them")
    check_text(args.text, args.block_size)
    folder = resolve(run.model)
    config = AutoConfig.from_pretrained(folder)
    longest = getattr(config, "max_position_embeddings", None) or args.block_size
    if args.block_size > longest:
        raise ValueError(f"block_size: {args.block_size} is more than the {longest} positions of the model")
    stored_names(Checkpoint(folder), config, family_of(config))


def tokens(args: Args) -> dict[str, int]:
    """Return how many tokens pass through each model, counting a forward pass as one and a training step as three."""
    return {"teacher": args.tokens}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `scores.safetensors` and `moments/`. Under `accelerate launch` every process reads its share of the text."""
    folder, device = resolve(run.model), best_device()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = load_text(args.text, args.split, args.text_column)
    blocks = token_blocks(documents, tokenizer, args.block_size, args.tokens, run.seed)
    dtype = best_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    streamed, moments = args.layer_by_layer, out / "moments" if args.moments else None
    if streamed is None:
        decision = [args.device_map is None and not fits(folder, dtype, device)]
        (streamed,) = broadcast_object_list(decision)  # all processes must do the same
    if streamed:
        scores = calibrate(folder, blocks, args.batch_size, dtype, device, args.state_bytes, moments)
    else:
        model = load_model(folder, dtype, args.device_map or device)
        scores = calibrate(model, blocks, args.batch_size, moments=moments)
    if PartialState().is_main_process:
        scores.save(out / "scores.safetensors")


def fits(folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a model's weights, once for every process, take at most four fifths of the device's free memory."""
    numbers = sum(torch.Size(spec.shape).numel() for spec in Checkpoint(folder).specs.values())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return numbers * dtype.itemsize <= 0.8 * free
