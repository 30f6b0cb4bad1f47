"""`DistillationArguments`: what `TrainingArguments` has, and what distillation adds.

Names follow TRL where meanings agree. Defaults are the paper's, with their table.
"""

import copy
from dataclasses import dataclass, field, fields

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_minitron.checkpoint.checkpoint import best_dtype
from hf_minitron.checkpoint.model_files import split_kwargs, with_hidden_token
from hf_minitron.distillation.checks import (
    check_mapping,
    check_number,
    check_optimizer,
    check_refused,
    check_schedule,
    check_trackers,
    check_values,
)
from hf_minitron.distillation.float32 import float32_as_it_is
from hf_minitron.distillation.losses.liger import check_liger
from hf_minitron.distillation.losses.states import DISTANCES
from hf_minitron.distillation.losses.tokens import CROSS_ENTROPY, TOKEN_LOSSES, OwnLoss, by_name
from hf_minitron.distillation.states import LAYER_RULES, STATE_LOSSES
from hf_minitron.errors import one_line

BALANCES = ("static", "minitron")
# Settings of on-policy distillation and what they are by default; TRL's number of tokens.
ON_POLICY = {"max_new_tokens": 128, "sampling_temperature": 1.0}
# How activations are made again in the backward pass; the second is the name before transformers 5.23.
CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
# Schedules that want to be told how far they fall.
MIN_LR_SCHEDULES = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")


