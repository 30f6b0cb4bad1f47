"""`Tensors`: the parameters of a model, in memory or of a checkpoint on disk, under the names of its architecture."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.binding import Parameter
from hf_minitron.architecture.config import auto_class, check_not_quantized, dequantized
from hf_minitron.checkpoint.checkpoint import DTYPES, NAMES, Checkpoint, TensorSpec
from hf_minitron.checkpoint.model_files import resolve

UNTIED = ("The config ties the output head to the embedding, but they are different: set tie_word_embeddings to false in "
          "config.json")  # fmt: skip


class Tensors(Protocol):
    """The parameters of a model. `names` are keys of `architecture.stored`: of parameters, or of their parts on disk."""

    architecture: Architecture

    def names(self) -> Iterable[str]:
        """Return the names, in their order."""

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a tensor."""

    def read(self, name: str) -> Tensor:
        """Return a tensor; mapped from its file, or the model's own, which must not be changed."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Put other values in a tensor's place, in the model or in its file."""


class ModelTensors:
    """The parameters of a model in memory.

    Args:
        model (`PreTrainedModel`): A causal language model.

    Raises:
        ValueError: for a model that is not as its config describes it.
    """

    def __init__(self, model: PreTrainedModel):
        self.architecture = Architecture.of(model.config)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        if head is None or self.architecture.parameters.keys() - tensors.keys():
            raise ValueError(f"{type(model).__name__} is not a causal language model as its config describes it; load it with "
                             f"{auto_class(model.config).__name__}")  # fmt: skip
        if self.architecture.tied_head and head.weight is not embedding.weight:
            raise ValueError(UNTIED)
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items() if name in self.architecture.parameters}

    def names(self) -> Iterable[str]:
        """Return the names, in the model's order."""
        return self._tensors

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a tensor."""
        return TensorSpec(NAMES[self._tensors[name].dtype], tuple(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        """Return the model's own tensor."""
        return self._tensors[name]

    def write(self, name: str, tensor: Tensor) -> None:
        """Put other values in a tensor's place."""
        self._tensors[name].copy_(tensor)


