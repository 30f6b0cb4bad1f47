"""What `TrainingArguments` has, and what training with a chunked loss (`ChunkedArguments`) and distillation add.

Names follow TRL where meanings agree. Defaults are the paper's, with their table.
"""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from hf_minitron.checkpoint import best_dtype
from hf_minitron.distillation.losses.tokens import TOKEN_LOSSES

CROSS_ENTROPY = "cross_entropy"


@dataclass
class ChunkedArguments(TrainingArguments):
    """`TrainingArguments` for a language model whose logits exist for some tokens at a time.

    Defaults that differ from the parent's: a learning rate that falls to a tenth by a cosine (2408.11796, table 4), bf16 where
    the processor has it.
    """

    chunk_size: int = field(default=256, metadata={"help": "Tokens whose logits exist at the same time."})
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; by default where the processor has bf16."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Schedule (2408.11796, table 4)."})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1}, metadata={"help": "Arguments of the schedule: fall to a tenth."}
    )

    def __post_init__(self):
        # the Trainer wants to be told that it runs on a CPU, and knows no "where the processor has it"
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            device = "cpu" if self.use_cpu else torch.accelerator.current_accelerator()
            self.bf16 = not self.fp16 and best_dtype(device) == torch.bfloat16
        super().__post_init__()
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size: {self.chunk_size} must be at least 1")


@dataclass
class DistillationArguments(ChunkedArguments):
    """`TrainingArguments` with the settings of distillation.

    Defaults that differ from the parent's: learning rate 1e-4 falling to a tenth by a cosine (2408.11796, table 4), bf16 where
    the processor has it.

    Example:

    ```python
    >>> args = DistillationArguments("out", max_steps=100, losses={"forward_kl": 1.0, "cross_entropy": 0.1})
    ```
    """

    losses: dict | str | None = field(
        default_factory=lambda: {"forward_kl": 1.0},
        metadata={"help": "Weight of every loss: forward_kl (alone by default: 2407.14679, table 15), cross_entropy."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Divides both models' logits; the loss is multiplied by its square. 1 was best (2407.14679, A.5)."},
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Passed to from_pretrained when the teacher is given by name."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate (2408.11796, table 4)."})

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "losses", "teacher_model_init_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        known = [*TOKEN_LOSSES, CROSS_ENTROPY]
        numbers = isinstance(self.losses, dict) and all(isinstance(weight, int | float) for weight in self.losses.values())
        if not numbers:
            raise ValueError(f"losses: {self.losses!r} is not a table of weights, such as {{forward_kl: 1.0}}")
        unknown = [name for name in self.losses if name not in known]
        if unknown:
            raise ValueError(f"losses: {unknown[0]!r} is not a loss; there are {', '.join(known)}")
        if not self.losses or min(self.losses.values()) < 0 or max(self.losses.values()) == 0:
            raise ValueError(f"losses: {self.losses} must have at least one positive weight and none below zero")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} must be above zero")
