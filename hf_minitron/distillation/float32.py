"""How float32 matrices are multiplied, one setting of the whole process: in TF32 while a training that asks for it runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import enable_tf32

# Where the setting stands: one for all since torch 2.9, before that one for each library.
PLACES = (
    [(torch.backends, "fp32_precision")]
    if hasattr(torch.backends, "fp32_precision")
    else [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
)


@contextmanager
def float32_as_it_is(inside: list | None = None) -> Iterator[list]:
    """Leave the setting as it was when the context ends; yield a list, whose one entry is then what the context had made of it.

    Args:
        inside (`list`, *optional*): What it is in the context, from such an entry; as it is when left out.
    """
    before, chosen = [getattr(place, name) for place, name in PLACES], []
    try:
        _set(inside or before)
        yield chosen
    finally:
        chosen.append([getattr(place, name) for place, name in PLACES])
        _set(before)


def _set(values: list) -> None:
    if hasattr(enable_tf32, "cache_clear"):  # Transformers would take it for set already
        enable_tf32.cache_clear()
    for (place, name), value in zip(PLACES, values, strict=True):
        setattr(place, name, value)
