"""Weights that are stored in fp8 with a scale for each block, or in mxfp4: dequantized by Transformers, one at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hf_minitron.architecture.config import DEQUANTIZED
from hf_minitron.checkpoint.tensor_spec import TensorSpec

# safetensors' names of the dtypes that only quantized checkpoints hold.
DTYPES = ("F8_E4M3", "F8_E5M2")
# What the scales of a weight are called: mxfp4's, and fp8's in place of the end of its name.
BLOCKS, SCALES = "_blocks", "_scales"
FP8_SCALES = (("", "_scale_inv"), (".weight", ".scale"), (".weight", ".qscale_weight"))


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored quantized.

    Args:
        numbers (`str`): The name of the stored tensor of its numbers.
        scales (`str`): The name of that of their scales: one for each block, or for all.
        shape (`tuple[int, ...]`): Its shape once dequantized.
        packed (`bool`): Whether it is of mxfp4.
        block (`Sequence[int]`, *optional*): Rows and columns of a block of fp8; the last ones may be smaller.
        dtype (`torch.dtype`): What it is dequantized to.
    """

    numbers: str
    scales: str
    shape: tuple[int, ...]
    packed: bool
    block: Sequence[int] | None
    dtype: torch.dtype

    def read(self, stored: Callable[[str], Tensor]) -> Tensor:
        """Return it dequantized; `stored` returns a stored tensor by its name."""
        numbers, scales = stored(self.numbers), stored(self.scales)
        if self.packed:
            return convert_moe_packed_tensors(numbers, scales, dtype=self.dtype)
        rows, columns = shape = numbers.shape[-2:]
        counts = tuple(scales.shape[-2:])
        if self.block and counts == tuple(math.ceil(size / step) for size, step in zip(shape, self.block, strict=True)):
            down, right = (count * step - size for count, step, size in zip(counts, self.block, shape, strict=True))
            # Transformers takes all blocks to be alike
            numbers = nn.functional.pad(numbers.view(torch.uint8), (0, right, 0, down)).view(numbers.dtype)
        found = Fp8Dequantize(None).convert({"weight": numbers, "weight_scale_inv": scales})["weight"]
        return found[..., :rows, :columns].to(self.dtype).contiguous()


def weights_in(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantizedWeight]:
    """Return the weights of a checkpoint that its config says are in fp8 or mxfp4, by their names.

    Args:
        config (`Mapping`): The content of its `config.json`.
        stored (`Mapping[str, TensorSpec]`): Every stored tensor.
    """
    settings, text = config.get("quantization_config") or {}, config | config.get("text_config", {})
    if settings.get("quant_method") not in DEQUANTIZED:
        return {}
    dtype = getattr(torch, text.get("dtype") or text.get("torch_dtype") or "bfloat16")
    block, found = settings.get("weight_block_size", (128, 128)), {}
    for name, numbers, scales in _pairs(stored):
        shape, packed = tuple(stored[numbers].shape), numbers != name
        if packed:
            experts, rows, groups, pairs = shape
            shape = experts, groups * pairs * 2, rows
        found[name] = QuantizedWeight(numbers, scales, shape, packed, block, dtype)
    return found


def _pairs(stored: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str, str]]:
    """Yield names of weights, of the stored tensors of their numbers, and of their scales."""
    for name, spec in stored.items():
        if name.endswith(BLOCKS) and (scales := f"{name.removesuffix(BLOCKS)}{SCALES}") in stored:
            yield name.removesuffix(BLOCKS), name, scales
        elif spec.dtype in DTYPES:
            named = (f"{name.removesuffix(end)}{new}" for end, new in FP8_SCALES if name.endswith(end))
            if scales := next((scales for scales in named if scales in stored), None):
                yield name, name, scales
