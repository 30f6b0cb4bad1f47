"""`DistillationTrainer`: the Hugging Face Trainer with a teacher.

It overrides how the loss is computed and what is logged, nothing else: launching, precision, accumulation, checkpoints and
resuming are the Trainer's.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_minitron.distillation.config import CROSS_ENTROPY, DistillationArguments
from hf_minitron.distillation.losses.chunked import chunked_loss, head_of, next_token_rows
from hf_minitron.distillation.losses.tokens import TOKEN_LOSSES
from hf_minitron.distillation.signals import DenseSignal
from hf_minitron.distillation.teacher import LiveTeacher
from hf_minitron.hub.training_card import write_training_card
from hf_minitron.memory import keep_freed_memory


class DistillationTrainer(Trainer):
    """Train a student to say what its teacher says.

    Args:
        model (`PreTrainedModel`): The student, in float32 for mixed precision.
        teacher (`PreTrainedModel`, `str` or `Path`): A model with the same tokenizer, or where to load it from.
        args (`DistillationArguments`): Settings.
        **kwargs: As for `transformers.Trainer`. `train_dataset` has rows of `input_ids`, and optionally `labels` (not shifted,
            -100 where nothing is learnt).

    Example:

    ```python
    >>> trainer = DistillationTrainer(student, teacher="teacher", args=DistillationArguments("out"), train_dataset=blocks)
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | str | Path,
        args: DistillationArguments,
        data_collator=None,
        **kwargs,
    ):
        super().__init__(model=model, args=args, data_collator=data_collator or collate, **kwargs)
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process (DataParallel): start with `accelerate launch` instead")
        keep_freed_memory()
        head_of(model)  # refuses what cannot be chunked, before the teacher is loaded
        self.teacher = LiveTeacher(teacher, self.accelerator.device, args.teacher_model_init_kwargs)
        _check_vocabularies(self.teacher.config, model.config, self.processing_class)
        self.loss_is_scaled_for_ga = True  # we divide by the token count of the whole accumulated batch
        self._hidden: Tensor | None = None
        self._part_sums: dict[str, Tensor] = {}
        self._num_steps = 0
        model.base_model.register_forward_hook(self._keep_hidden)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the weighted loss of a batch, divided by the tokens of the whole accumulated batch.

        Without `num_items_in_batch` (a direct call) it is divided by the batch's own tokens.
        """
        signal = self.teacher(inputs)
        labels = inputs["labels"]
        # through the wrapper, so that DDP and FSDP see the forward pass, but with the head applied to no token
        kwargs = {name: value for name, value in inputs.items() if name != "labels"}
        none = torch.empty(0, dtype=torch.long, device=labels.device)
        outputs = model(**kwargs, use_cache=False, logits_to_keep=none)
        rows, targets = next_token_rows(self._hidden, labels)
        self._hidden = None
        num_items = len(targets) if num_items_in_batch is None else num_items_in_batch
        student = self.accelerator.unwrap_model(model)
        loss, parts = chunked_loss(
            rows,
            head_of(student),
            partial(self._chunk_loss, signal, targets),
            self.args.losses,
            num_items,
            self.args.chunk_size,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the token count is that of all processes, and DDP averages gradients over them
            loss = loss * self.accelerator.num_processes
            parts = {name: part * self.accelerator.num_processes for name, part in parts.items()}
        if self.model.training:
            for name, part in parts.items():
                self._part_sums[name] = self._part_sums.get(name, 0) + part
            self._num_steps += int(self.accelerator.sync_gradients)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the mean of every named loss since the last log."""
        if "loss" in logs and self._num_steps:
            for name, total in self._part_sums.items():
                logs[name] = self.accelerator.reduce(total, "mean").item() / self._num_steps
            self._part_sums, self._num_steps = {}, 0
        super().log(logs, *args, **kwargs)

    def create_model_card(self, **kwargs) -> None:
        """Write the card of a model that is pushed from training; `kwargs` as for `Trainer.create_model_card`."""
        if self.is_world_process_zero():
            card = write_training_card(self.args, self.state, self.teacher.config, **kwargs)
            card.save(Path(self.args.output_dir) / "README.md")

    def _chunk_loss(self, signal: DenseSignal, targets: Tensor, logits: Tensor, rows: slice) -> dict[str, Tensor]:
        temperature, losses = self.args.temperature, {}
        if names := [name for name in self.args.losses if name != CROSS_ENTROPY]:
            student_logp, teacher_logp = signal.align(logits, rows, temperature)
            losses = {name: TOKEN_LOSSES[name](student_logp, teacher_logp) * temperature**2 for name in names}
        if CROSS_ENTROPY in self.args.losses:
            losses[CROSS_ENTROPY] = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")
        return losses

    def _keep_hidden(self, module, args, output) -> None:
        self._hidden = output.last_hidden_state


def collate(rows: Sequence[dict]) -> dict[str, Tensor]:
    """Batch rows of `input_ids` (and `labels`); pad shorter ones at the end, where nothing is learnt.

    Padding is told by length, never by a token id: many models use their end token for both.
    """
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    labels = [torch.as_tensor(row.get("labels", row["input_ids"])) for row in rows]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    batch = {"input_ids": pad(ids), "labels": pad(labels, padding_value=-100)}
    if len({len(row) for row in ids}) > 1:
        batch["attention_mask"] = pad([torch.ones_like(row) for row in ids])
    return batch


def _check_vocabularies(teacher, student, tokenizer) -> None:
    """Vocabularies may differ by padding only: all tokens of the tokenizer must lie in both."""
    sizes = {"teacher": teacher.vocab_size, "student": student.vocab_size}
    if tokenizer is not None and hasattr(tokenizer, "__len__") and min(sizes.values()) < len(tokenizer):
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but vocabularies are {sizes}: they differ by more than padding. "
            "Use a teacher and a student with the same tokenizer"
        )
