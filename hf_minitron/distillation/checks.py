"""Training arguments that could not work, or would have no effect: refused when they are made, before anything is loaded.

`TrainingArguments` finds many of these only when training begins, or never.
"""

import copy
import dataclasses
import json
import math
import numbers
import sys
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from accelerate import ParallelismConfig
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations, integration_utils
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available, is_torch_xla_available

from hf_minitron.errors import one_line

# What a number may be, and which settings are such numbers. Those of no row may be any finite number.
BOUNDS = (
    ("at least 1", lambda value: value >= 1, (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "eval_accumulation_steps",
        "save_total_limit", "chunk_size", "top_k", "dataloader_prefetch_factor", "torch_empty_cache_steps", "ddp_timeout",
        "ddp_bucket_cap_mb", "eval_tokens", "early_stopping_patience", "max_new_tokens",
    )),
    ("above zero", lambda value: value > 0, (
        "learning_rate", "num_train_epochs", "temperature", "logging_steps", "save_steps", "eval_steps", "neftune_noise_alpha",
    )),
    ("zero or more", lambda value: value >= 0, (
        "weight_decay", "adam_epsilon", "max_grad_norm", "eval_delay", "dataloader_num_workers", "seed", "data_seed",
        "sampling_temperature",
    )),
    ("between 0 and 1", lambda value: 0 <= value <= 1, ("beta", "label_smoothing_factor", "lmbda")),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2", "ema_decay")),
    ("at least 1, or -1 to count epochs", lambda value: value == -1 or value >= 1, ("max_steps",)),
    ("a share below 1, or whole steps", lambda value: 0 <= value < 1 or value == int(value) >= 1, ("warmup_steps",)),
)  # fmt: skip
# Settings that name a file, unless they hold what would be in it.
FILES = ("deepspeed", "fsdp_config", "accelerator_config")
# Settings of a switch that may be off, by one of its names.
NEEDS = {
    "fsdp_config": ("fsdp",),
    "liger_kernel_config": ("use_liger_kernel",),
    "activation_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", "activation_checkpointing"),
}
TOKENS_SEEN = ("all", "non_padding", "no")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Schedules without a warm-up, and without arguments: the Trainer ignores what they do not have.
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
NO_KWARGS = ("constant", "constant_with_warmup")


def check_values(args: Any) -> None:
    """Refuse numbers that are none or out of bounds, unknown choices and files that are not there.

    Args:
        args (`TrainingArguments` or another dataclass): Its fields are looked at by their types.
    """
    declared = typing.get_type_hints(type(args))  # not the fields' types, which HfArgumentParser changes
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        kinds = set(typing.get_args(declared[name]) or (declared[name],))
        enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
        choices = [each.value for each in enums[0]] if enums else field.metadata.get("choices")
        if value is None:
            continue
        if kinds <= {int, float, NoneType}:
            check_number(name, value, whole=float not in kinds)
        elif choices and (value.value if isinstance(value, Enum) else value) not in choices:
            hint = "; put no in quotes" if value is False and "no" in choices else ""  # YAML's word for false
            raise ValueError(f"{name}: {value!r} is none of {', '.join(choices)}{hint}")
        elif kinds <= {bool, NoneType} and not isinstance(value, bool):
            raise ValueError(f"{name}: {value!r} is neither true nor false")
        elif name in FILES and isinstance(value, str) and not value.lstrip().startswith("{"):
            _check_file(name, value)
    for words, allowed, names in BOUNDS:
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not allowed(value):
                raise ValueError(f"{name}: {value} must be {words}")


def check_number(name: str, value: Any, whole: bool = False) -> None:
    """Refuse what is no finite number, or no whole one."""
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: {value!r} is not a {'whole' if whole else 'finite'} number")


