"""Which checkpoint of a training to go on from: the newest that has everything, so that nothing is resumed by half."""

import json
import logging
import math
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

# What is logged, saved, shown and loaded ahead: settings of TrainingArguments that leave every weight as it is.
NO_BITS = (
    "logging_dir", "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "log_level",
    "log_level_replica", "log_on_each_node", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm",
    "include_num_input_tokens_seen", "skip_memory_metrics", "save_steps", "save_strategy", "save_total_limit",
    "save_on_each_node", "enable_jit_checkpoint", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "ddp_timeout", "push_to_hub", "hub_model_id",
    "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "torch_empty_cache_steps",
)  # fmt: skip

# What a checkpoint must hold: any of the names under which the Trainer's engines save it (one process or DDP, FSDP, DeepSpeed).
PARTS = {
    "weights": ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model_fsdp*", "global_step*"),
    "the optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "the schedule": ("scheduler.pt", "global_step*"),
    "the random state": ("rng_state*.pth",),
}


def checkpoints_at_once(save_strategy: str, save_steps: float, save_total_limit: int | None, max_steps: int) -> int:
    """Return how many checkpoints lie on the disk at once: those that are kept, and the one being written.

    >>> checkpoints_at_once("steps", save_steps=0.6, save_total_limit=2, max_steps=90)  # at steps 54 and 90
    2
    """
    most = (save_total_limit or 1) + 1
    if save_strategy == "steps" and max_steps > 0:
        interval = save_steps if save_steps >= 1 else math.ceil(max_steps * save_steps)
        return min(most, math.ceil(max_steps / interval))  # transformers writes one after the last step, too
    return 0 if save_strategy == "no" else most


def checkpoint_bytes(parameters: int, *when: Any) -> int:
    """Return the bytes that checkpoints take at once: float32 weights and two moments of Adam.

    Args:
        parameters (`int`): Those that are trained.
        when: As for `checkpoints_at_once`.
    """
    return 3 * torch.float32.itemsize * parameters * checkpoints_at_once(*when)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that is whole; those after it, damaged or half-written, are named and deleted."""
    numbers = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    paths = sorted((path for path, match in numbers.items() if match), key=lambda path: -int(numbers[path][1]))
    broken = []
    for path in paths:
        reason = incomplete(path)
        if reason is None:
            break
        broken.append(f"{path.name} ({reason})")
        shutil.rmtree(path, ignore_errors=True)
    else:
        path = None
    if broken:
        logger.warning("Not whole: %s. Training goes on from %s", ", ".join(broken), path.name if path else "its beginning")
    return path and str(path)


def incomplete(checkpoint: Path) -> str | None:
    """Say what a checkpoint lacks or which of its files is damaged; `None` when it is whole."""
    try:
        steps = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        if not isinstance(steps, int):
            raise ValueError(steps)
    except (OSError, ValueError, TypeError, KeyError):
        return "trainer_state.json is missing or damaged"  # written last
    for part, names in PARTS.items():
        if not any(any(checkpoint.glob(name)) for name in names):
            return f"{part} is missing" if part != "weights" else "weights are missing"
    index = checkpoint / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{index.name} is damaged"
    missing = sorted(shard for shard in shards if not (checkpoint / str(shard)).is_file())
    if missing:
        return f"{missing[0]} is missing"
    return next((f"{path.name} is damaged" for path in sorted(checkpoint.iterdir()) if _damaged(path)), None)


def _damaged(path: Path) -> bool:
    """Return whether a file that PyTorch or safetensors has written is cut off: the one ends, the other begins with a table."""
    if path.suffix in (".pt", ".pth", ".bin") and path.is_file() and path.name != "training_args.bin":
        return not zipfile.is_zipfile(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return False
        except (SafetensorError, OSError):
            return True
    return False
