"""Routed experts, which hooks do not see: their forward pass, run one expert by one, with an observer.

Transformers keeps the experts of a layer in one module and calls the implementation that its config names; ours is registered
as "hf_minitron" and set while taps are open.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


def observer(taps, readings: Mapping):
    """Return what a layer of experts calls for every expert, and once with `None` when it has been through all.

    Args:
        taps (`Taps`): The taps that are open.
        readings (`Mapping[str, Reading]`): The layer's readings of `ffn` and `experts`.
    """
    norms: list[Tensor] = []

    def observe(expert: int | None, tokens: Tensor | None = None, inner: Tensor | None = None, output: Tensor | None = None):
        batch, seq = taps.batch_shape
        if expert is None:
            taps.update(readings["experts"], torch.stack(norms, -1))
            norms.clear()
            return
        norm = torch.zeros(batch * seq, device=output.device)
        norms.append(norm.index_copy_(0, tokens, torch.linalg.vector_norm(output.float(), dim=-1)))
        mask, lengths = None, torch.full((batch, 1), seq, device=inner.device)
        if taps.mask is not None:
            mask = taps.mask.to(inner.device).flatten()[tokens]
            lengths = taps.mask.to(inner.device).sum(1, keepdim=True).clamp(min=1)
            inner = inner * mask[:, None].to(inner.dtype)
        by_sample = pad_sequence(inner.split(torch.bincount(tokens // seq, minlength=batch).tolist()), batch_first=True)
        readings["ffn"].metrics[expert].update(by_sample, lengths=lengths)

    return observe


def _observed_experts(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run a layer's experts one by one and show each what passes through it; `self` is the module that holds them."""
    result = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        tokens, slots = torch.where(top_k_index == expert)  # ascending tokens
        inner = _projected(self, hidden_states[tokens], "gate_up_proj", expert)
        inner = self._apply_gate(inner)  # (tokens, ffn)
        output = _projected(self, inner, "down_proj", expert) * top_k_weights[tokens, slots, None]
        result.index_add_(0, tokens, output.to(result.dtype))
        self.observe(expert, tokens, inner, output)
    self.observe(None)
    return result


def _projected(experts, states: Tensor, name: str, expert: int) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return torch.nn.functional.linear(states, weight.T if experts.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register("hf_minitron", _observed_experts)