def check_refused(args: TrainingArguments) -> None:
    """Refuse what the Trainer has but distillation cannot honour, and packages and devices that are not here."""
    kwargs, activations = args.liger_kernel_config or {}, getattr(args, "activation_checkpointing_kwargs", None) or {}
    sizes = {f"{kind}_size": getattr(args.parallelism_config, f"{kind}_size", 1) for kind in ("tp", "cp", "sp")}
    refused = (
        ("hub_token", args.hub_token is not None,
         "the Trainer would write it into every checkpoint; use `hf auth login` or HF_TOKEN instead"),
        ("label_names", args.label_names not in (None, ["labels"]), "losses read `labels`; rename the column"),
        ("parallelism_config", max(sizes.values()) > 1, f"{sizes}: no tensor, context or sequence parallel training; use FSDP"),
        ("parallelism_config", not isinstance(args.parallelism_config, ParallelismConfig | None),
         f"{args.parallelism_config!r} is no accelerate.ParallelismConfig; leave it out"),
        ("include_num_input_tokens_seen", args.include_num_input_tokens_seen not in TOKENS_SEEN,
         f"{args.include_num_input_tokens_seen!r} is none of {', '.join(TOKENS_SEEN)}"),
        ("trackio_static_space_id", not isinstance(args.trackio_static_space_id, str | bool | None),
         f"{args.trackio_static_space_id!r} is neither text nor false"),
        ("torch_compile_mode", args.torch_compile_mode not in (None, *COMPILE_MODES),
         f"{args.torch_compile_mode!r} is none of {', '.join(COMPILE_MODES)}"),
        ("torch_compile_backend", args.torch_compile_backend not in (None, "inductor")
         and args.torch_compile_backend not in torch.compiler.list_backends(exclude_tags=()),
         f"{args.torch_compile_backend!r} is none of torch.compiler.list_backends(), such as inductor"),
        ("liger_kernel_config", any(kwargs.get(key) for key in ("cross_entropy", "fused_linear_cross_entropy")),
         "the chunked loss takes the place of liger's cross-entropies; set these to false"),
        ("use_liger_kernel", args.use_liger_kernel and not is_liger_kernel_available(), "pip install liger-kernel first"),
        ("activation_checkpointing_kwargs", activations.get("offload") and args.device.type == "cpu",
         "offload keeps activations in host memory, where a CPU has them already; leave it out"),
        ("attn_implementation", getattr(args, "attn_implementation", None) == "flex_attention" and args.device.type == "cpu",
         "flex_attention has no backward pass on a CPU; use sdpa or eager there"),
        ("fp16", args.fp16 and args.device.type == "cpu", "a CPU has none; use bf16, or leave it out"),
        ("fsdp", args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED, "needs several processes: accelerate launch"),
        ("debug", "tpu_metrics_debug" in args.debug and not is_torch_xla_available(), "tpu_metrics_debug needs torch_xla"),
        ("gradient_accumulation_kwargs", "num_steps" in (args.accelerator_config.gradient_accumulation_kwargs or {}),
         "num_steps: set gradient_accumulation_steps instead"),
    )  # fmt: skip
    for name, is_refused, reason in refused:
        if is_refused:
            raise ValueError(f"{name}: {reason}")
    for name, needed in NEEDS.items():
        if getattr(args, name, None) and not any(getattr(args, other, None) for other in needed):
            raise ValueError(f"{name}: {getattr(args, name)} has no effect without {needed[0]}: true; leave it out")
    if unknown := set(args.include_for_metrics) - {"loss", "inputs"}:
        raise ValueError(f"include_for_metrics: {unknown.pop()!r} is none of loss, inputs")


def check_trackers(names: Iterable[str]) -> None:
    """Refuse experiment trackers that are unknown or not installed."""
    known, installed = integration_utils.INTEGRATION_TO_CALLBACK, get_available_reporting_integrations()
    installed += ["flyte"] if integration_utils.is_flytekit_available() else []
    installed += ["azure_ml"] if integration_utils.is_azureml_available() else []
    for name in names:
        if name not in known:
            raise ValueError(f"report_to: {name!r} is none of none, all, {', '.join(known)}")
        if name not in installed:
            raise ValueError(f"report_to: {name} is not installed; install it, or set report_to: none")


