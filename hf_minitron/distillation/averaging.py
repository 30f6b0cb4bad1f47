"""An exponential moving average (EMA) of the weights that are trained, which is evaluated and saved in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# The weights that training goes on with, in a checkpoint whose model is their average. With FSDP it holds both: accelerate
# resumes from weights that it has written by itself, which are not averaged.
TRAINED, AVERAGE = "trained.safetensors", "average.safetensors"


class WeightAverage(TrainerCallback):
    """Averages weights after every step, by `decay`, and at first by less: (1 + step) / (10 + step).

    Args:
        decay (`float`, *optional*): What the average keeps of itself at a step; without one nothing is averaged.
    """

    def __init__(self, decay: float | None):
        self._decay = decay
        self._weights: dict[str, nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}
        self._sharded: list[FSDPModule] = []

    @torch.no_grad()
    def begin(self, model: nn.Module, checkpoint: Path | None) -> None:
        """Begin with a model's weights as their average; in a checkpoint those that training goes on with lie beside them."""
        if self._decay is None:
            return
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._average = {name: _local(parameter).clone() for name, parameter in self._weights.items()}
        if checkpoint is not None:
            if not (checkpoint / TRAINED).is_file():
                raise ValueError(f"ema_decay: {checkpoint} has no {TRAINED}, for it was trained without; leave it out")
            for name, trained in load_file(checkpoint / TRAINED).items():
                _local(self._weights[name]).copy_(self._own_part(name, trained))
            for name, average in load_file(checkpoint / AVERAGE).items() if (checkpoint / AVERAGE).is_file() else ():
                self._average[name].copy_(self._own_part(name, average))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Take the step's weights into the average."""
        if self._average:
            decay = min(self._decay, (1 + state.global_step) / (10 + state.global_step))
            get_ema_multi_avg_fn(decay)([*self._average.values()], [*map(_local, self._weights.values())], None)

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

    def save(self, folder: Path, writes: bool) -> None:
        """Gather the weights that training goes on with, on all processes; the one that `writes` writes them."""
        self._gather(folder / TRAINED, writes)
        if self._sharded:
            with self.applied():
                self._gather(folder / AVERAGE, writes)

    def _gather(self, path: Path, writes: bool) -> None:
        whole = {}
        for name, weight in self._weights.items() if self._average else ():
            gathered = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if writes:
                whole[name] = gathered.detach().cpu().contiguous()
        if whole:
            save_file(whole, path)

    def _own_part(self, name: str, whole: Tensor) -> Tensor:
        """Return what this process holds of a whole weight."""
        weight = self._weights[name]
        if not isinstance(weight, DTensor):
            return whole
        return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements).to_local()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._average.items():
            weight, trained = _local(self._weights[name]), _local(self._weights[name]).clone()
            weight.copy_(average)
            average.copy_(trained)
        for module in self._sharded:  # what it has gathered before is of other weights
            module.reshard()


def _local(weight: Tensor) -> Tensor:
    """Return what this process holds of a weight: with FSDP2 its shard."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight
