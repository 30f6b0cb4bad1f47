"""The grammar of the axis map: patterns such as `"(heads head_dim) hidden"`, matching parameter names, taking indices.

A pattern has one token per tensor dimension, C-ordered as in einops; `a+b` is a concatenation, `groups|a|b` one in every
group. A token that is a number is a size that no cut changes.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

# A dimension is a concatenation (`a+b`) of products (`(a b)`) of axis names.
Dim = tuple[tuple[str, ...], ...]

_TERM = r"(?:\(\w+(?: \w+)*\)|\w+)"
_DIM = re.compile(rf"{_TERM}(?:[+|]{_TERM})*")


class ByGroup(tuple):
    """A `Dim` whose terms lie side by side in every group: `groups|a|b`, where `groups` divides the first axes of the terms."""

    groups: str = ""


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
    dims = dim_patterns(pattern)
    if " ".join(dims) != pattern:
        raise AxisError(f"Cannot read the pattern {pattern!r}: write axes, '(a b)' products and 'a+b' sums with one space")
    return tuple(map(_parse_dim, dims))


def _parse_dim(dim: str) -> Dim:
    found = tuple(tuple(term.strip("()").split()) for term in terms(dim))
    if "|" not in dim:
        return found
    grouped = ByGroup(found[1:])
    (grouped.groups,) = found[0]
    return grouped


def dim_patterns(pattern: str) -> list[str]:
    """Return the part of a pattern that each tensor dimension has."""
    return _DIM.findall(pattern)


def terms(dim: str) -> list[str]:
    """Return the terms of the sum that a dimension's part of a pattern is."""
    return re.findall(_TERM, dim)


def dim_names(dim: Dim) -> set[str]:
    """Return the axes of one tensor dimension; a number is none."""
    return {axis for term in dim for axis in term if not axis.isdigit()}


