"""Stopping: by SIGTERM at the end of a step, and at a loss that is NaN or infinite."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_minitron.checkpoint import Checkpoint, check_finite


@contextmanager
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Act on SIGTERM until the context ends; elsewhere than in the main thread it cannot be heeded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_finite_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a folder that is complete and whose weights are numbers."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    return next((path for path in checkpoints if _is_finite(path)), None)


def _is_finite(checkpoint: Path) -> bool:
    try:
        stored = Checkpoint(checkpoint)
        for name in stored.specs:
            check_finite(name, stored.read(name))
    except ValueError:
        return False
    return (checkpoint / "trainer_state.json").is_file()
