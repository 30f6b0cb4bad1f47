"""What the processes of a command do alone or for each other.

They wait for another one on a file: a collective call would give up after ten minutes, and keep accelerators busy.
"""

import gc
import itertools
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, patch_environment

T = TypeVar("T")
READY = ("ready-0", "ready-1")  # by turns: a process may look for the next one before the last one is deleted
_turns = itertools.cycle(READY)


def wait_for(*paths: Path) -> None:
    """Wait until one of some files or folders exists."""
    while not any(path.exists() for path in paths):
        time.sleep(0.1)


def from_first(folder: Path, value: T = None) -> T:
    """Return the first process's value on every process, however long that has worked for it.

    Args:
        folder (`Path`): A folder that all processes see; the first one makes it when it is missing.
        value (`Any`, *optional*): The first process's value; what the others give is not looked at.
    """
    state = PartialState()
    if state.num_processes == 1:
        return value
    ready = folder / next(_turns)  # one that a killed command has left only makes the others wait in the collective call
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        ready.touch()
    wait_for(ready)
    shared = broadcast_object_list([value])
    state.wait_for_everyone()  # all have seen the file
    if state.is_main_process:
        ready.unlink()
    return shared[0]


def by_every_process() -> AbstractContextManager:
    """Return a context in which each process loads weights, whatever FSDP is told: most models here are never wrapped."""
    return patch_environment(fsdp_cpu_ram_efficient_loading="false")


def end_group() -> None:
    """Free the process group and its threads: one of gloo's lets go of a tensor late, which aborts an interpreter that ends."""
    gc.collect()  # a trainer, in cycles with itself, holds the group
    PartialState().destroy_process_group()
