"""How accelerate spreads a training over processes: what is refused, and what is set otherwise than it does by itself."""

import logging
import math
import os
import re
from dataclasses import replace

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_minitron.architecture.config import model_of
from hf_minitron.distillation.teacher import LiveTeacher

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
    sharded = trainer.accelerator.is_fsdp2 or trainer.is_deepspeed_enabled
    if trainer.is_deepspeed_enabled and args.ema_decay is not None:
        raise ValueError("ema_decay: not with DeepSpeed, which keeps weights in buffers of its own; use FSDP, or leave it out")
    if sharded and args.ema_decay is not None and args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end: with FSDP it loads weights that ema_decay has not averaged; leave it out")
    if sharded and args.use_liger_loss:
        raise ValueError("use_liger_loss: not with FSDP or DeepSpeed, which shard the head that Liger reads; leave it out")
    if sharded and getattr(args, "lmbda", 0):
        raise ValueError(f"lmbda: {args.lmbda}, not with FSDP or DeepSpeed, whose shards no process can generate with alone; "
                         "use DDP, with LoRA or gradient_checkpointing where memory is short, or set lmbda to 0")  # fmt: skip
    if sharded and getattr(trainer.model, "quantization_method", None):
        raise ValueError("model: quantized weights are not sharded by FSDP or DeepSpeed; train whole copies, or from bfloat16")
    if getattr(trainer, "is_distributed_loading_by_transformers", False):  # since transformers 5.19
        raise ValueError("model: sharded by from_pretrained(distributed_config=...); load it whole, accelerate shards it")
    if getattr(trainer.model.config, "output_router_logits", False):
        raise ValueError("model: output_router_logits adds a loss that is none of `losses`; set it to False in its config")


def shard_models(accelerator: Accelerator, student: PreTrainedModel, teacher: object) -> None:
    """Shard a live teacher as accelerate will shard the student, and let a student that is sharded be as it is."""
    if isinstance(teacher, LiveTeacher):
        teacher.shard(accelerator)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)  # none where its user has sharded the student
    if plugin and isinstance(student, FSDPModule):  # accelerate looks for classes by their names, which sharding has changed
        plugin.auto_wrap_policy = None


def sharded_loading(args: TrainingArguments, config: PreTrainedConfig, trained: bool) -> DistributedConfig | None:
    """Return how each process loads its own shard of a model, as accelerate's FSDP2 would shard it later.

    Args:
        args (`TrainingArguments`): Of the training; FSDP is theirs, or that of `accelerate launch`.
        config (`PreTrainedConfig`): The model's.
        trained (`bool`): Whether the model is the student.

    Returns:
        `DistributedConfig` or `None`: `None` where a model is not sharded, or only after it was loaded whole: by older
        versions of transformers; and a student with FSDP's own activation checkpointing, in fp16, or that `trains_whole_only`.
    """
    state, plugin = PartialState(), _fsdp_plugin(args)
    if plugin is None or plugin.fsdp_version != 2 or args.parallelism_config or state.num_processes == 1:
        return None
    unsharded = (DistributedType.NO, DistributedType.MULTI_CPU)
    if state.distributed_type in unsharded or not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
        return None
    with torch.device("meta"):
        model = model_of(config)
    if trained and (plugin.activation_checkpointing or args.fp16 or trains_whole_only(model, state.num_processes)):
        return None
    plugin.set_auto_wrap_policy(model)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model) or (lambda module: False)
    layers = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, module in model.named_modules() if wraps(module)}
    return DistributedConfig(
        fsdp_size=state.num_processes,
        fsdp_plan=dict.fromkeys(layers, "free_full_weight" if plugin.reshard_after_forward else "keep_full_weight"),
        fsdp_cpu_offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        fsdp_mixed_precision=trained and args.bf16,
    )


def _fsdp_plugin(args: TrainingArguments) -> FullyShardedDataParallelPlugin | None:
    """Return what the Trainer will make of its arguments, or of the environment that `accelerate launch` sets."""
    if args.fsdp_plugin_args is not None:
        return FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    return FullyShardedDataParallelPlugin() if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else None


def trains_whole_only(model: PreTrainedModel, processes: int) -> bool:
    """Return whether a student must be loaded whole to be sharded over so many processes and trained.

    So must one of which some process would hold nothing of a parameter, for accelerate tells an optimizer's by their addresses,
    and one whose tied head and embedding leave a remainder, for Transformers shards each by itself, padded apart.
    """
    rows = {parameter.shape[0] for parameter in model.parameters()}
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    empty = any(math.ceil(number / processes) * (processes - 1) >= number for number in rows)
    return empty or (head is embedding and len(embedding) % processes != 0)


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
