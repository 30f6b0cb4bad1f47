"""Running a model without some of its layers: they stay in their places and hand on what they get.

So masks, positions and the last norm are the class's own, whatever the family. Nothing before a block of layers changes when it
is left out: one pass keeps the input of every layer, and what the model says without a block needs only the layers behind it.
It must not know what is measured.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from transformers import Cache, PreTrainedModel

from hf_minitron.architecture.architecture import Architecture


def layers_of(model: PreTrainedModel) -> list[Module]:
    """Return the modules of a model's layers, in order."""
    architecture = Architecture.of(model.config)
    names = [name.removeprefix(f"{architecture.prefix}.") for _, name in architecture.taps("layers")]
    return [model.base_model.get_submodule(name) for name in names]


@contextmanager
def without_layers(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[None]:
    """Let some layers of a model hand on what they get, until the context ends. Its other layers keep their numbers.

    Args:
        model (`PreTrainedModel`): A causal language model of a known family, or its base model.
        layers (`Iterable[int]`): The layers to leave out.
    """
    modules = layers_of(model)
    with _forwards({modules[layer]: partial(_hand_on, layer) for layer in layers}):
        yield


def _hand_on(layer: int, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """Return a layer's input. In a cache, an empty entry counts the tokens: the class may ask this layer how many there are."""
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if cache is not None:
        entry = hidden_states[:, None, :, :1]  # (batch, one head, seq, one number)
        cache.update(entry, entry, layer)
    return hidden_states


@contextmanager
def _forwards(forward_of: Mapping[Module, Callable]) -> Iterator[None]:
    """Let modules run other functions in place of their forward, until the context ends."""
    before = {module: vars(module).get("forward") for module in forward_of}  # accelerate's, when it moves the module
    try:
        for module, forward in forward_of.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


class Removal(NamedTuple):
    """What a model is run without.

    Args:
        block (`range`): Contiguous layers; an empty one says where `silent` begins to matter.
        silent (`tuple[Module, ...]`): Projections behind it that give zeros: a layer's attention or its MLP is gone then.
    """

    block: range
    silent: tuple[Module, ...] = ()


@dataclass(frozen=True)
class WholePass:
    """One batch through the whole model, with the states that it leaves between the layers.

    Args:
        model (`PreTrainedModel`): The model.
        layers (`list[Module]`): Its layers.
        inputs (`Mapping`): What its base model is called with.
        real (`Tensor` of shape `(batch, seq)`): Where there is text and no padding.
        states (`list[Tensor]`): The input of every layer and the output of the last, each `(batch, seq, hidden)`.
        last (`Tensor` of shape `(tokens, hidden)`): The last hidden states of the text.
    """

    model: PreTrainedModel
    layers: list[Module]
    inputs: Mapping
    real: Tensor
    states: list[Tensor]
    last: Tensor
    labels: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Mapping[str, Tensor], device: torch.device) -> "WholePass":
        """Run a batch and keep the states."""
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask") if key in batch}
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) > 0
        layers, states = layers_of(model), []

        def keep(module, args, kwargs, output):
            if not isinstance(output, Tensor):
                raise ValueError(f"{type(module).__name__} returns a {type(output).__name__}, not states: it cannot be removed")
            states[-1:] = [args[0] if args else kwargs["hidden_states"], output]  # the last output is this input

        hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
        try:
            last = model.base_model(**inputs, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return cls(
            model, layers, inputs, real, states, last[real.to(last.device)], batch.get("labels", batch["input_ids"]).to(device)
        )

    def without(self, removal: Removal) -> Tensor:
        """Return the last hidden states of the text without a block; only the layers behind it run."""
        kept = self.states[removal.block.start]
        given = dict.fromkeys(self.layers[: removal.block.stop], lambda *args, **kwargs: kept)
        with _forwards(given | dict.fromkeys(removal.silent, lambda states: torch.zeros_like(kept).to(states.device))):
            last = self.model.base_model(**self.inputs, use_cache=False).last_hidden_state
        return last[self.real.to(last.device)]
