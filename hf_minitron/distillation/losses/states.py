"""Distillation losses on states inside the models: formulas over two tables of vectors, or of queries, keys and values.

They never see a model or a hook: that is `distillation.states`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the cosine, the best loss on states of 2407.14679 (section 3).

    Args:
        student (`Tensor` of shape `(tokens, hidden)`): The student's states, projected to the teacher's width.
        teacher (`Tensor` of shape `(tokens, hidden)`): The teacher's states.

    Returns:
        `Tensor` of shape `(tokens,)`: between 0 and 2.
    """
    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference over channels; arguments as for `cosine_distance`."""
    return (student - teacher).square().mean(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine_distance, "mse": squared_error}


def relation_kl(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], attention_visibility: Tensor | None, chunk_size: int
) -> Tensor:
    """Return KL(teacher || student) of how tokens relate to those before them (MiniLMv2, 2012.15828, section 3.1).

    A relation is the softmax of the scaled products of two kinds of vectors, such as queries and keys. Heads are regrouped to
    as many relation heads as divide both models' heads, so that models with different numbers of heads compare.

    Args:
        student (`tuple[Tensor, Tensor]`): Two tensors of shape `(batch, seq, heads, head_dim)`.
        teacher (`tuple[Tensor, Tensor]`): The same of the teacher; heads and head_dim may differ.
        attention_visibility (`Tensor` of shape `(batch, seq, seq)`, *optional*): Tokens that each may see, beside the mask.
        chunk_size (`int`): Tokens whose relations exist at the same time, in the backward pass too.

    Returns:
        `Tensor` of shape `(batch, seq)`: nats, the mean over relation heads.
    """
    heads = math.gcd(student[0].shape[2], teacher[0].shape[2], student[1].shape[2], teacher[1].shape[2])
    student, teacher = (tuple(_regroup(part, heads) for part in pair) for pair in (student, teacher))
    length, divergences = student[0].shape[2], []
    for start in range(0, length, chunk_size):
        rows = slice(start, min(start + chunk_size, length))
        mask = torch.ones(rows.stop - start, rows.stop, dtype=torch.bool, device=student[0].device).tril(start)
        if attention_visibility is not None:
            mask = mask & attention_visibility[:, None, rows, : rows.stop]
        divergences.append(checkpoint(_rows_kl, student, teacher, rows, mask, use_reentrant=False))
    return torch.cat(divergences, 1)


def _regroup(part: Tensor, heads: int) -> Tensor:
    """View `(batch, seq, heads, head_dim)` as so many relation heads: `(batch, heads, seq, dim)`."""
    part = part.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
    return part.to(torch.promote_types(part.dtype, torch.float32))


def _rows_kl(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], rows: slice, mask: Tensor) -> Tensor:
    logp = []
    for queries, keys in (student, teacher):
        scores = queries[:, :, rows] @ keys[:, :, : rows.stop].transpose(-1, -2) / math.sqrt(queries.shape[-1])
        logp.append(scores.masked_fill(~mask, torch.finfo(scores.dtype).min).log_softmax(-1))
    student_logp, teacher_logp = logp
    return (teacher_logp.exp() * (teacher_logp - student_logp)).masked_fill(~mask, 0).sum(-1).mean(1)
