"""The output head of a causal language model, applied to some tokens at a time: the logits of a batch never exist in full.

It is the only place that turns last hidden states into logits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.probe import base_name

# Model types that multiply logits by `logits_scaling`; the others divide by it.
MULTIPLIED = ("hyperclovax",)


@dataclass(frozen=True)
class Head:
    """The output head of a model: last hidden states to logits.

    Args:
        weight (`Tensor` of shape `(vocab, hidden)`): Its matrix; the embedding itself when they are tied.
        bias (`Tensor` of shape `(vocab,)`, *optional*): Its bias.
        scale (`float`, *optional*, defaults to 1): What logits are multiplied by (Cohere, Granite).
        softcap (`float`, *optional*): What a tanh keeps logits under (Gemma 2).
        module (`Callable`, *optional*): Called in place of the matrix, where accelerate's hooks load or move its weight.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    module: Callable[[Tensor], Tensor] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (float64 for float64 inputs) of shape `(rows, vocab)` for `(rows, hidden)`."""
        logits = self.finish(self.project(hidden))
        return logits.to(wide_dtype(logits))

    def project(self, hidden: Tensor) -> Tensor:
        """Return the matrix product, before scale and softcap, in the dtype of the weight, also where states have another."""
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.weight.dtype)
        module = self.module or partial(torch.nn.functional.linear, weight=self.weight, bias=self.bias)
        return module(hidden)

    def finish(self, projected: Tensor) -> Tensor:
        """Return the logits of a result of `project`: float32 or float64, or in its dtype where nothing is computed."""
        if self.scale == 1 and self.softcap is None:
            return projected  # a float32 copy would cost as much memory as a softmax, which widens as it reads
        logits = projected.to(wide_dtype(projected)) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def rows(self, ids: Sequence[int]) -> "Head":
        """Return the head of some tokens, in their order."""
        index = torch.tensor(ids, device=self.weight.device)
        return replace(self, weight=self.weight[index], bias=None if self.bias is None else self.bias[index], module=None)

    def to(self, target: torch.dtype | torch.device) -> "Head":
        """Return the head in another dtype, or on another device."""
        return replace(self, weight=self.weight.to(target), bias=None if self.bias is None else self.bias.to(target))


def wide_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype of log-probabilities: float64 for float64 logits, else float32."""
    return torch.promote_types(logits.dtype, torch.float32)


def head_of(model: PreTrainedModel) -> Head:
    """Return the output head of a causal language model; refuse one with an adapter, whose part would be left out."""
    layer, config = model.get_output_embeddings(), model.config
    if isinstance(layer, BaseTunerLayer):
        raise ValueError(
            "The output head has a PEFT adapter, which the chunked loss does not see: leave it out of target_modules"
        )
    if not layer.weight.is_floating_point():
        raise ValueError(
            f"The output head is quantized ({type(layer).__name__}, {layer.weight.dtype}), which the chunked loss cannot read: "
            "leave it out of the quantization (modules_to_not_convert)"
        )
    scaling = getattr(config, "logits_scaling", None) or 1.0
    scale = (getattr(config, "logit_scale", None) or 1.0) * (scaling if config.model_type in MULTIPLIED else 1 / scaling)
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def check_head(config: PreTrainedConfig) -> None:
    """Refuse a model whose head is more than one matrix that reads its last hidden states: `Head` would leave the rest out.

    Raises:
        ValueError: naming what stands between the two.
    """
    try:
        seen = Architecture.bind(config).trace
    except ValueError:  # it cannot be run without weights
        return
    model = seen.modules[""]
    head = next(name for name, module in seen.modules.items() if module is model.get_output_embeddings())
    givers, inside = seen.reads.get(head, ()), base_name(model)
    if givers and not any(f"{giver}.".startswith(f"{inside}.") for giver in givers):
        raise ValueError(f"The output head of model type {config.model_type!r} is more than a matrix: {givers[-1]} stands "
                         "before it, which losses and perplexity do not see; choose another model type")  # fmt: skip


def head_chunks(head: Callable[[Tensor], Tensor], hidden: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of every chunk and their logits: the only loop over the output head.

    Each chunk's logits are freed before the next one's are made if the caller has dropped them (`del`).

    Args:
        head (`Callable[[Tensor], Tensor]`): `Head.logits`, or `Head.project`.
        hidden (`Tensor` of shape `(tokens, hidden)`): Last hidden states.
        chunk_size (`int`): Tokens whose logits exist at the same time.
    """
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        yield rows, head(hidden[rows])


def next_token_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Select the positions that predict a labelled token.

    Args:
        hidden (`Tensor` of shape `(batch, seq, hidden)`): Last hidden states.
        labels (`Tensor` of shape `(batch, seq)`): Token ids, not shifted; -100 where nothing is to be predicted.

    Returns:
        `tuple[Tensor, Tensor]`: Hidden states of shape `(tokens, hidden)` and the ids they predict, `(tokens,)`.
    """
    targets = labels[:, 1:]
    target_mask = targets != -100
    return hidden[:, :-1][target_mask], targets[target_mask]
