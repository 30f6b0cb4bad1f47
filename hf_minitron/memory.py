"""The process's allocator, and how much memory is free."""

import ctypes
import os
import sys

import psutil
import torch


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next use; does nothing elsewhere, or where an accelerator does the work.

    By default every large buffer of a step is given back to the system and faulted in again, which costs a fifth of a training
    step on a CPU (benchmarks/kd_step.py).
    """
    if sys.platform != "linux" or torch.accelerator.is_available():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold, limit = -1, -3, 2**31 - 1
        libc.mallopt(trim_threshold, limit)
        libc.mallopt(mmap_threshold, limit)


def give_back_freed_memory() -> None:
    """Tell glibc to give freed memory back to the system: each thread's would otherwise stay with it. Nothing elsewhere."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a device; of the CPU's memory this process's share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
