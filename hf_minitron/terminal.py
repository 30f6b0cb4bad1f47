"""What the command shows while it works: one progress bar of the stage that runs, and none of libraries that load or save."""

from logging import CRITICAL

import datasets
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging


def quiet_libraries() -> None:
    """Show no bars of loading weights, saving shards and reading data sets from now on; that of downloading weights stays."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(CRITICAL)  # of a broken file, which is told in one line


class StageBar(TrainerCallback):
    """One bar for all of training: the stage, the time left, and the losses; in place of the Trainer's bar and printed logs.

    Args:
        stage (`str`): Its label.
    """

    def __init__(self, stage: str):
        self.stage = stage
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Open the bar, at the step that training goes on from."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs) -> None:
        """Show the losses beside the bar."""
        shown = {name: logs[name] for name in ("loss", "eval_loss", "learning_rate", "tokens_per_second") if name in logs}
        if self._bar is not None and shown:
            self._bar.set_postfix(shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def show_stage(trainer: Trainer, stage: str) -> None:
    """Let a trainer show one bar with a stage's name."""
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(StageBar(stage))
