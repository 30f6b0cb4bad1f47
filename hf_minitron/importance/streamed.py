"""Taps on a model that is larger than memory: its decoder layers pass through memory one at a time.

A layer in memory is a student of one layer, made by the same loop as every other student: so its class, its masks and its
positions are the model's own. All batches go through a layer before the next one is read; between layers their states wait in
memory up to a budget, and beyond it on disk.
"""

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.student import student_config
from hf_minitron.checkpoint import check_finite, require_space
from hf_minitron.importance.taps import Reading, Taps, open_taps, save_moments
from hf_minitron.memory import give_back_freed_memory
from hf_minitron.plan import Plan
from hf_minitron.pruning.prune import prune_tensors
from hf_minitron.tensors import CheckpointTensors


def read_layers(
    folder: Path,
    batches: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype | None,
    device: torch.device,
    state_bytes: int,
    moments: Path | None = None,
    metrics: Mapping[str, str] = MappingProxyType({}),
) -> tuple[PreTrainedConfig, torch.dtype, list[Reading]]:
    """Run a checkpoint over all batches, layer by layer, with its taps open.

    Args:
        folder (`Path`): A model folder.
        batches (`Sequence`): `input_ids` of shape `(batch, seq)`, and `attention_mask` where they are padded.
        dtype (`torch.dtype`, *optional*): Of the weights; as they are stored when left out.
        device (`torch.device`): Where a layer runs.
        state_bytes (`int`): Memory for waiting states.
        moments (`Path`, *optional*): Where to write what corrections need, layer by layer.
        metrics (`Mapping[str, str]`, *optional*): Width axis to the name of its metric.

    Returns:
        `tuple`: The config, the dtype, and what every tap has read.
    """
    config = AutoConfig.from_pretrained(folder)
    architecture, dtype = Architecture.of(config), dtype or config.dtype or torch.float32
    if reason := architecture.inexact.get("layers"):
        raise ValueError(f"This model cannot be scored layer by layer: {reason}. Set layer_by_layer to false")
    loader, readings = _Loader(folder, architecture, dtype, device), []
    layers = architecture.shape["layers"]
    bar = tqdm(total=layers * len(batches), desc="Scoring layer by layer", unit="batch")
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(bar)
        states = stack.enter_context(_waiting_states(batches, config.hidden_size * dtype.itemsize, state_bytes))
        for layer in range(layers):
            give_back_freed_memory()  # the layer's before: loading it has used several threads
            model = loader.model_of(layer)
            with open_taps(model, moments is not None, metrics) as taps:
                found = _read_layer(model, layer, batches, states, bar, device, taps)
            kept = [reading for reading in found if reading.layer is not None or layer == layers - 1]
            readings += save_moments(kept, moments)
    return config, dtype, readings


def _read_layer(
    model: PreTrainedModel,
    layer: int,
    batches,
    states: "_States",
    bar: tqdm,
    device: torch.device,
    taps: Taps,
) -> list[Reading]:
    """Send all batches through one layer; return what its taps, and those beyond the layers, have read."""
    architecture = Architecture.of(model.config)
    ((_, name),) = architecture.taps("layers")
    module = model.get_submodule(name.removeprefix(f"{architecture.prefix}."))
    current = -1

    def enter(module, args, kwargs):  # instead of the embedding, the states that the layer before has left
        if layer == 0:
            return None
        state = states.get(current).to(device)
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    def leave(module, args, kwargs, output):
        states.put(current, output[0] if isinstance(output, tuple) else output)

    hooks = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]
    for batch in batches:
        current += 1
        taps.run(model, batch, device)
        bar.update()
    for hook in hooks:
        hook.remove()
    own = [reading for reading in taps.readings if reading.layer is not None]
    outside = [reading for reading in taps.readings if reading.layer is None]
    names = [re.sub(r"\.0(?=\.|$)", f".{layer}", reading.module, count=1) for reading in own]  # its place in the whole model
    return [dataclasses.replace(r, layer=layer, module=name) for r, name in zip(own, names, strict=True)] + outside


class _Loader:
    """Makes models of one layer from a checkpoint; what lies outside of the layers is read once and shared by them."""

    def __init__(self, folder: Path, architecture: Architecture, dtype: torch.dtype, device: torch.device):
        self.architecture, self.dtype, self.device = architecture, dtype, device
        self.tensors = CheckpointTensors(folder, architecture)
        outside = [name for name in self.tensors.names() if architecture.stored[name].layer is None]
        self.shared = {name: self._read(name).to(device, dtype) for name in outside if architecture.stored[name].role != "head"}

    def model_of(self, layer: int) -> PreTrainedModel:
        """Return the base model with one layer only."""
        shape = self.architecture.shape
        plan = Plan(shape, shape.cut_to({"layers": 1}), {"layers": [layer]})
        pruned = prune_tensors(self.tensors, plan, layer=layer)
        state = {
            name: check_finite(name, axes.join(spec.shape, pieces)) for name, spec, pieces in pruned
        } | self.shared  # what of a layer stays in float32 whatever its dtype, the class knows
        config = student_config(self.architecture, plan)
        model, info = MODEL_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=self.dtype, output_loading_info=True
        )
        assert not info["missing_keys"], f"layer {layer} lacks {info['missing_keys']}"
        return model.to(self.device).eval()

    def _read(self, name: str) -> Tensor:
        return check_finite(name, self.tensors.read(name))


@contextmanager
def _waiting_states(batches: Sequence[Mapping[str, Tensor]], bytes_per_token: int, budget: int):
    """Yield the states of all batches between two layers; refuse what neither budget nor disk can hold."""
    spilled = sum(batch["input_ids"].numel() for batch in batches) * bytes_per_token - budget
    if spilled > 0:
        require_space(Path(tempfile.gettempdir()), spilled, "the states between layers beyond state_bytes")
    with tempfile.TemporaryDirectory(prefix="hf_minitron-states-") as folder:
        yield _States(Path(folder), budget)


class _States:
    """One tensor per batch, in memory up to a budget, beyond it in files."""

    def __init__(self, folder: Path, budget: int):
        self._folder, self._budget = folder, budget
        self._held: dict[int, Tensor] = {}

    def get(self, batch: int) -> Tensor:
        """Return the tensor of a batch, shape `(batch, seq, hidden)`."""
        return self._held[batch] if batch in self._held else load_file(self._path(batch))["states"]

    def put(self, batch: int, states: Tensor) -> None:
        """Keep a tensor in place of the batch's last one."""
        held = sum(tensor.nbytes for other, tensor in self._held.items() if other != batch)
        if held + states.nbytes <= self._budget:
            self._held[batch] = states.cpu()
            return
        self._held.pop(batch, None)
        part = self._path(batch).with_suffix(".part")
        save_file({"states": states.contiguous().cpu()}, part)
        part.replace(self._path(batch))  # the file before it may still be mapped

    def _path(self, batch: int) -> Path:
        return self._folder / f"{batch}.safetensors"
