"""Routed experts, whose inner activations no hook sees: they run one by one in place of the module that holds them."""

import inspect
from collections.abc import Mapping

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence

from hf_minitron.probe import Visit


def run_experts(readings: Mapping, visit: Visit) -> Tensor:
    """Run a layer's routed experts one by one and let its readings see each.

    Args:
        readings (`Mapping[str, Reading]`): The layer's readings of `ffn` and `experts`.
        visit (`Visit`): A call of the module that holds the experts.
    """
    with align_module_device(visit.module):  # offloaded weights are fetched
        run = _weighted_before if len(visit.args) + len(visit.kwargs) == 1 else _one_by_one
        return run(readings, visit, *visit.args, **visit.kwargs)


def _weighted_before(readings: Mapping, visit: Visit, hidden_states: Tensor) -> Tensor:
    """Run Llama 4's experts: each is given all tokens times their weights, zeros for those that go to another."""
    experts, norms, result = visit.module, [], torch.zeros_like(hidden_states)
    given = hidden_states.view(experts.num_experts, -1, hidden_states.shape[-1])
    for expert, states in enumerate(given):
        (tokens,) = torch.where(states.any(-1))
        gate, up = (states[tokens] @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        inner = up * experts.act_fn(gate)
        output = inner @ experts.down_proj[expert]
        result.view_as(given)[expert, tokens] = output.to(result.dtype)
        _update(readings["ffn"].metrics[expert], inner, tokens, visit)
        norms.append(_norms(output, tokens, len(states)))
    readings["experts"].update(torch.stack(norms, -1), visit)
    return result


def _one_by_one(readings: Mapping, visit: Visit, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    experts, norms = visit.module, []
    result = torch.zeros_like(hidden_states)
    for expert in range(experts.num_experts):
        tokens, slots = torch.where(top_k_index == expert)  # ascending tokens
        inner = _inner(experts, hidden_states[tokens], expert)
        output = _projected(experts, inner, "down_proj", expert) * top_k_weights[tokens, slots, None]
        result.index_add_(0, tokens, output.to(result.dtype))
        _update(readings["ffn"].metrics[expert], inner, tokens, visit)
        norms.append(_norms(output, tokens, len(hidden_states)))
    readings["experts"].update(torch.stack(norms, -1), visit)
    return result


def _norms(output: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Return how much an expert adds to each of so many tokens."""
    return output.new_zeros(count, dtype=torch.float32).index_copy_(0, tokens, torch.linalg.vector_norm(output.float(), dim=-1))


def _update(metric, inner: Tensor, tokens: Tensor, visit: Visit) -> None:
    """Let an expert's metric see its tokens, by sample; those that go to other experts count as zeros."""
    batch, seq = visit.batch
    mask = None if visit.mask is None else visit.mask.to(inner.device)
    if "lengths" not in inspect.signature(metric.update).parameters:
        whole = inner.new_zeros(batch * seq, inner.shape[-1]).index_copy_(0, tokens, inner)
        metric.update(whole.view(batch, seq, -1), mask)
        return
    lengths = torch.full((batch, 1), seq, device=inner.device) if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
    if mask is not None:
        inner = inner * mask.flatten()[tokens, None].to(inner.dtype)
    by_sample = pad_sequence(inner.split(torch.bincount(tokens // seq, minlength=batch).tolist()), batch_first=True)
    metric.update(by_sample, lengths=lengths)


def _inner(experts: Module, states: Tensor, expert: int) -> Tensor:
    """Return what an expert's down projection is given, shape `(tokens, ffn)`."""
    if experts.has_gate:
        return experts._apply_gate(_projected(experts, states, "gate_up_proj", expert))
    return experts.act_fn(_projected(experts, states, "up_proj", expert))


def _projected(experts: Module, states: Tensor, name: str, expert: int) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return torch.nn.functional.linear(states, weight.T if experts.is_transposed else weight, bias)
