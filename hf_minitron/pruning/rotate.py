"""One rotation of the whole residual stream onto its principal components, folded into the weights (SliceGPT, 2401.15024).

The rotated teacher computes the same and is a stock checkpoint: every norm's weight is folded into the projections that read
it, and the head is no longer tied. A cut of `hidden` then drops the directions that hold least.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_minitron.architecture.architecture import HIDDEN, OUTPUT, Architecture, Parameter
from hf_minitron.architecture.config import with_text
from hf_minitron.checkpoint.checkpoint import TensorSpec
from hf_minitron.checkpoint.tensors import Tensors
from hf_minitron.plan import Plan
from hf_minitron.statistics import Moments


@dataclass(frozen=True)
class Rotation:
    """The teacher seen in the basis of its principal components.

    Args:
        basis (`Tensor` of shape `(hidden, hidden)`): float64; one component per column, by falling energy.
        norms (`Mapping[str, Tensor]`): Norm to what it multiplies the channels by, float64.
        norm_of (`Mapping[str, str]`): Projection to the norm that it reads.
        offset (`float`): What the family's norms add to their weights.
    """

    basis: Tensor
    norms: Mapping[str, Tensor]
    norm_of: Mapping[str, str]
    offset: float

    def __call__(self, parameter: Parameter, tensor: Tensor) -> Tensor:
        """Return a tensor of the rotated teacher, in the tensor's dtype.

        Args:
            parameter (`Parameter`): What it is.
            tensor (`Tensor`): The teacher's values.
        """
        module, dims = parameter.module, parameter.dims
        if HIDDEN not in dims:
            return tensor
        if parameter.role == "norm":
            return torch.full_like(tensor, 1 - self.offset)
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        wide, basis = tensor.to(dtype), self.basis.to(tensor.device, dtype)
        if dims[-1] != HIDDEN:  # writes to the stream
            return (basis.T @ wide).to(tensor.dtype)
        if module in self.norm_of:
            wide = wide * self.norms[self.norm_of[module]].to(wide)
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


class RotatedTensors:
    """The teacher's tensors in another basis, with a head of its own.

    Args:
        tensors (`Tensors`): The teacher's.
        architecture (`Architecture`): The teacher's, untied.
        rotation (`Rotation`): The basis.
    """

    def __init__(self, tensors: Tensors, architecture: Architecture, rotation: Rotation):
        self.architecture, self.rotation, self._tensors = architecture, rotation, tensors
        self._source = {name: name for name in tensors.names()} | tensors.architecture.outline.tied

    def names(self) -> Iterable[str]:
        """Return the teacher's names, and the head's."""
        return self._source

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a tensor."""
        return self._tensors.spec(self._source[name])

    def read(self, name: str) -> Tensor:
        """Return a tensor of the rotated teacher."""
        return self.rotation(self.architecture.stored[name], self._tensors.read(self._source[name]))


def rotated(tensors: Tensors, moments: Moments | None, basis: Tensor | None = None) -> RotatedTensors:
    """Rotate the stream onto the principal components of its normalised states, summed over all norms.

    Args:
        tensors (`Tensors`): The teacher's.
        moments (`Moments`, *optional*): `statistics.moments`; not needed with a basis.
        basis (`Tensor` of shape `(hidden, hidden)`, *optional*): Of a rotated plan, in place of one that is computed.

    Raises:
        ValueError: for a model whose stream cannot be rotated.
    """
    architecture = untied(tensors.architecture)
    offset = architecture.norm_offset
    reads = {name: (r.layer, r.moment.removesuffix(OUTPUT)) for name, r in architecture.hidden_reads.items()}
    norms = {norm: tensors.read(f"{norm}.weight").cpu().double() + offset for _, norm in set(reads.values())}
    if basis is None:
        total = 0.0
        for _, norm in sorted(set(reads.values()), key=str):
            scale = _unscaled(norms[norm])
            total = total + scale[:, None] * moments[f"{norm}{OUTPUT}"][:-1].double() * scale
        basis = torch.linalg.eigh(total)[1].flip(1)
    rotation = Rotation(basis, norms, {reader: norm for reader, (_, norm) in reads.items()}, offset)
    return RotatedTensors(tensors, architecture, rotation)


def untied(architecture: Architecture) -> Architecture:
    """Return the architecture with a head of its own.

    Raises:
        ValueError: for a model whose stream cannot be rotated.
    """
    config = architecture.config
    if not architecture.supports("rotation"):
        raise ValueError(
            f"corrections: rotation is not for {config.model_type}: it needs RMS norms that stand before attention and MLP, "
            "and both added to the stream as they are. Leave rotation out"
        )
    tied = {"tie_word_embeddings": False}
    return Architecture.of(with_text(config, tied, tied))


def _unscaled(weight: Tensor) -> Tensor:
    """Return one over a norm's weight; 0 where it lets nothing pass."""
    return torch.where(weight == 0, 0, 1 / weight)