def check_optimizer(args: TrainingArguments) -> None:
    """Make the optimizer for a model of two numbers; refuse arguments of it that it does not read."""
    model, name = torch.nn.ModuleDict({"linear": torch.nn.Linear(1, 1)}), args.optim.value
    low_rank = name.startswith(("galore", "apollo"))  # on layers of the real model
    if args.optim_target_modules is not None and not low_rank:
        raise ValueError(f"optim_target_modules: {args.optim_target_modules} has no effect with {name}; leave it out")
    if low_rank and args.optim_target_modules is None:
        raise ValueError(f"optim_target_modules: {name} needs the names of the layers that it projects, or all-linear")
    pairs = [pair.partition("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair]
    for _, equals, value in pairs:
        if not equals or "=" in value:
            raise ValueError(f"optim_args: {args.optim_args!r} is not of the form key=value,key=value")
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not is_optimizer_factory(kind) and not kwargs.keys() & {"params", "model", "optimizer_dict"}:
            kind(model.parameters(), **kwargs)
    except ImportError as error:
        raise ValueError(f"optim: {name}: {one_line(error)}") from error
    except Exception as error:  # whatever the optimizer's own checks raise
        if low_rank:
            return
        raise ValueError(f"optim: {name}, optim_args: {args.optim_args!r}: {one_line(error)}") from error
    for value in kwargs.values():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"optim_args: {args.optim_args!r} makes {number} of a number of {name}")
    for key, _, value in pairs:
        if not any(_reads(args, model, pairs, key, other) for other in (None, f"{value}1")):
            raise ValueError(f"optim_args: {key} has no effect with {name}; leave it out")


def _reads(args: TrainingArguments, model: torch.nn.Module, pairs: list, key: str, value: str | None) -> bool:
    """Return whether another value of an optimizer's argument, or none, makes a difference."""
    changed, other = {name: value if name == key else old for name, _, old in pairs}, copy.copy(args)
    other.optim_args = ",".join(f"{name}={new}" for name, new in changed.items() if new is not None)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(other, model) != Trainer.get_optimizer_cls_and_kwargs(args, model)
    except ValueError:  # it has tried to read it
        return True


def check_schedule(args: TrainingArguments) -> None:
    """Make the schedule of the learning rate and look at some of its steps; refuse arguments of it that it does not read."""
    name, kwargs, steps = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}, max(args.max_steps, 0) or 1000
    if name in NO_WARMUP and args.warmup_steps:
        raise ValueError(f"warmup_steps: {args.warmup_steps:g} has no effect with {name}; set it to 0, or use another schedule")
    if name in NO_KWARGS and kwargs:
        raise ValueError(f"lr_scheduler_kwargs: {kwargs} has no effect with {name}; leave it out")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    warmup = args.get_warmup_steps(steps)
    try:
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, dict(kwargs))
        factors = [f(step) for f in getattr(schedule, "lr_lambdas", []) for step in (0, warmup, steps // 2, steps - 1)]
        usable = all(math.isfinite(factor) and factor >= 0 for factor in factors)
    except Exception as error:  # a schedule does not look at its arguments before it computes with them
        raise ValueError(f"lr_scheduler_kwargs: {kwargs} do not fit {name}: {one_line(error)}") from error
    if not usable or not all(math.isfinite(value) for value in kwargs.values() if isinstance(value, float)):
        raise ValueError(f"lr_scheduler_kwargs: {kwargs} make a learning rate that is NaN, infinite or negative with {name}")


def check_mapping(name: str, value: Any, example: str) -> None:
    """Refuse what is neither left out nor a table."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name}: {value!r} is not a table {example}")


def _check_file(name: str, value: str) -> None:
    path = Path(value).expanduser()
    if not path.is_file():
        raise ValueError(f"{name}: no file at {value!r}; name a JSON file, or write its content here")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}: {value} is not JSON: {error}") from error
