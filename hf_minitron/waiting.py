"""What the processes of a command do alone or for each other.

They wait for another one on a file: a collective call would give up after ten minutes, and keep accelerators busy.
"""

import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, patch_environment

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")
READY = ("ready-0", "ready-1")  # by turns: a process may look for the next one before the last one is deleted
_turns = itertools.cycle(READY)
ALIVE = "alive-"  # and the process's number
_seen: dict[Path, bool] = {}  # the files of other processes, and whether they were held


@contextmanager
def together(folder: Path) -> Iterator[None]:
    """Let processes that wait for each other notice when one has ended, however that was; all of them call this.

    Each holds a lock on a file of its own, which the system takes from a process that ends. The first one looks at all others,
    and they look at it.

    Args:
        folder (`Path`): A folder that all processes see; it is made when it is missing.
    """
    state = PartialState()
    if state.num_processes == 1 or fcntl is None:
        yield
        return
    others = range(1, state.num_processes) if state.is_main_process else [0]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{ALIVE}{state.process_index}"
    with path.open("w") as own:
        fcntl.flock(own, fcntl.LOCK_EX)
        _seen.update({folder / f"{ALIVE}{number}": False for number in others})
        try:
            yield
        finally:
            _seen.clear()
            path.unlink()


def wait_for(*paths: Path) -> None:
    """Wait until one of some files or folders exists.

    Raises:
        ValueError: when a process has ended that works `together` with this one.
    """
    for turn in itertools.count():
        if any(path.exists() for path in paths):
            return
        for other, seen in _seen.items() if turn % 10 == 9 else ():
            _seen[other] = _is_held(other)
            if seen and not _seen[other] and not any(path.exists() for path in paths):
                raise ValueError(f"Process {other.name.removeprefix(ALIVE)} has ended, for which this one has waited. Mend "
                                 "what that one tells, and start the same command again to go on")  # fmt: skip
        time.sleep(0.1)


def _is_held(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


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


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work as if there were no others: what it calls splits nothing, and waits for nobody."""
    shared = vars(PartialState())  # of all of them; arguments of a Trainer make it anew
    before = dict(shared)
    shared.update(distributed_type=DistributedType.NO, num_processes=1, process_index=0, local_process_index=0)
    try:
        with patch_environment(world_size="1", rank="0", local_rank="-1"):
            yield
    finally:
        shared.clear()
        shared.update(before)


def by_every_process() -> AbstractContextManager:
    """Return a context in which each process loads weights, whatever FSDP is told: most models here are never wrapped."""
    return patch_environment(fsdp_cpu_ram_efficient_loading="false")


def end_group() -> None:
    """Free the process group and its threads: one of gloo's lets go of a tensor late, which aborts an interpreter that ends."""
    gc.collect()  # a trainer, in cycles with itself, holds the group
    PartialState().destroy_process_group()