@dataclass
class DistillationArguments(TrainingArguments):
    """`TrainingArguments` with the settings of distillation.

    Defaults that differ from the parent's: learning rate 1e-4 falling to a tenth by a cosine (2408.11796, table 4), bf16 where
    the processor has it. `lmbda`, `max_new_tokens`, `beta` and `teacher_model_init_kwargs` mean what they mean in TRL's
    `GKDConfig`; its `temperature`, that of sampling, is `sampling_temperature`, for here `temperature` is that of the loss, and
    for its `seq_kd` the teacher writes the text before (`synthesize`).

    Example:

    ```python
    >>> args = DistillationArguments("out", max_steps=100, losses={"forward_kl": 1.0, "cross_entropy": 0.1})
    ```
    """

    losses: dict | str | None = field(
        default_factory=lambda: {"forward_kl": 1.0},
        metadata={
            "help": f"Weight of every loss: {', '.join(TOKEN_LOSSES)}, {CROSS_ENTROPY}; on states {', '.join(STATE_LOSSES)}; "
            "in Python also a function of two tables of log-probabilities, student and teacher, one number per row. "
            "forward_kl alone by default (2407.14679, table 15); where many layers go, block and embedding too (section 4.1)."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Divides both models' logits; the loss is multiplied by its square (2407.14679, A.5: 1 is best)."},
    )
    beta: float = field(default=0.5, metadata={"help": "The teacher's share of jsd's mixture; at 0 forward, at 1 reverse KL."})
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "Compare the teacher's k most likely tokens, the rest summed into one entry (hurts: 2407.14679, A.5)."
        },
    )
    lmbda: float = field(
        default=0.0,
        metadata={
            "help": "On-policy distillation: the share of steps in which the student samples the completions that it learns "
            "from (2306.13649, TRL). Prompts are those of chats; of other text all but the last max_new_tokens tokens."
        },
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Tokens that the student samples for a prompt, at most (lmbda); 128 when left out."}
    )
    sampling_temperature: float | None = field(
        default=None,
        metadata={"help": "Divides the student's logits where it samples (lmbda), TRL's temperature; 1 when left out."},
    )
    layer_pairs: dict | str | None = field(
        default="last-2",
        metadata={"help": f"Layers compared: {', '.join(LAYER_RULES)}, or {{teacher: student}} (2407.14679, table 17)."},
    )
    state_distance: str = field(default="cosine", metadata={"help": f"Between states: {', '.join(DISTANCES)}."})
    balance: str = field(
        default="minitron",
        metadata={
            "help": "minitron: state losses are scaled to the sum of the others at every step (2407.14679, section 3); static."
        },
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "Tokens whose logits exist at the same time; 128 on a CPU, 1024 elsewhere."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Passed to from_pretrained when the teacher is given by name: revision, dtype, ..."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "How student and live teacher compute attention: sdpa, eager, flex_attention, flash_attention_2; as they "
            "were loaded when left out. With cross_documents: false sdpa and eager make a dense mask, the others none."
        },
    )
    use_liger_loss: bool = field(
        default=False,
        metadata={
            "help": "Compute the loss on the output by Liger's fused linear JSD (pip install liger-kernel): one of forward_kl, "
            "reverse_kl and jsd, with or without cross_entropy, of a live teacher."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Average weights over steps (EMA), evaluated and saved in their place: what it keeps of itself at a "
            "step, such as 0.999."
        },
    )
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; by default where the processor has bf16."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: training stops at a NaN or infinite loss, and this waits for every micro-batch."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate (2408.11796, table 4)."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine_with_min_lr", metadata={"help": "Schedule (2408.11796, table 4)."}
    )
    lr_scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the schedule; the default one falls to a tenth: {min_lr_rate: 0.1}."}
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "losses", "layer_pairs", "teacher_model_init_kwargs"]

    def __post_init__(self):
        # the Trainer wants to be told that it runs on a CPU, and knows no "where the processor has it"
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            device = "cpu" if self.use_cpu else torch.accelerator.current_accelerator()
            self.bf16 = not self.fp16 and best_dtype(device) == torch.bfloat16
        if self.chunk_size is None:  # on a GPU small matrices are slow, and so is adding to the head's gradient often
            self.chunk_size = 128 if self.use_cpu else 1024
        check_values(self)
        self.losses = by_name(self.losses) if isinstance(self.losses, dict) else self.losses
        own = [name for name in self.losses or () if isinstance(name, OwnLoss)]
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and metric in (*TOKEN_LOSSES, CROSS_ENTROPY, *STATE_LOSSES, *own):
            self.greater_is_better = False
        try:
            with float32_as_it_is() as chosen:
                super().__post_init__()
            self.float32_precision = chosen[0]  # in which training multiplies, and nothing else
        except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            if self.deepspeed:
                unset_hf_deepspeed_config()  # half made, it would be asked by every model that this process makes
            raise ValueError(f"training arguments: {one_line(error)}") from error
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type in MIN_LR_SCHEDULES:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        for name in ("lr_scheduler_kwargs", *CHECKPOINTING, "liger_kernel_config"):
            check_mapping(name, getattr(self, name, None), "such as {key: value}")
        check_refused(self)
        check_trackers(self.report_to)
        check_optimizer(self)
        check_schedule(self)
        self.teacher_model_init_kwargs = with_hidden_token(self.teacher_model_init_kwargs)
        kwargs = split_kwargs(self.teacher_model_init_kwargs)[1]
        if self.attn_implementation is not None and "attn_implementation" in kwargs:
            raise ValueError("attn_implementation: teacher_model_init_kwargs has one too; leave one of them out")
        self._check_losses()
        self._check_on_policy()
        check_liger(self)
        self._check_states()

    @classmethod
    def of(cls, args: TrainingArguments | None) -> "DistillationArguments":
        """Return the settings that a Trainer was given: as they are, or with the defaults of what distillation adds.

        Args:
            args (`TrainingArguments`, *optional*): `DistillationArguments`, plain `TrainingArguments`, or none: all defaults.
        """
        if args is None:
            return cls("tmp_trainer")
        if isinstance(args, cls):
            return args
        if not isinstance(args, TrainingArguments):
            raise ValueError(f"args: {type(args).__name__} is neither DistillationArguments nor TrainingArguments")
        given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
        if more := given.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"args: {type(args).__name__} has {sorted(more)[0]}, which has no effect here; "
                             "give DistillationArguments")  # fmt: skip
        return cls(**given)

    def _check_losses(self) -> None:
        """Refuse unknown losses, weights that are not numbers from zero on, and settings that no chosen loss reads."""
        known = [*TOKEN_LOSSES, CROSS_ENTROPY, *STATE_LOSSES]
        check_mapping("losses", self.losses, "of weights, such as {forward_kl: 1.0}")
        for name, weight in (self.losses or {}).items():
            if name not in known and not isinstance(name, OwnLoss):
                raise ValueError(f"losses: {name!r} is not a loss; there are {', '.join(known)}; in Python, pass your function")
            if isinstance(name, OwnLoss) and name in known:
                raise ValueError(f"losses: a function named {name}, which is a loss on states; rename it")
            check_number(f"losses: the weight of {name}", weight)
        if not self.losses or min(self.losses.values()) < 0 or max(self.losses.values()) == 0:
            raise ValueError(f"losses: {self.losses} must have at least one positive weight and none below zero")
        if self.label_smoothing_factor and CROSS_ENTROPY not in self.losses:
            raise ValueError(f"label_smoothing_factor: {self.label_smoothing_factor} smooths labels, which only "
                             f"{CROSS_ENTROPY} reads; give that a weight in losses, or leave it out")  # fmt: skip

    def _check_on_policy(self) -> None:
        """Set what on-policy distillation needs; refuse it where nothing is sampled, and a loss on labels, which it has not."""
        for name, default in ON_POLICY.items():
            value = getattr(self, name)
            if value is not None and not self.lmbda:
                raise ValueError(f"{name}: {value} has no effect without lmbda, the share of steps in which the student "
                                 "writes; set that above 0, or leave it out")  # fmt: skip
            if value is None and self.lmbda:
                setattr(self, name, default)
        if self.lmbda and CROSS_ENTROPY in self.losses:
            raise ValueError(f"lmbda: {self.lmbda}, but {CROSS_ENTROPY} would learn what the student writes as if it was "
                             "right; leave it out of losses, or set lmbda to 0")  # fmt: skip

    def to_dict(self) -> dict:
        """Return the settings as `TrainingArguments` does, the teacher's token hidden too."""
        values = super().to_dict()
        return values | {"teacher_model_init_kwargs": copy.deepcopy(values["teacher_model_init_kwargs"])}

    def _check_states(self) -> None:
        """Refuse settings of the losses on states that no model could have."""
        states = [name for name in self.losses if name in STATE_LOSSES]
        if isinstance(self.layer_pairs, str) and self.layer_pairs not in LAYER_RULES:
            raise ValueError(
                f"layer_pairs: {self.layer_pairs!r} is none of {', '.join(LAYER_RULES)}, nor a table such as {{29: 13}}"
            )
        if not isinstance(self.layer_pairs, str):
            _check_pairs(self.layer_pairs)
        if self.state_distance not in DISTANCES:
            raise ValueError(f"state_distance: {self.state_distance!r} is none of {', '.join(DISTANCES)}")
        if self.balance not in BALANCES:
            raise ValueError(f"balance: {self.balance!r} is none of {', '.join(BALANCES)}")
        if states and self.balance == "minitron" and len(states) == len(self.losses):
            raise ValueError(f"losses: {', '.join(states)} are all on states, and balance: minitron scales them to the others; "
                             "add forward_kl, or set balance: static")  # fmt: skip
        for name in CHECKPOINTING if states else ():
            if (getattr(self, name, None) or {}).get("use_reentrant"):
                raise ValueError(f"{name}: use_reentrant: true hides states from losses; leave it out")


def _check_pairs(pairs: object) -> None:
    """Refuse what is no table from a teacher's layer to a student's; keys that came through JSON are text."""
    whole = isinstance(pairs, dict) and all(str(t).isdecimal() and str(s).isdecimal() for t, s in pairs.items())
    if not pairs or not whole:
        raise ValueError(f"layer_pairs: {pairs!r} is no table of the teacher's layers and the student's, such as {{29: 13}}")
