"""One rotation of the whole residual stream onto its principal components, folded into the weights (SliceGPT, 2401.15024).

The rotated teacher computes the same and is a stock checkpoint: every norm's weight is folded into the projections that read
it, and the head is no longer tied. A cut of `hidden` then drops the directions that hold least. It must not know about files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_minitron import axes
from hf_minitron.families.family import OUTPUT, Family
from hf_minitron.families.meta import parameters_of
from hf_minitron.plan import Plan
from hf_minitron.pruning.compensate import read_moment


@dataclass(frozen=True)
class Rotation:
    """The teacher seen in the basis of its principal components.

    Args:
        basis (`Tensor` of shape `(hidden, hidden)`): float64; one component per column, by falling energy.
        norms (`Mapping[str, Tensor]`): Norm to what it multiplies the channels by, float64.
        readers (`Mapping[str, str]`): Projection to the norm that it reads.
        offset (`float`): What the family's norms add to their weights.
    """

    basis: Tensor
    norms: Mapping[str, Tensor]
    readers: Mapping[str, str]
    offset: float

    def __call__(self, name: str, pattern: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the rotated teacher, in the tensor's dtype.

        Args:
            name (`str`): The parameter.
            pattern (`str`): Its axes.
            tensor (`Tensor`): The teacher's values.
        """
        module = name.rpartition(".")[0]
        dims = axes.parse(pattern)
        if (("hidden",),) not in dims:
            return tensor
        if module in self.norms:
            return torch.full_like(tensor, 1 - self.offset)
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        wide, basis = tensor.to(dtype), self.basis.to(tensor.device, dtype)
        if dims[-1] != (("hidden",),):  # writes to the stream
            return (basis.T @ wide).to(tensor.dtype)
        if module in self.readers:
            wide = wide * self.norms[self.readers[module]].to(wide)
        return (wide @ basis).to(tensor.dtype)  # reads the stream; an embedding or a bias that is added to it

    def moment(self, norm: str, stored: Tensor) -> Tensor:
        """Return E[x xᵀ] and E[x] (the last row) of what a norm of the rotated teacher gives, from the teacher's."""
        turn = _unscaled(self.norms[norm])[:, None] * self.basis
        moment, mean = stored[:-1].double(), stored[-1].double()
        return torch.cat([turn.T @ moment @ turn, (mean @ turn)[None]])

    def plan(self, plan: Plan) -> Plan:
        """Return a plan that keeps the leading components, as many as it kept channels; a rotated one as it is."""
        if plan.rotated:
            return plan
        leading = list(range(plan.after["hidden"]))
        return replace(plan, keep={**plan.keep, "hidden": leading}, rotated=True, basis=self.basis)


def rotation_for(
    config: PreTrainedConfig,
    family: Family,
    moments: Path | None,
    read: Callable[[str], Tensor],
    basis: Tensor | None = None,
) -> Rotation:
    """Return the rotation onto the principal components of the normalised residual stream, summed over all norms.

    Args:
        config (`PreTrainedConfig`): The teacher's, untied.
        family (`Family`): Its family.
        moments (`Path`, *optional*): The folder that `calibrate(..., moments=...)` wrote; not needed with a basis.
        read (`Callable`): Returns the teacher's parameter of a name.
        basis (`Tensor` of shape `(hidden, hidden)`, *optional*): Of a rotated plan, in place of one that is computed.
    """
    offset = family.norm_offset_of(config)
    readers = {reader: (layer, tap.removesuffix(OUTPUT)) for reader, (layer, tap) in family.readers_of(config).items()}
    norms = {norm: read(f"{norm}.weight").cpu().double() + offset for _, norm in set(readers.values())}
    if basis is None:
        total = 0.0
        for layer, norm in sorted(set(readers.values()), key=str):
            scale = _unscaled(norms[norm])
            total = total + scale[:, None] * read_moment(moments, layer, f"{norm}{OUTPUT}")[:-1].double() * scale
        basis = torch.linalg.eigh(total)[1].flip(1)
    return Rotation(basis, norms, {reader: norm for reader, (_, norm) in readers.items()}, offset)


def untied(config: PreTrainedConfig, family: Family) -> PreTrainedConfig:
    """Return the config with a head of its own.

    Raises:
        ValueError: for a model whose stream cannot be rotated.
    """
    if not family.plain_stream:
        raise ValueError(
            f"corrections: rotation is not for {config.model_type}: it needs RMS norms that stand before attention and MLP, "
            "and both added to the stream as they are. Leave rotation out"
        )
    made = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    made.name_or_path = config.name_or_path
    assert "lm_head.weight" in parameters_of(made)
    return made


def _unscaled(weight: Tensor) -> Tensor:
    """Return one over a norm's weight; 0 where it lets nothing pass."""
    return torch.where(weight == 0, 0, 1 / weight)
