"""What a number was measured with: versions and hardware, without anything that names the machine or its user."""

import os
import platform
from pathlib import Path

import psutil
import torch
import transformers
from accelerate import PartialState

import hf_minitron


def environment() -> dict[str, str | int]:
    """Return the versions of `python`, `torch`, `transformers` and `hf_minitron`, the `hardware` in words, and `processes`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_minitron": hf_minitron.__version__,
        "hardware": _accelerators() or _processor(),
        "processes": PartialState().num_processes,
    }


def _accelerators() -> str | None:
    """Say which accelerators the processes have: one each, or all that a single one sees."""
    if not torch.accelerator.is_available():
        return None
    kind, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    module = getattr(torch, kind, None)
    name = module.get_device_name(0) if hasattr(module, "get_device_name") else kind
    processes = PartialState().num_processes
    return f"{processes if processes > 1 else count} x {name}"


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    return f"{cores} CPU core{'s' * (cores != 1)} ({name}), {memory:.0f} GB of memory"