def is_cut(pattern: str) -> bool:
    """Return whether a pattern has an axis, or only numbers."""
    return any(dim_names(dim) for dim in parse(pattern))


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Return the number of entries of one tensor dimension, given the size of every axis."""
    return sum(math.prod(int(axis) if axis.isdigit() else sizes[axis] for axis in term) for term in dim)


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
    unknown = [(term, axis) for term in dim for axis in term if axis not in sizes and not axis.isdigit()]
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
    if not dim_names(dim) & keep.keys():
        return None
    indices = []
    for term, index in zip(dim, _positions(dim, sizes), strict=True):
        for position, axis in enumerate(term):
            if axis in keep:
                index = index.index_select(position, keep[axis])
        indices.append(index.flatten())
    return torch.cat(indices).sort().values if isinstance(dim, ByGroup) else torch.cat(indices)


def _positions(dim: Dim, sizes: Mapping[str, int]) -> Iterator[Tensor]:
    """Yield where the entries of every term stand along a dimension, in the shape of the term's axes."""
    groups, offset = sizes[dim.groups] if isinstance(dim, ByGroup) else 1, 0
    width = dim_size(dim, sizes) // groups
    for term in dim:
        shape = [int(axis) if axis.isdigit() else sizes[axis] for axis in term]
        every, share = torch.arange(math.prod(shape)), math.prod(shape) // groups
        yield (every // share * width + every % share + offset).view(shape)
        offset += share


def join(shape: tuple[int, ...], parts: Iterable[Tensor]) -> Tensor:
    """Return a new tensor of a shape from consecutive pieces of its data."""
    result, filled = None, 0
    for piece in parts:
        if result is None:
            result = piece.new_empty(shape)
        result.view(-1)[filled : filled + piece.numel()] = piece.flatten()
        filled += piece.numel()
    return result


def pieces(
    tensor: Tensor, pattern: str, keep: Mapping[str, Tensor], sizes: Mapping[str, int], piece_bytes: int = 4 * 2**20
) -> Iterator[Tensor]:
    """Yield what is left of a tensor when only the kept indices of every axis stay, in pieces; `join` makes it whole.

    So a tensor larger than memory can be cut.

    Args:
        tensor (`Tensor`): A parameter whose shape is `tensor_shape(pattern, sizes)`; may be mapped from a file.
        pattern (`str`): One token per dimension.
        keep (`Mapping[str, Tensor]`): Kept indices of every axis that is cut, each of shape `(kept,)`; `(experts, kept)` of
            an axis of which every kept expert keeps its own.
        sizes (`Mapping[str, int]`): Sizes of the axes before the cut.
        piece_bytes (`int`, *optional*, defaults to 4 MB): About how much of the tensor is looked at for a piece.

    Raises:
        AxisError: when the tensor has another shape than its pattern.

    Example:

    ```python
    >>> weight = torch.arange(12.0).view(4, 3)  # (ffn, hidden)
    >>> parts = pieces(weight, "ffn hidden", {"ffn": torch.tensor([1, 3])}, {"ffn": 4, "hidden": 3})
    >>> join((2, 3), parts).tolist()
    [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0]]
    ```
    """
    expected = tensor_shape(pattern, sizes)
    if tuple(tensor.shape) != expected:
        raise AxisError(f"shape {tuple(tensor.shape)} is not that of the pattern {pattern!r}, {expected}")
    dims = parse(pattern)
    if not dims:  # a scalar
        yield tensor
        return
    keep = {axis: index for axis, index in keep.items() if any(axis in dim_names(dim) for dim in dims)}
    if any(index.dim() == 2 for index in keep.values()):  # every expert keeps its own
        experts, _, rest = pattern.partition(" ")
        assert experts == "experts", f"{pattern!r} does not begin with experts"
        for position, expert in enumerate(keep.get("experts", torch.arange(sizes["experts"])).tolist()):
            own = {axis: index[position] if index.dim() == 2 else index for axis, index in keep.items()}
            yield from pieces(tensor[expert], rest, own, sizes, piece_bytes)
        return
    first, *others = [dim_index(dim, keep, sizes) for dim in dims]
    rows = len(tensor) if first is None else len(first)
    step = max(1, piece_bytes * len(tensor) // max(1, tensor.nbytes))
    for start in range(0, rows, step):
        piece = tensor[start : start + step] if first is None else _select(tensor, 0, first[start : start + step])
        for position, index in enumerate(others, start=1):
            if index is not None:
                piece = _select(piece, position, index)
        yield piece


def _select(tensor: Tensor, position: int, index: Tensor) -> Tensor:
    """Return the entries along one dimension. On a CPU numpy does it, three times as fast as torch for 16-bit numbers."""
    if tensor.device.type != "cpu" or tensor.element_size() > 8:
        return tensor.index_select(position, index.to(tensor.device))
    number = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    taken = np.take(tensor.view(number).numpy(), index.numpy(), axis=position, mode="clip")
    return torch.from_numpy(taken).view(tensor.dtype)


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
    return next(matches(name, rows), None)


def matches(name: str, rows: Sequence[str] | Mapping[str, str]) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield every row that a parameter name fits, as `match` returns one."""
    for row in rows:
        matched = _name_regex(row).fullmatch(name)
        if matched:
            yield row, {axis: int(index) for axis, index in matched.groupdict().items()}


def axis_of_placeholder(placeholder: str) -> str:
    """Return the axis that a placeholder counts along: `{dense_layers}` and `{moe_layers}` are layers too."""
    return "layers" if placeholder.endswith("layers") else placeholder


def layer_index(indices: Mapping[str, int]) -> int | None:
    """Return the layer among the indices of a matched name; `None` outside of the layers."""
    return next((index for placeholder, index in indices.items() if axis_of_placeholder(placeholder) == "layers"), None)


def placeholders(row: str) -> tuple[str, ...]:
    """Return the axes that a row carries in its name, such as `("layers",)`."""
    return tuple(re.findall(r"{(\w+)}", row))


def by_axis(activation: Tensor, dim: Dim, axis: str, sizes: Mapping[str, int]) -> Tensor:
    """View the last dimension of an activation by axis.

    Args:
        activation (`Tensor` of shape `(..., dim)`): What a tap reads.
        dim (`Dim`): The pattern of its last dimension; a single product.
        axis (`str`): The axis to view by.
        sizes (`Mapping[str, int]`): Size of every axis.

    Returns:
        `Tensor` of shape `(..., axis, rest)` with the other axes of the product as rest; `(..., axis)` when there are none.
    """
    (term,) = dim
    if term == (axis,):
        return activation
    viewed = activation.unflatten(-1, [sizes[a] for a in term])
    return viewed.movedim(term.index(axis) - len(term), -len(term)).flatten(1 - len(term))


def labels(dim: Dim, axis: str, sizes: Mapping[str, int]) -> Tensor:
    """Return the index of an axis that every position along a dimension belongs to, shape `(dim,)`; -1 where to none."""
    found = torch.full([dim_size(dim, sizes)], -1)
    for term, positions in zip(dim, _positions(dim, sizes), strict=True):
        if axis in term:
            every = positions.movedim(term.index(axis), 0).reshape(sizes[axis], -1)
            found[every] = torch.arange(sizes[axis])[:, None].expand_as(every)
    return found
