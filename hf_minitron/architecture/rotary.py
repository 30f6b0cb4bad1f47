"""Rotary positions of a class that rotates every channel of a head, in place of one that rotates some
(`partial_rotary_factor`): channels change places, and those that are not rotated get a frequency of next to nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# A frequency divided by it turns nothing in float32, whatever the position.
NEVER = 1e30


@dataclass(frozen=True, eq=False)
class FullRotary:
    """Full rotation that computes what a partial one does.

    Args:
        parameters (`Mapping`): `rope_parameters` of the class that rotates every channel.
        order (`Tensor`): For every channel of a head, where it stood.
        scale (`Tensor`): What queries are multiplied by: the class scales the channels that are not rotated, too.
    """

    parameters: Mapping[str, Any]
    order: Tensor
    scale: Tensor

    @classmethod
    def of(cls, config: PreTrainedConfig, head_dim: int) -> "FullRotary | None":
        """Return that of a config with `longrope` on a part of a head's channels; `None` of any other."""
        rope = dict(config.rope_parameters or {})
        rotated = int(head_dim * rope.pop("partial_rotary_factor", 1.0))
        if rope.get("rope_type") != "longrope" or rotated == head_dim:
            return None
        half, rest = rotated // 2, head_dim // 2 - rotated // 2
        _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config)
        for key in ("short_factor", "long_factor"):
            powers = [2 * pair / rotated - 2 * pair / head_dim for pair in range(half)]
            same = [factor * rope["rope_theta"] ** power for factor, power in zip(rope[key], powers, strict=True)]
            rope[key] = same + [NEVER] * rest
        channels = torch.arange(head_dim)
        first, second, still = channels[:half], channels[half:rotated], channels[rotated:]
        scale = torch.ones(head_dim, dtype=torch.float64)
        scale[rotated:] = attention_factor**-2  # queries take what keys are scaled by, too
        order = torch.cat([first, still[:rest], second, still[rest:]])
        return cls({**rope, "attention_factor": attention_factor}, order, scale[order])

    def turned(self, weight: Tensor, role: str) -> Tensor:
        """Return the weight of a projection that gives queries or keys, of shape `(heads x head_dim, hidden)`, for it."""
        heads = weight.unflatten(0, (-1, len(self.order)))[:, self.order]
        scaled = (heads * self.scale[:, None]).to(heads) if role == "query" else heads
        return scaled.flatten(0, 1)
