"""Token losses on the output, some tokens at a time: the logits of a batch never exist in full.

The gradients with respect to the last hidden states and to the head's weight are made in the forward pass, chunk by chunk, so
that no logits wait for a backward pass. Losses are sums over tokens here; `reduction.per_token` divides them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hf_minitron.head import Head, head_chunks

# (logits of a chunk, its rows) -> named losses, each of shape (rows,)
ChunkLoss = Callable[[Tensor, slice], Mapping[str, Tensor]]


def chunked_loss(
    hidden: Tensor, head: Head, chunk_loss: ChunkLoss, weights: Mapping[str, float], chunk_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weighted sum of token losses and its parts, with the same gradient as on full logits.

    Args:
        hidden (`Tensor` of shape `(tokens, hidden)`): Last hidden states of the student.
        head (`Head`): The student's head.
        chunk_loss (`ChunkLoss`): From the logits of some rows to named losses per row.
        weights (`Mapping[str, float]`): Weight of every named loss.
        chunk_size (`int`): Tokens per chunk.

    Returns:
        `tuple[Tensor, dict[str, Tensor]]`: The weighted sum over tokens, a scalar, and each named sum, unweighted and detached.
    """
    names = tuple(weights)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # inside forward grad mode is always off, so it is asked here: evaluation makes no gradients
    settings = (dtype, chunk_loss, tuple(weights.values()), names, chunk_size, torch.is_grad_enabled())
    total, sums = _ChunkedLoss.apply(hidden, head.weight, head.bias, (head, *settings))
    return total, dict(zip(names, sums, strict=True))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, settings):
        head, dtype, chunk_loss, weights, names, chunk_size, grad_enabled = settings
        wants_grad = grad_enabled and any(ctx.needs_input_grad)
        wanted = zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)  # not of a frozen head beside an adapter
        grads = [torch.zeros_like(t) if needed and wants_grad else None for t, needed in wanted]
        with torch.autocast(hidden.device.type, enabled=False):
            rows_of, head = hidden.to(dtype), replace(head, weight=weight, bias=bias).to(dtype)
            sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            sums = torch.zeros(len(names), dtype=sum_dtype, device=hidden.device)
            for rows, projected in head_chunks(head.project, rows_of, chunk_size):
                projected.requires_grad_(wants_grad)
                with torch.set_grad_enabled(wants_grad):
                    by_name = chunk_loss(head.finish(projected), rows)
                    _check_rows(by_name, len(projected))
                    parts = [by_name[name].sum() for name in names]
                    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
                sums += torch.stack([part.detach() for part in parts])
                if wants_grad:
                    (grad,) = torch.autograd.grad(total, projected)
                    del projected, by_name, parts, total  # before the next chunk's are made
                    _accumulate(grads, grad, rows_of, rows, head)
        ctx.save_for_backward(*grads)
        return sum(weight * part for weight, part in zip(weights, sums, strict=True)), sums

    @staticmethod
    def backward(ctx, grad_total, _):
        return *(None if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors), None


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
        grad_bias += grad_logits.sum(0, dtype=grad_bias.dtype)
    grad_logits = grad_logits.to(hidden.dtype)
    if grad_hidden is not None:
        grad_hidden[rows] = grad_logits @ head.weight
    if grad_weight is None:
        return
    if grad_weight.dtype == hidden.dtype:
        grad_weight.addmm_(grad_logits.T, hidden[rows])
    else:
        grad_weight += grad_logits.T @ hidden[rows]
