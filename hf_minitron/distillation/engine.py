"""How accelerate spreads a training over processes: what is refused, and what is set otherwise than it does by itself."""

import logging
from dataclasses import replace

import torch
from transformers import PreTrainedModel, Trainer

logger = logging.getLogger(__name__)


def prepare_engine(trainer: Trainer) -> None:
    """Let FSDP2 reduce gradients in float32 and keep them sharded; refuse what the chunked loss does not know.

    Raises:
        ValueError: for a way to spread a model over devices, or a loss inside of the model, that it would not see.
    """
    _check_engine(trainer)
    accelerator = trainer.accelerator
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:  # accelerate's reduces, and adds up micro-batches, in 16 bits
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
        # what waits for the last micro-batch waits unsharded: the gradients of a whole model on every device
        chosen = trainer.args.accelerator_config.gradient_accumulation_kwargs or {}
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = chosen.get("sync_each_batch", True)


def _check_engine(trainer: Trainer) -> None:
    args, parallel = trainer.args, getattr(trainer.accelerator, "parallelism_config", None)
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process (DataParallel): start with `accelerate launch` instead")
    for kind in ("tp", "cp", "sp"):
        if getattr(parallel, f"{kind}_size", 1) > 1:
            raise ValueError(f"parallelism_config: {kind}_size is above 1: no tensor, context or sequence parallelism here")
    if getattr(trainer.accelerator.state, "fsdp_plugin", None) and not trainer.accelerator.is_fsdp2:
        raise ValueError("fsdp_config: version 1, whose flat parameters the chunked loss cannot read; set version: 2")
    if getattr(trainer, "is_distributed_loading_by_transformers", False):  # since transformers 5.19
        raise ValueError("model: sharded by from_pretrained(distributed_config=...); load it whole, accelerate shards it")
    if getattr(trainer.model.config, "output_router_logits", False):
        raise ValueError("model: output_router_logits adds a loss that is none of `losses`; set it to False in its config")


def train_in_float32(model: PreTrainedModel) -> None:
    """Let what is trained be float32 where it is not: in 16 bits most steps of an optimizer are rounded away.

    Args:
        model (`PreTrainedModel`): It is changed; mixed precision still computes in 16 bits.
    """
    narrow = [p for p in model.parameters() if p.requires_grad and p.is_floating_point() and p.dtype.itemsize < 4]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    if narrow:
        logger.warning("model: its weights of 16 bits are trained, and saved, in float32; bf16=True computes in bfloat16")
