"""`Scores`: how much every index of every axis matters, with where the numbers come from.

It must not know how a score is computed (importance/) nor what is done with it (plan.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """One importance score per index of each axis; higher matters more.

    Args:
        by_axis (`Mapping[str, Tensor]`): float32. `layers` and `hidden` have shape `(size,)`, `ffn` and `heads`
            `(layers, size)`.
        meta (`Mapping[str, str]`): Provenance: the text's hash, its token count, the model, library versions.
    """

    by_axis: Mapping[str, Tensor]
    meta: Mapping[str, str]

    def save(self, path: str | Path) -> None:
        """Write the scores as one safetensors file with `meta` as its metadata."""
        save_file({axis: t.contiguous() for axis, t in self.by_axis.items()}, path, metadata=dict(self.meta))

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            return cls({axis: file.get_tensor(axis) for axis in file.keys()}, file.metadata() or {})
