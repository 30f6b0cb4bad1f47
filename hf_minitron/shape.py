"""`Shape`: the size of every axis of one model; which cuts are legal, and what a shape costs.

It must not know a model type or a score: families hand it their rows. Costs are counted from the rows' patterns alone.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from hf_minitron import axes

# 2407.14679, section 2: depth (layers) and width (the others). `head_dim` and `vocab` stay as they are.
CUTTABLE = ("layers", "hidden", "ffn", "heads", "kv_heads")


class ShapeError(ValueError):
    """A target shape that the model cannot be cut to."""


@dataclass(frozen=True)
class Shape:
    """The size of every axis: `layers hidden ffn heads kv_heads head_dim vocab`.

    Args:
        sizes (`Mapping[str, int]`): Number of entries of each axis.
    """

    sizes: Mapping[str, int]

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    def num_parameters(self, rows: Mapping[str, str]) -> int:
        """Count the parameters of a model of this shape whose parameters are `rows` (name to pattern)."""
        return sum(self._copies(row) * math.prod(axes.tensor_shape(rows[row], self.sizes)) for row in rows)

    def flops_per_token(self, rows: Mapping[str, str]) -> int:
        """Count the floating-point operations of the matrix products of one token's forward pass.

        Two per weight of every matrix, the output head included (for tied embeddings, the embedding as head); looking
        up the input embedding is free. The products of queries, keys and values grow with the context and are left out.
        """
        matrices = {row: pattern for row, pattern in rows.items() if len(axes.parse(pattern)) > 1}
        heads = [row for row, pattern in matrices.items() if "vocab" in pattern.split()]
        lookups = heads[:-1]  # untied: embedding and head; tied: one matrix that serves as both
        return 2 * self.num_parameters({row: p for row, p in matrices.items() if row not in lookups})

    def kv_cache_bytes_per_token(self, bytes_per_number: int) -> int:
        """Count the bytes that one token adds to the KV cache: a key and a value for every layer and KV head."""
        return 2 * self["layers"] * self["kv_heads"] * self["head_dim"] * bytes_per_number

    def cut_to(self, target: Mapping[str, int], multiple_of: Mapping[str, int] | None = None) -> "Shape":
        """Return the shape after a cut, or say everything that is illegal about it.

        Args:
            target (`Mapping[str, int]`): Wanted sizes. Axes left out keep theirs, except that `kv_heads` alone takes the
                heads of the dropped groups along.
            multiple_of (`Mapping[str, int]`, *optional*): Divisor that the new size of an axis must have.

        Returns:
            `Shape`: The sizes after the cut.

        Raises:
            ShapeError: with the axis, the value, what is allowed and what to do, for every illegal size at once.
        """
        multiple_of = multiple_of or {}
        bad = [axis for axis, n in multiple_of.items() if axis not in CUTTABLE or type(n) is not int or n < 1]
        if bad:
            raise ShapeError(f"multiple_of: {bad[0]!r}: {multiple_of[bad[0]]!r} is not an axis of {', '.join(CUTTABLE)} with a "
                             "whole number from 1 on")  # fmt: skip
        problems = [p for axis, size in target.items() for p in self._problems(axis, size, multiple_of)]
        if problems:
            raise ShapeError("; ".join(problems))
        after = {**self.sizes, **target}
        if "kv_heads" in target and "heads" not in target:
            after["heads"] = target["kv_heads"] * (self["heads"] // self["kv_heads"])
        group, groups = self["heads"] // self["kv_heads"], after["kv_heads"]
        if after["heads"] % groups or after["heads"] // groups > group:
            legal = ", ".join(str(groups * n) for n in range(1, group + 1))
            raise ShapeError(
                f"heads: {after['heads']} do not divide over {groups} KV heads; every KV group keeps the same 1 to "
                f"{group} of its {group} heads. Use one of {legal}, or cut kv_heads as well"
            )
        return Shape(after)

    def _problems(self, axis: str, size: int, multiple_of: Mapping[str, int]) -> list[str]:
        if axis not in CUTTABLE:
            near = difflib.get_close_matches(str(axis), CUTTABLE, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return [f"{axis}: not an axis that can be cut; those are {', '.join(CUTTABLE)}{hint}"]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            return [f"{axis}: {size!r} is not a whole number from 1 to {self[axis]}"]
        if size > self[axis]:
            return [f"{axis}: {size} is larger than the model's {self[axis]}; pruning only makes a model smaller"]
        divisor = multiple_of.get(axis, 1)
        if size % divisor and size != self[axis]:
            near = sorted({n for n in (size // divisor * divisor, -(-size // divisor) * divisor) if 0 < n <= self[axis]})
            return [
                f"{axis}: {size} is not a multiple of {divisor}; nearest: {', '.join(map(str, near))} (or change multiple_of)"
            ]
        return []

    def _copies(self, row: str) -> int:
        return math.prod(self[axis] for axis in axes.placeholders(row))