class CheckpointTensors:
    """The parameters of a checkpoint that its model needs.

    What is stored beside them (a tied head, old buffers, layers beyond the last) is left out. A checkpoint may leave out the
    name of the base model (`h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`) and hold every expert by itself.

    Args:
        folder (`str` or `Path`): The folder, or a Hub id.
        architecture (`Architecture`, *optional*): The model's, when it is at hand; that of its `config.json` otherwise.
        dequantize (`bool`, *optional*, defaults to `False`): Whether weights in fp8 or mxfp4 are dequantized as they are read.

    Raises:
        ValueError: for a checkpoint that is quantized, lacks a parameter, holds one in a dtype that cannot be cut, or ties its
            head by config but stores another one.
    """

    def __init__(self, folder: str | Path, architecture: Architecture | None = None, dequantize: bool = False):
        folder = resolve(folder)
        self.architecture = architecture or Architecture.of(config_of(folder, dequantize))
        self.checkpoint = Checkpoint(folder)
        known, in_memory = self.architecture.stored, self.architecture.outline.in_memory
        stored_names = {name: name if name in known else in_memory(name) for name in self.checkpoint.specs}
        self._stored_as = {known[name].name: stored for stored, name in stored_names.items() if name in known}
        for name, first in self.architecture.outline.tied.items():  # RoBERTa's head comes first in the model, and is not stored
            if name in stored_names and first not in self._stored_as:
                self._stored_as[first] = name
        self._slices = dict(self._fused())
        self._stored_as |= {name: stored for name, (stored, _) in self._slices.items()}
        self._chunks = {name: chunks for name, parts in self.architecture.parts.items() if (chunks := self._as_chunks(parts))}
        for name, chunks in self._chunks.items():
            self._stored_as = {part: stored for part, stored in self._stored_as.items() if stored not in chunks}
            self._stored_as[name] = chunks[0]
        for name, stored in self._stored_as.items():
            if known[name].role != "passthrough" and not DTYPES[self.spec(name).dtype].is_floating_point:
                raise ValueError(f"{stored!r} in {folder} is stored as {self.spec(name).dtype}; save the model as bfloat16, "
                                 "float16 or float32 first")  # fmt: skip
        self._check_tied()
        self._check_complete()

    def names(self) -> Iterable[str]:
        """Return the names, in the order of the files."""
        return self._stored_as

    def on_disk(self, name: str) -> str:
        """Return the name that a tensor has in the files; one that they have not is as it is."""
        return name if name in {**self._chunks, **self._slices} else self._stored_as.get(name, name)

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a tensor, from the file's header."""
        spec = self.checkpoint.specs[self._stored_as[name]]
        otherwise = name in self._chunks or name in self._slices or self._turned(name)
        return replace(spec, shape=self.architecture.stored[name].shape) if otherwise else spec

    def read(self, name: str) -> Tensor:
        """Return a tensor, mapped from its file."""
        if name in self._chunks:
            return torch.cat([self.checkpoint.read(chunk) for chunk in self._chunks[name]])
        tensor = self.checkpoint.read(self._stored_as[name])
        if name in self._slices:
            return tensor[self._slices[name][1]]
        return tensor.transpose(1, 2) if self._turned(name) else tensor

    def write(self, name: str, tensor: Tensor) -> None:
        """Put other values in a tensor's place in its file; not of routed experts."""
        stored = self._stored_as[name]
        if name in self._slices:
            whole = self.checkpoint.read(stored).clone()
            whole[self._slices[name][1]] = tensor
            tensor = whole
        self.checkpoint.write(stored, tensor)

    def _fused(self) -> Iterator[tuple[str, tuple[str, slice]]]:
        """Yield the parameters that lie in one tensor with others: the tensor's name, and which of its rows they are."""
        family = self.architecture.family
        for stored in self.checkpoint.specs:
            row, places = axes.match(stored, family.fused) or (None, {})
            start = 0
            for name in (part.format_map(places) for part in family.fused.get(row, ())):
                if name in self.architecture.parameters:  # else of a layer beyond the last
                    size = self.architecture.parameters[name].shape[0]
                    yield name, (stored, slice(start, start + size))
                    start += size

    def _as_chunks(self, parts: Sequence[Parameter]) -> list[str]:
        """Return the names of the parts of a parameter where they were saved as equal chunks of it, not as what they are."""
        names = [self._stored_as[part.name] for part in parts if part.name in self._stored_as]
        shapes = [self.checkpoint.specs[name].shape for name in names]
        alike = len(names) < len(parts) or all(shape == part.shape for shape, part in zip(shapes, parts, strict=True))
        return [] if alike else names

    def _turned(self, name: str) -> bool:
        """Return whether the matrices of routed experts lie transposed in the files (Qwen3-VL's), as Transformers sees."""
        shape, expected = self.checkpoint.specs[self._stored_as[name]].shape, self.architecture.stored[name].shape
        return len(shape) == 3 and shape != expected and (shape[0], shape[2], shape[1]) == expected

    def _check_tied(self) -> None:
        """Refuse a head that is stored beside the embedding it is tied to, when it differs: Transformers would use it."""
        stored = self.checkpoint.specs
        for head, embedding in self.architecture.outline.tied.items():
            row = self.architecture.tied[head].row
            for name in (head, *self.architecture.stored_rows.get(row, ())):
                if name in stored and embedding in self._stored_as:
                    if not torch.equal(self.checkpoint.read(name), self.read(embedding)):
                        raise ValueError(UNTIED)

    def _check_complete(self) -> None:
        for name in self.architecture.parameters:
            parts = [part.name for part in self.architecture.parts.get(name, ())]
            present = [part for part in parts if part in self._stored_as]
            if name not in self._stored_as and (not parts or len(present) < len(parts)):
                absent = next((part for part in parts if part not in present), name) if present else name
                raise ValueError(f"The checkpoint {self.checkpoint.folder} lacks the parameter {absent!r}")


def config_of(folder: str | Path, dequantize: bool = False) -> PreTrainedConfig:
    """Return the config of the tensors of a folder, which says nothing of how they are stored.

    Raises:
        ValueError: for a quantized checkpoint that is not to be dequantized, and for one to be dequantized that cannot be.
    """
    config = AutoConfig.from_pretrained(folder)
    if dequantize:
        return dequantized(config, folder)
    check_not_quantized(config, folder)
    return config


def tensors_of(model: PreTrainedModel | str | Path) -> Tensors:
    """Return the parameters of a model in memory, or of a folder or Hub id."""
    return ModelTensors(model) if isinstance(model, PreTrainedModel) else CheckpointTensors(model)
