"""The grammar of the axis map: patterns such as `"(heads head_dim) hidden"`, matching parameter names, taking indices.

It must not know any model, file or score. A pattern has one token per tensor dimension, C-ordered as in einops.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

# A dimension is a concatenation (`a+b`) of products (`(a b)`) of axis names.
Dim = tuple[tuple[str, ...], ...]

_TERM = r"(?:\(\w+(?: \w+)*\)|\w+)"
_DIM = re.compile(rf"{_TERM}(?:\+{_TERM})*")


class AxisError(ValueError):
    """A pattern, a parameter name or a tensor shape does not fit the axis map."""


@cache
def parse(pattern: str) -> tuple[Dim, ...]:
    """Parse a pattern into one `Dim` per tensor dimension.

    Example:

    ```python
    >>> parse("(heads head_dim) hidden")
    ((('heads', 'head_dim'),), (('hidden',),))
    ```
    """
    dims = _DIM.findall(pattern)
    if " ".join(dims) != pattern:
        raise AxisError(f"Cannot read the pattern {pattern!r}: write axes, '(a b)' products and 'a+b' sums with one space")
    return tuple(tuple(tuple(t.strip("()").split()) for t in re.findall(_TERM, dim)) for dim in dims)


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Return the number of entries of one tensor dimension, given the size of every axis."""
    return sum(math.prod(sizes[axis] for axis in term) for term in dim)


def tensor_shape(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the tensor shape that a pattern stands for, given the size of every axis."""
    return tuple(dim_size(dim, sizes) for dim in parse(pattern))


def unknown_size(dim: Dim, size: int, sizes: Mapping[str, int]) -> tuple[str, int] | None:
    """Solve one tensor dimension for the size of its only axis that `sizes` lacks; `None` when there is no such axis.

    Example:

    ```python
    >>> unknown_size(parse("(heads head_dim)+rope")[0], 28, {"heads": 4, "head_dim": 6})
    ('rope', 4)
    ```
    """
    unknown = [(term, axis) for term in dim for axis in term if axis not in sizes]
    if len(unknown) != 1:
        return None
    (term, axis), others = unknown[0], [t for t in dim if t is not unknown[0][0]]
    return axis, (size - dim_size(tuple(others), sizes)) // math.prod(sizes[a] for a in term if a != axis)


def dim_index(dim: Dim, keep: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor | None:
    """Return the kept positions along one tensor dimension, or `None` when none of its axes is cut.

    Args:
        dim (`Dim`): The parsed dimension.
        keep (`Mapping[str, Tensor]`): Kept indices of every axis that is cut, each of shape `(kept,)`.
        sizes (`Mapping[str, int]`): Sizes of the axes before the cut.
    """
    if not any(axis in keep for term in dim for axis in term):
        return None
    indices, offset = [], 0
    for term in dim:
        size = math.prod(sizes[axis] for axis in term)
        index = torch.arange(offset, offset + size).view([sizes[axis] for axis in term])
        for position, axis in enumerate(term):
            if axis in keep:
                index = index.index_select(position, keep[axis])
        indices.append(index.flatten())
        offset += size
    return torch.cat(indices)


def take(tensor: Tensor, pattern: str, keep: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Return the part of a tensor that is left when only the kept indices of every axis stay.

    Args:
        tensor (`Tensor`): A parameter whose shape is `tensor_shape(pattern, sizes)`.
        pattern (`str`): One token per dimension.
        keep (`Mapping[str, Tensor]`): Kept indices of every axis that is cut, each of shape `(kept,)`; `(experts, kept)` of
            an axis of which every kept expert keeps its own.
        sizes (`Mapping[str, int]`): Sizes of the axes before the cut.

    Returns:
        `Tensor`: The cut tensor; the input itself when no axis of the pattern is cut.

    Example:

    ```python
    >>> weight = torch.arange(12.0).view(4, 3)  # (ffn, hidden)
    >>> take(weight, "ffn hidden", {"ffn": torch.tensor([1, 3])}, {"ffn": 4, "hidden": 3}).shape
    torch.Size([2, 3])
    ```
    """
    expected = tensor_shape(pattern, sizes)
    if tuple(tensor.shape) != expected:
        raise AxisError(f"shape {tuple(tensor.shape)} is not that of the pattern {pattern!r}, {expected}")
    dims = parse(pattern)
    keep = {axis: index for axis, index in keep.items() if any(axis in term for dim in dims for term in dim)}
    if any(index.dim() == 2 for index in keep.values()):
        return _take_by_expert(tensor, pattern, keep, sizes)
    # the largest cut first: what follows has less to move
    cuts = [(position, dim_index(dim, keep, sizes)) for position, dim in enumerate(dims)]
    for position, index in sorted((c for c in cuts if c[1] is not None), key=lambda c: len(c[1]) / expected[c[0]]):
        tensor = tensor.index_select(position, index.to(tensor.device))
    return tensor


def _take_by_expert(tensor: Tensor, pattern: str, keep: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Take from every kept expert what it keeps; the tensor's first dimension is `experts`."""
    experts, _, rest = pattern.partition(" ")
    assert experts == "experts", f"{pattern!r} does not begin with experts"
    kept = keep.get("experts", torch.arange(sizes["experts"])).tolist()
    first = {axis: index[0] if index.dim() == 2 else index for axis, index in keep.items()}
    after = {**sizes, **{axis: len(index) for axis, index in first.items()}}
    result = tensor.new_empty((len(kept), *tensor_shape(rest, after)))
    for position, expert in enumerate(kept):
        own = {axis: index[position] if index.dim() == 2 else index for axis, index in keep.items()}
        result[position] = take(tensor[expert], rest, own, sizes)
    return result


@cache
def _name_regex(row: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(row)))


def match(name: str, rows: Sequence[str] | Mapping[str, str]) -> tuple[str, dict[str, int]] | None:
    """Find the row of a parameter name; return it with the indices its placeholders stand for.

    Example:

    ```python
    >>> match("model.layers.7.mlp.up_proj.weight", {"model.layers.{layers}.mlp.up_proj.weight": "ffn hidden"})
    ('model.layers.{layers}.mlp.up_proj.weight', {'layers': 7})
    ```
    """
    for row in rows:
        found = _name_regex(row).fullmatch(name)
        if found:
            return row, {axis: int(index) for axis, index in found.groupdict().items()}
    return None


def placeholders(row: str) -> tuple[str, ...]:
    """Return the axes that a row carries in its name, such as `("layers",)`."""
    return tuple(re.findall(r"{(\w+)}", row))


def dim_of(pattern: str, axis: str) -> Dim:
    """Return the dimension of a pattern that holds an axis."""
    return next(dim for dim in parse(pattern) if any(axis in term for term in dim))


def norm_along(activation: Tensor, dim: Dim, axis: str, sizes: Mapping[str, int]) -> Tensor:
    """View the last dimension of an activation by axis and take the L2 norm over every other axis of its product.

    Args:
        activation (`Tensor` of shape `(batch, seq, dim)`): What a tap reads.
        dim (`Dim`): The pattern of its last dimension; a single product.
        axis (`str`): The axis to keep.
        sizes (`Mapping[str, int]`): Size of every axis.

    Returns:
        `Tensor` of shape `(batch, seq, axis)`: float32 norms; for a dimension that is the axis alone, the input itself.
    """
    (term,) = dim
    if term == (axis,):
        return activation
    viewed = activation.unflatten(-1, [sizes[a] for a in term])
    others = [i - len(term) for i, a in enumerate(term) if a != axis]
    return torch.linalg.vector_norm(viewed.float(), dim=others)
