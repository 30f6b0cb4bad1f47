"""`Shape`: the size of every axis of one model; which cuts are legal, and what a shape costs.

Costs are counted from the patterns of a family's rows alone.
"""

import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from hf_minitron import axes

# The axes of the vocabulary, in the order in which they are shown. `ffn` is the inner width of the MLP, of every routed expert
# in a mixture of experts; `dense_ffn` that of a mixture's plain layers, `shared_ffn` that of its shared experts.
AXES = ("layers", "hidden", "ffn", "dense_ffn", "shared_ffn", "experts", "heads", "kv_heads", "head_dim", "vocab")

# 2407.14679, section 2: depth (layers) and width (the others). `head_dim` and `vocab` stay as they are.
CUTTABLE = AXES[:8]


class ShapeError(ValueError):
    """A target shape that the model cannot be cut to."""


@dataclass(frozen=True)
class Shape:
    """The size of every axis that a model has.

    Args:
        sizes (`Mapping[str, int]`): Number of entries of each axis of `AXES`; with them, what a family's patterns or its router
            need and no cut changes (`qkv`, `experts_per_token`). NumPy arrays of sizes make it many shapes, whose costs are
            then counted at once.
    """

    sizes: Mapping[str, int]

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of the axes of the vocabulary, in its order."""
        return {axis: self.sizes[axis] for axis in AXES if axis in self.sizes}

    def num_parameters(self, rows: Mapping[str, str]) -> int:
        """Count the numbers that a model of this shape stores, whose tensors are `rows` (name to pattern); tied ones once."""
        return sum(self._copies(row) * math.prod(axes.tensor_shape(rows[row], self.sizes)) for row in rows)

    def flops_per_token(self, rows: Mapping[str, str]) -> int:
        """Count the floating-point operations of the matrix products of one token's forward pass.

        Two per weight of every matrix that the token meets: of the experts those it is sent to, and the output head (for tied
        embeddings, the embedding as head); looking up embeddings is free. The products of queries, keys and values grow with
        the context and are left out.
        """
        dims = {row: [axes.dim_names(dim) for dim in axes.parse(pattern)] for row, pattern in rows.items()}
        # what has a size that no cut changes, or a projector's, belongs to a vision model: no token of text meets it
        dims = {row: names for row, names in dims.items() if names and all(names) and {"projector"} not in names}
        heads = [row for row in dims if "vocab" in dims[row][0] and len(dims[row]) == 2]
        flops = 0
        for row in dims:
            routed = dims[row][0] == {"experts"} and any("ffn" in names for names in dims[row])
            looked_up = "positions" in dims[row][0] or row in heads[:-1]  # tied: one matrix, looked up and a head
            if looked_up or row.endswith("bias") or len(dims[row]) - routed < 2:
                continue
            weights = self._copies(row) * math.prod(axes.tensor_shape(rows[row], self.sizes))
            flops += 2 * (weights * self["experts_per_token"] // self["experts"] if routed else weights)
        return flops

    def kv_cache_bytes_per_token(self, bytes_per_number: int) -> int:
        """Count the bytes that one token adds to the KV cache: in every layer a key and a value for each KV head.

        Multi-head latent attention keeps a narrow row instead, from which both are made (2405.04434, section 2.1).
        """
        if "kv_rank" in self.sizes:
            return self["layers"] * (self["kv_rank"] + self["rope"]) * bytes_per_number
        return 2 * self["layers"] * self.kv_groups * self["head_dim"] * bytes_per_number

    @property
    def kv_groups(self) -> int:
        """The number of KV groups: `kv_heads`, or `heads` where every head has its own key and value."""
        return self.sizes.get("kv_heads", self["heads"])

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
        problems = [p for axis, size in target.items() for p in self.size_problems(axis, size, multiple_of)]
        if problems:
            raise ShapeError("; ".join(problems))
        after = Shape(self._with_dependent_sizes({**self.sizes, **target}, target))
        problems = [*self._head_problems(after), *after._expert_problems()]
        if problems:
            raise ShapeError("; ".join(problems))
        return after

    def _with_dependent_sizes(self, after: dict[str, int], target: Mapping[str, int]) -> dict[str, int]:
        """Let the sizes that depend on others follow them, unless the target names them."""
        if "kv_heads" in self.sizes:
            group = self["heads"] // self["kv_heads"]
            if "heads" not in target:
                after["heads"] = after["kv_heads"] * group
            elif group == 1 and "kv_heads" not in target:
                after["kv_heads"] = after["heads"]
        # shared experts are one MLP of so many times an expert's width
        if {"shared_experts", "shared_ffn", "ffn"} <= self.sizes.keys():
            after["shared_ffn"] = after["shared_experts"] * after["ffn"]
        if "projector" in self.sizes:
            after["projector"] = after["hidden"]
        if "dense_layers" in self.sizes:  # an estimate until a plan says which layers stay
            after["dense_layers"] = min(self["dense_layers"], after["layers"])
            after["moe_layers"] = after["layers"] - after["dense_layers"]
        elif "moe_layers" in self.sizes:
            after["moe_layers"] = after["layers"]
        return after

    def _head_problems(self, after: "Shape") -> list[str]:
        group, groups = self["heads"] // self.kv_groups, after.kv_groups
        if after["heads"] % groups == 0 and after["heads"] // groups <= group:
            return []
        legal = ", ".join(str(groups * n) for n in range(1, group + 1))
        return [
            f"heads: {after['heads']} do not divide over {groups} KV heads; every KV group keeps the same 1 to "
            f"{group} of its {group} heads. Use one of {legal}, or cut kv_heads as well"
        ]

    def _expert_problems(self) -> list[str]:
        """Say what a router cannot do with this number of experts."""
        if "experts" not in self.sizes:
            return []
        groups, per_token = self.sizes.get("expert_groups", 1), self["experts_per_token"]
        in_reach = self.sizes.get("groups_per_token", 1) / groups  # a router with groups looks into some of them only

        def fits(experts: int) -> bool:  # it ranks its groups by their two best experts
            return experts % groups == 0 and experts * in_reach >= per_token and (groups == 1 or experts >= 2 * groups)

        if fits(self["experts"]):
            return []
        least = next(n for n in itertools.count(groups, groups) if fits(n))
        step = f", a multiple of {groups}" if groups > 1 else ""
        return [
            f"experts: {self['experts']} cannot serve a router that sends every token to {per_token} of them; "
            f"use {least} or more{step}"
        ]

    def size_problems(self, axis: str, size: int, multiple_of: Mapping[str, int]) -> list[str]:
        """Say what is wrong with the new size of one axis, whatever the others are."""
        known = [known for known in CUTTABLE if known in self.sizes]
        if axis not in known:
            near = difflib.get_close_matches(str(axis), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return [f"{axis}: not an axis of this model that can be cut; those are {', '.join(known)}{hint}"]
        if axis == "shared_ffn" and "shared_experts" in self.sizes:
            return [f"shared_ffn: follows ffn in this model ({self['shared_experts']} times as wide); cut ffn instead"]
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
