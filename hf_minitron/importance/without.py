"""Running a model without some of its layers or sublayers: the former are the identity, the latter zeroed.

So masks, positions and the last norm are the class's own, whatever the family. Nothing before a block of layers changes when it
is left out: one pass keeps the input of every layer, and what the model says without a block needs only the layers behind it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.probe import Visit, base_model, probe


def layer_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's layers, in order."""
    return [name for _, name in Architecture.of(model.config).taps("layers")]


@contextmanager
def without_layers(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[None]:
    """Let some layers of a model be the identity until the context ends. Its other layers keep their numbers."""
    architecture, names = Architecture.of(model.config), layer_names(model)
    attends = {layer for layer, _ in architecture.taps("heads")}
    identity = {names[layer]: partial(_identity, architecture, layer if layer in attends else None) for layer in layers}
    with probe(model, _as_given(identity)) if architecture.shape.staying else probe(model, instead=identity):
        yield


def _as_given(layers: Iterable[str]) -> list[tuple[str, Callable[[Visit], Tensor]]]:
    """Return what lets layers run and give their input: later ones may need what they make beside their states."""
    return [(layer, lambda visit: visit.input) for layer in layers]


def _identity(architecture: Architecture, layer: int | None, visit: Visit) -> Any:
    """Return a layer's input as it would return its output.

    In a cache, an empty entry counts the tokens where the layer is one of attention: the class may ask it how many there are.
    """
    cache = next((value for value in (*visit.args, *visit.kwargs.values()) if isinstance(value, Cache)), None)
    if cache is not None and layer is not None:
        entry = visit.input[:, None, :, :1]  # (batch, one head, seq, one number)
        cache.update(entry, entry, layer)
    return _output(architecture, visit.name, visit.input)


def _output(architecture: Architecture, layer: str, states: Tensor) -> Any:
    """Return states in the form in which a layer gives them: some classes' layers give a tuple."""
    length = architecture.trace.tuples.get(layer)
    return states if length is None else (states, *[None] * (length - 1))


class Removal(NamedTuple):
    """What a model is run without: contiguous layers, or a layer's attention or MLP."""

    block: range  # an empty one says where `zeroed` begins to matter
    zeroed: tuple[str, ...] = ()  # projections behind it whose output is zeroed


@dataclass(frozen=True)
class WholePass:
    """One batch through the whole model, with the states that it leaves between the layers."""

    model: PreTrainedModel
    inputs: Mapping  # what its base model is called with
    text_mask: Tensor  # (batch, seq): where there is text and no padding
    states: list[Tensor]  # the input of every layer and the output of the last, each (batch, seq, hidden)
    last: Tensor  # (tokens, hidden): the last hidden states of the text
    labels: Tensor  # (batch, seq)

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Mapping[str, Tensor], device: torch.device) -> "WholePass":
        """Run a batch and keep the states."""
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask") if key in batch}
        text_mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) > 0
        states: list[Tensor] = []

        def keep(visit: Visit) -> None:
            states[-1:] = [visit.input, visit.states]  # the last output is this input

        with probe(model, [(name, keep) for name in layer_names(model)]):
            last = base_model(model)(**inputs, use_cache=False).last_hidden_state
        labels = batch.get("labels", batch["input_ids"]).to(device)
        return cls(model, inputs, text_mask, states, last[text_mask.to(last.device)], labels)

    def without(self, removal: Removal) -> Tensor:
        """Return the last hidden states of the text without a block; only the layers behind it run."""
        given, architecture = self.states[removal.block.start], Architecture.of(self.model.config)
        skipped = dict.fromkeys(
            layer_names(self.model)[: removal.block.stop], lambda visit: _output(architecture, visit.name, given)
        )
        changed = [(name, lambda visit: torch.zeros_like(visit.states)) for name in removal.zeroed]
        if architecture.shape.staying:
            changed, skipped = changed + _as_given(list(skipped)[removal.block.start :]), {}
        with probe(self.model, changed, instead=skipped):
            last = base_model(self.model)(**self.inputs, use_cache=False).last_hidden_state
        return last[self.text_mask.to(last.device)]
