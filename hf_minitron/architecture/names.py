"""Names on disk: what Transformers' conversion mapping calls the parameters of a model in its checkpoints."""

import re
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace

import torch
from transformers.core_model_loading import revert_weight_conversion

from hf_minitron import axes
from hf_minitron.architecture.binding import Parameter
from hf_minitron.architecture.outline import Outline
from hf_minitron.shape import Shape

# Stands for the index of a placeholder while names are converted.
INDEX = 990_000


def stored_rows(row: str, pattern: str, model: Outline, shape: Shape) -> dict[str, str]:
    """Return the rows that checkpoints have in place of a row, with their patterns; none where they have the row itself.

    Args:
        row (`str`): Of a parameter in memory.
        pattern (`str`): Its axes.
        model (`Outline`): The model.
        shape (`Shape`): Its shape.
    """
    numbers = {placeholder: INDEX + at for at, placeholder in enumerate(axes.placeholders(row))}
    tensor = torch.empty(axes.tensor_shape(pattern, shape.sizes), device="meta")
    like = SimpleNamespace(_weight_conversions=list(model.conversions), config=model.config)
    found: dict[str, tuple[int, ...]] = {}
    for name, part in revert_weight_conversion(like, {row.format_map(numbers): tensor}).items():
        for placeholder, number in numbers.items():
            name = name.replace(f".{number}.", f".{{{placeholder}}}.")
        found.setdefault(re.sub(r"(?<=\.experts\.)\d+(?=\.)", "{experts}", name), tuple(part.shape))
    if list(found) == [row]:
        return {}
    patterns = _patterns(pattern, list(found))
    sizes = {name: axes.tensor_shape(part, shape.sizes) for name, part in patterns.items()}
    fits = all(size == found[name] for name, size in sizes.items())
    # Transformers may save equal chunks of what it has joined from parts of different sizes
    return patterns if fits or _joined(sizes.values()) == _joined(found.values()) == tuple(tensor.shape) else {}


def _joined(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of tensors put together along their first dimension."""
    first, *_ = shapes = list(shapes)
    return sum(shape[0] for shape in shapes), *first[1:]


def _patterns(pattern: str, names: Sequence[str]) -> dict[str, str]:
    """Return the patterns of the parts of a tensor: without experts where each has its own, the terms of a sum apart."""
    dims = axes.dim_patterns(pattern)
    if any("{experts}" in name for name in names):
        dims = [dim for dim in dims if dim != "experts"]
    terms = [axes.terms(dim) for dim in dims]
    at = next((at for at, parts in enumerate(terms) if len(parts) == len(names) > 1), None)
    parts = dict(zip(names, terms[at], strict=True)) if at is not None else {}
    return {name: " ".join([*dims[:at], parts[name], *dims[at + 1 :]] if parts else dims) for name in names}


def parts_of(whole: Parameter, rows: Mapping[str, str], shape: Shape) -> tuple[Parameter, ...]:
    """Return what checkpoints store in place of a parameter: one part for each of `rows`, or one for each expert too."""
    found = []
    for row, pattern in rows.items():
        split, size = "experts" in axes.placeholders(row), axes.tensor_shape(pattern, shape.sizes)
        for expert in range(shape["experts"] if split else 1):
            indices = {**whole.indices, **({"experts": expert} if split else {})}
            name = row.format_map(indices)
            found.append(Parameter(name, size, row, pattern, indices, whole.role, whole.module, whole.kind))
    return tuple(found)
