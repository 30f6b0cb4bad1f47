"""The output head and the loss, some tokens at a time: the logits of a batch never exist in full.

The gradients with respect to the last hidden states and to the head's weight are made in the forward pass, chunk by chunk, so
that no logits wait for a backward pass. The shift of the labels by one and the division by the token count are done here,
once. It must not know a loss formula or a trainer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

# (logits of a chunk, its rows) -> named losses, each of shape (rows,)
ChunkLoss = Callable[[Tensor, slice], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Head:
    """The output head of a model: last hidden states to logits.

    Args:
        weight (`Tensor` of shape `(vocab, hidden)`): Its matrix; the embedding itself when they are tied.
        bias (`Tensor` of shape `(vocab,)`, *optional*): Its bias.
        scale (`float`, *optional*, defaults to 1): What logits are multiplied by (Cohere, Granite).
        softcap (`float`, *optional*): What a tanh keeps logits under (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (float64 for float64 inputs) of shape `(rows, vocab)` for `(rows, hidden)`."""
        return self.finish(self.project(hidden))

    def project(self, hidden: Tensor) -> Tensor:
        """Return what the matrix gives, before scale and softcap."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return logits if logits.dtype == torch.float64 else logits.float()

    def finish(self, projected: Tensor) -> Tensor:
        """Return logits from what `project` gave."""
        logits = projected if self.scale == 1 else projected * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def to(self, target: torch.dtype | torch.device) -> "Head":
        """Return the head in another dtype, or on another device."""
        return replace(self, weight=self.weight.to(target), bias=None if self.bias is None else self.bias.to(target))


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
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def next_token_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Select the positions that predict a labelled token.

    Args:
        hidden (`Tensor` of shape `(batch, seq, hidden)`): Last hidden states.
        labels (`Tensor` of shape `(batch, seq)`): Token ids, not shifted; -100 where nothing is to be predicted.

    Returns:
        `tuple[Tensor, Tensor]`: Hidden states of shape `(tokens, hidden)` and the ids they predict, `(tokens,)`.
    """
    targets = labels[:, 1:]
    predicts = targets != -100
    return hidden[:, :-1][predicts], targets[predicts]


def chunked_loss(
    hidden: Tensor,
    head: Head,
    chunk_loss: ChunkLoss,
    weights: Mapping[str, float],
    num_items: Tensor | int,
    chunk_size: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weighted sum of token losses and its parts, with the same gradient as on full logits.

    Args:
        hidden (`Tensor` of shape `(tokens, hidden)`): Last hidden states of the student.
        head (`Head`): The student's head.
        chunk_loss (`ChunkLoss`): From the logits of some rows to named losses per row.
        weights (`Mapping[str, float]`): Weight of every named loss.
        num_items (`Tensor` or `int`): Tokens to divide by: those of the whole accumulated batch.
        chunk_size (`int`): Tokens per chunk.

    Returns:
        `tuple[Tensor, dict[str, Tensor]]`: The loss, a scalar, and each named part before its weight, detached.
    """
    names = tuple(weights)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # inside forward grad mode is always off, so it is asked here: evaluation makes no gradients
    settings = (dtype, chunk_loss, tuple(weights.values()), names, num_items, chunk_size, torch.is_grad_enabled())
    total, parts = _ChunkedLoss.apply(hidden, head.weight, head.bias, (head, *settings))
    return total, dict(zip(names, parts, strict=True))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, settings):
        head, dtype, chunk_loss, weights, names, num_items, chunk_size, grad_enabled = settings
        wants_grad = grad_enabled and any(ctx.needs_input_grad)
        wanted = zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)  # not of a frozen head beside an adapter
        grads = [torch.zeros_like(t) if needed and wants_grad else None for t, needed in wanted]
        # fp16 would round what a large batch's count leaves of a gradient to zero: there the count waits for the backward
        # pass, which brings the GradScaler's scale
        late = num_items if dtype == torch.float16 and len(hidden) else 1
        with torch.autocast(hidden.device.type, enabled=False):
            rows_of, head = hidden.to(dtype), replace(head, weight=weight, bias=bias).to(dtype)
            sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            parts = torch.zeros(len(names), dtype=sum_dtype, device=hidden.device)
            for start in range(0, len(hidden), chunk_size):
                rows = slice(start, start + chunk_size)
                projected = head.project(rows_of[rows]).requires_grad_(wants_grad)
                with torch.set_grad_enabled(wants_grad):
                    by_name = chunk_loss(head.finish(projected), rows)
                    _check_rows(by_name, len(projected))
                    sums = [by_name[name].sum() / num_items for name in names]
                    total = sum(weight * part for weight, part in zip(weights, sums, strict=True)) * late
                parts += torch.stack([part.detach() for part in sums])
                if wants_grad:
                    (grad,) = torch.autograd.grad(total, projected)
                    del projected, by_name, sums, total  # before the next chunk's are made
                    _accumulate(grads, grad, rows_of, rows, head)
        ctx.late = late
        ctx.save_for_backward(*grads)
        return (parts * parts.new_tensor(weights)).sum(), parts

    @staticmethod
    def backward(ctx, grad_total, _):
        return *(None if grad is None else grad.mul_(grad_total / ctx.late) for grad in ctx.saved_tensors), None


def _check_rows(by_name: Mapping[str, Tensor], count: int) -> None:
    """Refuse a loss that is not one number per token, such as a mean: it would be divided by the token count again."""
    for name, values in by_name.items():
        if values.shape != (count,):
            raise ValueError(f"losses: {name} gave shape {tuple(values.shape)} for {count} tokens, not one number for each: "
                             "sum over the last dimension only, and take no mean")  # fmt: skip


def _accumulate(grads: list, grad_logits: Tensor, hidden: Tensor, rows: slice, head: Head) -> None:
    """Carry the gradient of one chunk's logits on to the hidden states, the head's weight and its bias."""
    grad_hidden, grad_weight, grad_bias = grads
    if grad_bias is not None:
        grad_bias += grad_logits.sum(0)
    grad_logits = grad_logits.to(hidden.dtype)
    if grad_hidden is not None:
        grad_hidden[rows] = grad_logits @ head.weight
    if grad_weight is None:
        return
    if grad_weight.dtype == hidden.dtype:
        grad_weight.addmm_(grad_logits.T, hidden[rows])
    else:
        grad_weight += grad_logits.T @ hidden[rows]
