"""How many bytes of a device a pass that scores or fits needs, counted from a config alone."""

import math
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoConfig

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.importance.moments import SecondMoment
from hf_minitron.importance.taps import moment_readings
from hf_minitron.memory import free_memory

FLOAT = torch.float32.itemsize
COPIES = 2  # in float32, that metrics make of what they read; of the two models of a fit


def scoring_bytes(
    architecture: Architecture, dtype: torch.dtype, tokens: int = 0, moments: bool = False, layer_by_layer: bool = False
) -> int:
    """Return the bytes that scoring needs on a device: weights, second moments, activations.

    Args:
        architecture (`Architecture`): The model's.
        dtype (`torch.dtype`): Of its weights.
        tokens (`int`, *optional*, defaults to 0): Of one batch.
        moments (`bool`, *optional*, defaults to `False`): Whether second moments are measured as well.
        layer_by_layer (`bool`, *optional*, defaults to `False`): Whether only one layer is held, with its moments, and the
            next one, which is read meanwhile; else all of them.

    Example:

    ```python
    >>> architecture = Architecture.of(teacher.config)
    >>> scoring_bytes(architecture, torch.bfloat16, moments=True) > scoring_bytes(architecture, torch.bfloat16)
    True
    ```
    """
    over_layers = max if layer_by_layer else sum
    parameters = [p for p in architecture.parameters.values() if p.role != "head" or not layer_by_layer]  # it scores nothing
    weights: dict[int | None, int] = defaultdict(int)
    for parameter in parameters:
        weights[parameter.layer] += math.prod(parameter.shape) * dtype.itemsize
    sizes = moment_bytes(architecture) if moments else {}
    outside = weights.pop(None, 0) + sum(sizes.get(None, ()))
    inside = over_layers(weights.values()) * (2 if layer_by_layer else 1)
    inside += over_layers(sum(sizes.get(layer, ())) for layer in weights)
    copied = max((size for layer in sizes.values() for size in layer), default=0)  # to be reduced and written
    states = dtype.itemsize * _widths(architecture) + COPIES * FLOAT * architecture.shape["hidden"]
    return outside + inside + copied + tokens * states


def sequential_bytes(architecture: Architecture, dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes that the states of a layer take in a sequential fit, of teacher and student, all tokens at once.

    Args:
        architecture (`Architecture`): The teacher's.
        dtype (`torch.dtype`): In which its layers run.
        tokens (`int`): That are read.
    """
    return COPIES * dtype.itemsize * tokens * _widths(architecture)


def _widths(architecture: Architecture) -> int:
    """Return how wide what the matrices of a layer read or give is in all, of the widest layer."""
    widths: dict[int, int] = defaultdict(int)
    for parameter in architecture.parameters.values():
        if parameter.layer is not None and len(parameter.shape) > 1:
            widths[parameter.layer] += max(parameter.shape[-2:])
    return max(widths.values())


def fits(folder: Path, dtype: torch.dtype, device: torch.device, tokens: int = 0, moments: bool = False) -> bool:
    """Return whether running a whole model, once for every process, takes at most four fifths of the device's free memory.

    Args:
        folder (`Path`): The model.
        dtype (`torch.dtype`): Of its weights.
        device (`torch.device`): Where it runs.
        tokens (`int`, *optional*, defaults to 0): Of a batch.
        moments (`bool`, *optional*, defaults to `False`): Whether second moments of all layers are held as well.
    """
    architecture = Architecture.of(AutoConfig.from_pretrained(folder))
    return scoring_bytes(architecture, dtype, tokens, moments) <= 0.8 * free_memory(device)


def moment_bytes(architecture: Architecture) -> dict[int | None, list[int]]:
    """Return the bytes of the second moments of each layer; those outside of the layers are at `None`."""
    found: dict[int | None, list[int]] = defaultdict(list)
    for reading in moment_readings(architecture):
        if not isinstance(reading.metrics[0], SecondMoment):
            continue
        size = architecture.shape["hidden"]
        if reading.axis != "hidden":
            _, dim = architecture.weights[reading.module].dim_of(reading.axis)
            size = axes.dim_size(dim, architecture.shape.at(reading.layer))
        found[reading.layer].append(FLOAT * (size + 1) * size)
    return dict(found)
