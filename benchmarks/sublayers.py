"""A prototype: each attention and each MLP of a student tuned by itself, before distillation, on the pruned layers' stream.

The target of a sublayer is what the teacher's writes to the channels that the student kept, plus what the student's stream
lacks there by then, so that each repairs what the ones before have broken. The loss is the mean squared error over that of
writing nothing; a sublayer whose loss on held-out sequences has not fallen keeps the weights it had. Models like Llama.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ATTENTION, MLP = "attention", "mlp"


@dataclass(frozen=True)
class Tuning:
    """How sublayers are tuned.

    Args:
        steps (`int`): Of AdamW, for each sublayer.
        batch (`int`): Sequences a step.
        rate (`float`): Learning rate, which falls to zero linearly.
        held_out (`int`): Sequences, the first, that decide whether the tuned weights are kept.
        gap (`float`): Share of what the stream lacks that is added to the target.
        dtype (`torch.dtype`): Of mixed precision.
    """

    steps: int = 12
    batch: int = 4
    rate: float = 3e-4
    held_out: int = 4
    gap: float = 1.0
    dtype: torch.dtype = torch.bfloat16


def tune(
    student: PreTrainedModel, teacher: PreTrainedModel, kept: Tensor, ids: Tensor, how: Tuning
) -> Iterator[tuple[int, str, float, float]]:
    """Tune a student's sublayers in place, in their order; yield layer, sublayer, and its held-out loss before and after.

    Args:
        student (`PreTrainedModel`): In float32; it has all layers of the teacher.
        teacher (`PreTrainedModel`): The model that was pruned.
        kept (`Tensor` of shape `(hidden,)`): The teacher's hidden channels that the student has.
        ids (`Tensor` of shape `(sequences, tokens)`): The text.
        how (`Tuning`): Settings.
    """
    with torch.no_grad():
        dense, pruned = (model.get_input_embeddings()(ids).float() for model in (teacher, student))
    places = torch.arange(ids.shape[1])[None]
    turns = [model.base_model.rotary_emb(states, places) for model, states in ((teacher, dense), (student, pruned))]
    layers = zip(teacher.base_model.layers, student.base_model.layers, strict=True)
    for number, (whole, small) in enumerate(layers):
        for kind in (ATTENTION, MLP):
            written = _write(whole, kind, dense, turns[0], how)
            target = written[..., kept] + how.gap * (dense[..., kept] - pruned)
            yield number, kind, *_tune_one(small, kind, pruned, target, turns[1], how)
            dense = dense + written
            pruned = pruned + _write(small, kind, pruned, turns[1], how)


def _tune_one(layer: nn.Module, kind: str, states: Tensor, target: Tensor, turn: tuple, how: Tuning) -> tuple[float, float]:
    """Tune one sublayer; return its loss on the held-out sequences before, and as it stays."""
    scale = target.pow(2).mean()
    first, rest = slice(None, how.held_out), range(how.held_out, len(states))
    parts = [layer.self_attn, layer.input_layernorm] if kind == ATTENTION else [layer.mlp, layer.post_attention_layernorm]
    weights = [weight for part in parts for weight in part.parameters()]
    old = [weight.detach().clone() for weight in weights]

    def loss_held_out() -> float:
        return float((_write(layer, kind, states[first], turn, how) - target[first]).pow(2).mean() / scale)

    before, optimizer = loss_held_out(), torch.optim.AdamW(weights, lr=how.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / how.steps)
    order = [rest[i % len(rest)] for i in range(how.steps * how.batch)]
    for step in range(how.steps):
        chosen = order[step * how.batch : (step + 1) * how.batch]
        with torch.autocast(states.device.type, how.dtype, enabled=how.dtype != torch.float32):
            output = _sublayer(layer, kind, states[chosen], turn)
        ((output.float() - target[chosen]).pow(2).mean() / scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    after = loss_held_out()
    if after < before:
        return before, after
    with torch.no_grad():
        for weight, value in zip(weights, old, strict=True):
            weight.copy_(value)
    return before, before


@torch.no_grad()
def _write(layer: nn.Module, kind: str, states: Tensor, turn: tuple, how: Tuning) -> Tensor:
    """Return what a sublayer adds to the stream."""
    dtype = next(layer.parameters()).dtype
    with torch.autocast(states.device.type, how.dtype, enabled=how.dtype != torch.float32):
        parts = [_sublayer(layer, kind, part.to(dtype), turn).float() for part in states.split(how.batch)]
    return torch.cat(parts)


def _sublayer(layer: nn.Module, kind: str, states: Tensor, turn: tuple) -> Tensor:
    if kind == MLP:
        return layer.mlp(layer.post_attention_layernorm(states))
    turn = tuple(part.to(states.dtype) for part in turn)
    return layer.self_attn(layer.input_layernorm(states), position_embeddings=turn, attention_mask=None)[0]
