"""Where training begins and stops: with each attempt, by SIGTERM at the end of a step, and at a NaN or infinite loss."""

import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_minitron.checkpoint.checkpoint import Checkpoint, check_finite


class StopOnSigterm(TrainerCallback):
    """Save a checkpoint at the end of the step and stop, on all processes at the same step, once one has got SIGTERM.

    The signal's handler is installed in its context only; Python gives no signal to other threads than the main one.

    Attributes:
        stopped (`bool`): Whether training was stopped.
    """

    def __init__(self):
        self.stopped = False

    def __enter__(self) -> "StopOnSigterm":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *error) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def _stop(self, *signal_and_frame) -> None:
        self.stopped = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Stop here if any process has got the signal."""
        self.stopped = bool(reduce(torch.tensor(int(self.stopped), device=args.device), "sum"))
        if self.stopped:
            control.should_save = control.should_training_stop = True


class Attempt(TrainerCallback):
    """Begins each attempt at training, and leaves one that was done before as it was evaluated and saved.

    Args:
        begin (`Callable`): Called where training, or another attempt with a smaller batch, begins.

    Attributes:
        was_done (`bool`): Set where training was resumed at its end.
    """

    def __init__(self, begin: Callable[[], None]):
        self.begin, self.was_done = begin, False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Begin."""
        self.was_done = False
        self.begin()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Evaluate and save nothing again."""
        if self.was_done:
            control.should_evaluate = control.should_save = False


def not_finite(step: int, losses: Sequence[str], folder: Path) -> ValueError:
    """Return the error at a NaN or infinite loss: which of this process, and the last good checkpoint of a folder."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    good = next((path for path in checkpoints if _is_finite(path)), "none")
    what = ", ".join(losses) or "on another process"
    return ValueError(f"NaN or Inf loss at step {step} ({what}). Last good checkpoint: {good}. Use a smaller "
                      "learning_rate, or float32 instead of mixed precision, and start again from there")  # fmt: skip


def _is_finite(checkpoint: Path) -> bool:
    try:
        stored = Checkpoint(checkpoint)
        for name in stored.specs:
            check_finite(name, stored.read(name))
    except ValueError:
        return False
    return (checkpoint / "trainer_state.json").is_file()
