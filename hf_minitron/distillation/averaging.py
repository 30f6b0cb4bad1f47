"""An exponential moving average (EMA) of the weights that are trained, which is evaluated and saved in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# The weights that training goes on with, in a checkpoint whose model is their average.
TRAINED = "trained.safetensors"


class WeightAverage(TrainerCallback):
    """Averages weights after every step, by `decay`, and at first by less: (1 + step) / (10 + step).

    Args:
        decay (`float`, *optional*): What the average keeps of itself at a step; without one nothing is averaged.
    """

    def __init__(self, decay: float | None):
        self._decay = decay
        self._weights: dict[str, nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self, model: nn.Module, checkpoint: Path | None) -> None:
        """Begin with a model's weights as their average; in a checkpoint those that training goes on with lie beside them."""
        if self._decay is None:
            return
        self._weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._average = {name: parameter.detach().clone() for name, parameter in self._weights.items()}
        if checkpoint is not None:
            if not (checkpoint / TRAINED).is_file():
                raise ValueError(f"ema_decay: {checkpoint} has no {TRAINED}, for it was trained without; leave it out")
            for name, trained in load_file(checkpoint / TRAINED).items():
                self._weights[name].copy_(trained)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Take the step's weights into the average."""
        if self._average:
            decay = min(self._decay, (1 + state.global_step) / (10 + state.global_step))
            get_ema_multi_avg_fn(decay)([*self._average.values()], [*self._weights.values()], None)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Leave the average in the model, or the best of those that were saved, which is there already."""
        if self._average and not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._swap()
        self._average = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model's weights be their average until the context ends."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save(self, folder: Path) -> None:
        """Write the weights that training goes on with."""
        if self._average:
            save_file({name: weight.detach().cpu().contiguous() for name, weight in self._weights.items()}, folder / TRAINED)

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._average.items():
            weight = self._weights[name].clone()
            self._weights[name].copy_(average)
            average.copy_(weight)
