"""The loss on the output by Liger's fused linear JSD, an optional package: what `chunked_loss` gives, for a live teacher.

Liger knows one divergence with or without cross-entropy, plain heads and equal vocabularies; the rest is refused by name.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_liger_kernel_available

from hf_minitron.distillation.losses.tokens import CROSS_ENTROPY
from hf_minitron.distillation.signals import DenseSignal
from hf_minitron.head import Head, head_of

# The teacher's share of the mixture that makes Liger's JSD this loss; `None` for that of the settings.
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": None}


def check_liger(args: Any) -> None:
    """Refuse settings of which Liger's loss has no equal.

    Raises:
        ValueError: naming the setting.
    """
    if not args.use_liger_loss:
        return
    if not is_liger_kernel_available():
        raise ValueError("use_liger_loss: pip install liger-kernel first")
    others = [name for name in args.losses if name != CROSS_ENTROPY]
    if len(others) != 1 or others[0] not in BETAS:
        raise ValueError(f"use_liger_loss: losses has {', '.join(args.losses)}, and Liger one of {', '.join(BETAS)}, with or "
                         f"without {CROSS_ENTROPY}; leave it out")  # fmt: skip
    for name in ("label_smoothing_factor", "top_k"):
        if getattr(args, name):
            raise ValueError(f"use_liger_loss: Liger has no {name}; leave one of them out")


def check_liger_models(args: Any, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Refuse models whose logits Liger would make otherwise.

    Args:
        args (`DistillationArguments`): Nothing is refused without `use_liger_loss`.
        student (`PreTrainedModel`): The student.
        teacher (`PreTrainedModel`, *optional*): The live teacher; `None` of a cached one.

    Raises:
        ValueError: saying what differs.
    """
    if not args.use_liger_loss:
        return
    if teacher is None:
        raise ValueError("use_liger_loss: Liger reads a live teacher's states, and this one is cached; leave it out")
    heads = {"student": head_of(student), "teacher": head_of(teacher)}
    for name, head in heads.items():
        if head.scale != 1 or head.softcap is not None:
            raise ValueError(
                f"use_liger_loss: the {name}'s logits have a scale or a softcap, which Liger has not; leave it out"
            )
    sizes = [len(head.weight) for head in heads.values()]
    if sizes[0] != sizes[1]:
        raise ValueError(f"use_liger_loss: the vocabularies have {sizes[0]} and {sizes[1]} entries, of which Liger compares "
                         "others than the shared ones; leave it out")  # fmt: skip


def liger_loss(
    hidden: Tensor, student: Head, signal: DenseSignal, targets: Tensor, weights: Mapping[str, float], temperature: float,
    beta: float, chunk_size: int,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return what `chunked_loss` does; the settings are those of `OutputLosses`."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    name = next(name for name in weights if name != CROSS_ENTROPY)
    softened = temperature**2
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=weights.get(CROSS_ENTROPY, 0.0),
        weight_soft_loss=weights[name] * softened,
        beta=beta if BETAS[name] is None else BETAS[name],
        temperature=temperature,
        compiled=hidden.device.type != "cpu",
        chunk_size=chunk_size,
        return_soft_hard_loss=True,
    )
    teacher, count = signal.head, len(targets)
    parts = (
        hidden,
        student.weight,
        signal.hidden.to(teacher.weight.dtype),
        teacher.weight,
        targets,
        student.bias,
        teacher.bias,
    )
    total, divergence, entropy = loss(*parts)  # means over the tokens, which `reduction.per_token` takes
    sums = {name: divergence.detach() * count * softened, CROSS_ENTROPY: entropy.detach() * count}
    return total * count, {name: sums[name] for name in weights}


def runs_liger(signal: object, targets: Tensor) -> bool:
    """Return whether a batch can be given to Liger, which makes gradients in any case: not to evaluate, nor of no token."""
    return isinstance(signal, DenseSignal) and torch.is_grad_enabled() and len(targets) > 0
