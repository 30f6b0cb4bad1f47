"""The tensors of a student whose class holds in parts what its teacher's class holds in one."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import text_config
from hf_minitron.architecture.rotary import FullRotary
from hf_minitron.checkpoint.checkpoint import TensorSpec
from hf_minitron.plan import Plan

Pruned = Iterator[tuple[str, TensorSpec, Iterator[Tensor]]]


def in_parts(architecture: Architecture, plan: Plan, pruned: Pruned) -> Pruned:
    """Yield a student's tensors, in the parts of `Family.fallback_rows` where there are such; parts are read in their order.

    Args:
        architecture (`Architecture`): The teacher's.
        plan (`Plan`): What is kept.
        pruned (`Iterator`): Of `prune_tensors`.
    """
    family = architecture.family
    rotary = FullRotary.of(text_config(architecture.config), plan.after["head_dim"])
    for name, spec, pieces in pruned:
        row, places = axes.match(name, family.fallback_rows) or (None, {})
        if row is None:
            yield name, spec, pieces
            continue
        rows = (row for piece in pieces for row in piece)
        for part, pattern in family.fallback_rows[row].items():
            shape, role = axes.tensor_shape(pattern, plan.after.sizes), family.role(part)
            turning = rotary if role in ("query", "key") else None
            yield part.format_map(places), TensorSpec(spec.dtype, shape), _part(rows, shape[0], turning, role)


def _part(rows: Iterator[Tensor], size: int, rotary: FullRotary | None, role: str) -> Iterator[Tensor]:
    """Yield the next rows of a tensor, for another rotation of positions where there is one."""
    part = torch.stack(list(itertools.islice(rows, size)))
    yield part if rotary is None else rotary.turned(part, role)
