"""Taps on a model that is larger than memory: its decoder layers pass through memory one at a time.

A layer in memory is a student of one layer, made by the same loop as every other student: so its class, its masks and its
positions are the model's own. All batches go through a layer before the next one is read; between layers their states wait in
memory up to a budget, and beyond it on disk.
"""

import re
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import dequantizing
from hf_minitron.architecture.outline import outline
from hf_minitron.architecture.student import student_config
from hf_minitron.checkpoint.checkpoint import check_finite, require_space
from hf_minitron.checkpoint.tensors import CheckpointTensors, Tensors, config_of
from hf_minitron.importance.metrics import Chosen
from hf_minitron.importance.taps import Reading, check_activations, open_taps, run_batch, take_moments
from hf_minitron.memory import give_back_freed_memory
from hf_minitron.plan import Plan
from hf_minitron.probe import Visit, probe
from hf_minitron.pruning.prune import prune_tensors
from hf_minitron.shape import ShapeError
from hf_minitron.statistics import Moments
from hf_minitron.waiting import by_every_process


def read_layers(
    folder: Path,
    batches: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype | None,
    device: torch.device,
    state_bytes: int,
    metrics: Mapping[str, Chosen],
    moments: Moments | None,
) -> tuple[PreTrainedConfig, torch.dtype, list[Reading]]:
    """Run a checkpoint over all batches, layer by layer, with its taps open; put moments, where asked for, into `moments`.

    Returns:
        `tuple`: The config, the dtype, and the readings of what is scored.
    """
    quantized = bool(dequantizing(AutoConfig.from_pretrained(folder)))
    config = config_of(folder, dequantize=quantized)
    architecture, dtype = Architecture.of(config), dtype or config.dtype or torch.float32
    check_streamable(architecture)
    loader, scores = LayerLoader(CheckpointTensors(folder, architecture, quantized), dtype, device), []
    layers, module = architecture.shape["layers"], architecture.taps("layers")[0][1]
    bar = tqdm(total=layers * len(batches), desc="Scoring layer by layer", unit="batch")

    def read_layer(layer: int, model: PreTrainedModel) -> list[Reading]:
        before = [(module, states.enter)] if layer else []
        with (
            open_taps(model, moments is not None, metrics, architecture.like(model.config)) as readings,
            probe(model, [(module, states.leave)], before),
        ):
            for states.batch, batch in enumerate(batches):
                run_batch(model, batch, device)
                check_activations(model, readings)
                bar.update()
        outside = [reading for reading in readings if reading.layer is None]
        own = [replace(r, layer=layer, module=whole_name(r.module, layer)) for r in readings if r.layer is not None]
        return own + outside if layer == layers - 1 else own

    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(bar)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        states = stack.enter_context(_waiting_states(batches, architecture.shape["hidden"] * dtype.itemsize, state_bytes))
        coming = deque([pool.submit(loader.read, 0)])
        for layer in range(layers):
            if layer + 1 < layers:  # while this one is run
                coming.append(pool.submit(loader.read, layer + 1))
            scores += take_moments(read_layer(layer, loader.model_of(layer, coming.popleft().result())), moments)
            give_back_freed_memory()  # the layer's: loading it has used several threads
    return config, dtype, scores


def check_streamable(architecture: Architecture) -> None:
    """Refuse a model whose layers do not compute the same wherever they stand."""
    known = {**architecture.inexact_for_text, **architecture.shape.fixed}
    if reason := next((why for axis, why in known.items() if axes.axis_of_placeholder(axis) == "layers"), None):
        raise ValueError(f"This model cannot be scored layer by layer: {reason}. Load the whole model")
    for layer in {layers[0] for layers in architecture.shape.layer_kinds.values()}:
        try:
            student_config(architecture, _one_layer(architecture, layer))
        except ShapeError as error:
            raise ValueError(f"This model cannot be scored layer by layer: {error}. Load the whole model") from error


def _one_layer(architecture: Architecture, layer: int) -> Plan:
    """Return the plan that keeps one layer as it is."""
    return Plan(architecture.shape, architecture.shape.with_layers([layer]), {"layers": [layer]})


def whole_name(name: str, layer: int) -> str:
    """Return the name in the whole model of what a model of one layer names."""
    return re.sub(r"\.0(?=\.|$)", f".{layer}", name, count=1)


class LayerLoader:
    """Makes models of one layer from a model's tensors; what lies outside of the layers is read once and shared by them.

    A layer is read by another thread, which on CUDA copies it from pinned memory by a stream of its own.
    """

    def __init__(self, tensors: Tensors, dtype: torch.dtype, device: torch.device):
        self.tensors, self.dtype, self.device = tensors, dtype, device
        self.architecture = architecture = tensors.architecture
        self._streams = (torch.cuda.Stream(device), torch.cuda.current_stream(device)) if device.type == "cuda" else None
        outside = [name for name in self.tensors.names() if architecture.stored[name].layer is None]
        self.shared = {
            name: check_finite(name, self.tensors.read(name)).to(device, dtype)
            for name in outside
            if architecture.stored[name].role != "head"
        }

    def read(self, layer: int) -> dict[str, Tensor]:
        """Return the tensors of a layer, on the device where that is CUDA."""
        pruned = prune_tensors(self.tensors, _one_layer(self.architecture, layer), layer=layer)
        # what of a layer stays in float32 whatever its dtype, the class knows
        own = {name: check_finite(whole_name(name, layer), axes.join(spec.shape, pieces)) for name, spec, pieces in pruned}
        if self._streams is None:
            return own
        copying, running = self._streams
        with torch.cuda.stream(copying):
            own = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in own.items()}
        copying.synchronize()
        for tensor in own.values():
            tensor.record_stream(running)  # where it is used, so that its memory is not taken before
        return own

    def model_of(self, layer: int, own: Mapping[str, Tensor]) -> PreTrainedModel:
        """Return the base model with one layer only, of its tensors from `read`."""
        prefix = f"{self.architecture.prefix}."
        state = {name.removeprefix(prefix): tensor for name, tensor in {**own, **self.shared}.items()}
        config = student_config(self.architecture, _one_layer(self.architecture, layer))
        with by_every_process():
            model, info = MODEL_MAPPING[type(config)].from_pretrained(
                None, config=config, state_dict=state, dtype=self.dtype, device_map={"": self.device}, output_loading_info=True
            )
        parameters = {name.removeprefix(prefix) for name in outline(config).parameters}  # without BERT's pooler
        missing = parameters & set(info["missing_keys"])
        assert not missing, f"layer {layer} lacks {missing}"
        return model.to(self.device).eval()


@contextmanager
def _waiting_states(batches: Sequence[Mapping[str, Tensor]], bytes_per_token: int, budget: int):
    """Yield the states of all batches between two layers; refuse what neither budget nor disk can hold."""
    spilled = sum(batch["input_ids"].numel() for batch in batches) * bytes_per_token - budget
    if spilled > 0:
        require_space(Path(tempfile.gettempdir()), spilled, "the states between layers beyond state_bytes")
    with tempfile.TemporaryDirectory(prefix="hf_minitron-states-") as folder:
        yield _States(Path(folder), budget)


class _States:
    """What waits between two layers: one tensor per batch, in memory up to a budget, beyond it in files."""

    def __init__(self, folder: Path, budget: int):
        self.batch = 0  # the one under way
        self._folder, self._budget = folder, budget
        self._held: dict[int, Tensor] = {}

    def enter(self, visit: Visit) -> Tensor:
        """Return what the layer before has left, `(batch, seq, hidden)`, to take the place of the embeddings."""
        held = self._held.get(self.batch)
        return (load_file(self._path)["states"] if held is None else held).to(visit.input.device)

    def leave(self, visit: Visit) -> None:
        """Keep what the layer gives in place of the batch's last states."""
        states, waiting = visit.states, sum(tensor.nbytes for other, tensor in self._held.items() if other != self.batch)
        if waiting + states.nbytes <= self._budget:
            self._held[self.batch] = states.cpu()
            return
        self._held.pop(self.batch, None)
        part = self._path.with_suffix(".part")
        save_file({"states": states.contiguous().cpu()}, part)
        part.replace(self._path)  # the file before it may still be mapped

    @property
    def _path(self) -> Path:
        return self._folder / f"{self.batch}.safetensors"
