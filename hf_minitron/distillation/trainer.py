"""`DistillationTrainer`: the Hugging Face Trainer with a teacher.

It overrides how the loss is computed, what is logged and what a stop leaves behind, nothing else: launching, precision,
accumulation, checkpoints and resuming are the Trainer's.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_minitron.checkpoint import Checkpoint, check_finite
from hf_minitron.distillation.batch import collate, predicts, visible
from hf_minitron.distillation.cached import META as CACHE
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.config import CROSS_ENTROPY, DistillationArguments
from hf_minitron.distillation.documents import check_documents_apart
from hf_minitron.distillation.losses.chunked import chunked_loss, head_of, next_token_rows
from hf_minitron.distillation.losses.tokens import TOKEN_LOSSES
from hf_minitron.distillation.signals import DenseSignal, SparseSignal, StoredSignal
from hf_minitron.distillation.states import STATE_LOSSES, StateLosses
from hf_minitron.distillation.teacher import LastHidden, LiveTeacher, base_of, gathered, no_tokens
from hf_minitron.hub.training_card import write_training_card
from hf_minitron.memory import keep_freed_memory
from hf_minitron.plan import Plan
from hf_minitron.vocabulary import check_ids

# The projections of the losses on states, in a checkpoint.
PROJECTIONS = "projections.safetensors"


class DistillationTrainer(Trainer):
    """Train a student to say what its teacher says.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The student, in float32 for mixed precision.
        teacher (`PreTrainedModel`, `PeftModel`, `CachedTeacher`, `str`, `Path` or `None`): A model with the same tokenizer, or
            what it said before (`write_cache`), or where to load either from; `None` when the only loss is cross_entropy.
        args (`DistillationArguments`): Settings.
        **kwargs: As for `transformers.Trainer`. `train_dataset` has rows of `input_ids`, and optionally `labels` (not shifted,
            -100 where nothing is learnt) and `position_ids`, where blocks hold documents that do not see each other.

    Example:

    ```python
    >>> trainer = DistillationTrainer(student, teacher="teacher", args=DistillationArguments("out"), train_dataset=blocks)
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | CachedTeacher | str | Path | None,
        args: DistillationArguments,
        data_collator=None,
        **kwargs,
    ):
        super().__init__(model=model, args=args, data_collator=data_collator or collate, **kwargs)
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process (DataParallel): start with `accelerate launch` instead")
        keep_freed_memory()
        student = base_of(model)
        head_of(student)  # refuses what cannot be chunked, before the teacher is loaded
        self.teacher = self._teacher(teacher)
        if self.teacher is not None:
            _check_vocabularies(self.teacher.config, student.config, self.processing_class, self.train_dataset)
        if "position_ids" in (getattr(self.train_dataset, "column_names", None) or ()):  # documents of their own
            for reader in [student, *([self.teacher.model] if isinstance(self.teacher, LiveTeacher) else [])]:
                check_documents_apart(reader)
        self._logit_weights = {name: weight for name, weight in args.losses.items() if name not in STATE_LOSSES}
        self._states = self._state_losses(student)
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.shard(self.accelerator)
        self.loss_is_scaled_for_ga = True  # we divide by the token count of the whole accumulated batch
        self._hidden = LastHidden(student)
        self.terminated = False
        self._part_sums: dict[str, Tensor] = {}
        self._num_steps = 0
        self._eval_sums: dict[str, Tensor] = {}

    def train(self, *args, **kwargs):
        """Train as the Trainer does; on SIGTERM save a checkpoint at the end of the step, stop, and set `terminated`."""
        with _on_sigterm(self._terminate):
            return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the weighted loss of a batch, divided by the tokens of the whole accumulated batch.

        Without `num_items_in_batch` (a direct call) it is divided by the batch's own tokens.
        """
        labels, student = inputs["labels"], base_of(self.accelerator.unwrap_model(model))
        with self._states.tapped() if self._states else nullcontext() as seen:
            signal = None if self.teacher is None else self.teacher(inputs)
            # through the wrapper, so that DDP and FSDP see the forward pass, but with the head applied to no token
            kwargs = {name: value for name, value in inputs.items() if name != "labels"}
            outputs = model(**kwargs, use_cache=False, logits_to_keep=no_tokens(labels))
        rows, targets = next_token_rows(self._hidden.take(), labels)
        num_items = len(targets) if num_items_in_batch is None else num_items_in_batch
        with gathered(student) as sharded, gathered(getattr(self.teacher, "model", None)) as teacher_sharded:
            if teacher_sharded:
                signal = replace(signal, head=head_of(self.teacher.model))  # its weights of before were a shard
            chunk_loss = partial(self._chunk_loss, signal, targets)
            loss, parts = chunked_loss(rows, head_of(student), chunk_loss, self._logit_weights, num_items, self.args.chunk_size)
        if self._states:
            states = self._states(*seen, predicts(labels), num_items, visible(inputs))
            loss = loss + self._balanced(loss.detach(), sum(self.args.losses[name] * part for name, part in states.items()))
            parts |= {name: part.detach() for name, part in states.items()}
        if sharded:  # nothing is added, but the backward pass goes through the head's module, which gathers its weights
            loss = loss + outputs.logits.sum()
        self._keep_parts(parts, num_items, len(targets))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the token count is that of all, and DDP averages gradients
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self):
        """Mixed precision for all of the loss: accelerate's own ends with the student's forward pass, before the head."""
        return self.accelerator.autocast()

    def training_step(self, *args, **kwargs):
        """Take a step as the Trainer does; train the projections, stop at a loss that is no number, and heed SIGTERM."""
        loss = super().training_step(*args, **kwargs)
        if not self.accelerator.sync_gradients:
            return loss
        self._num_steps += 1
        bad = [name for name, total in self._part_sums.items() if not total.isfinite()]
        flags = torch.tensor([len(bad), int(self.terminated)], device=loss.device)
        others_bad, terminated = self.accelerator.reduce(flags, "sum").tolist()  # all processes stop at the same step
        if others_bad:
            self._refuse(bad)
        if self._states:
            self._states.step(self._get_learning_rate(), self.args.max_grad_norm, self.accelerator.num_processes)
        if terminated:
            self.terminated = self.control.should_save = self.control.should_training_stop = True
        return loss

    def _run_epoch(self, *args, **kwargs):
        """Train an epoch; none when resuming from the last checkpoint: the Trainer would take one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluate as the Trainer does; add the mean over tokens of every named loss."""
        self._eval_sums = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, sums in self._eval_sums.items():
            total, count = self.accelerator.reduce(sums, "sum").tolist()
            output.metrics[f"{metric_key_prefix}_{name}"] = total / count
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the mean of every named loss since the last log."""
        if "loss" in logs and self._num_steps:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            for name, total in self._part_sums.items():
                logs[name] = processes * self.accelerator.reduce(total, "mean").item() / self._num_steps
            self._part_sums, self._num_steps = {}, 0
        super().log(logs, *args, **kwargs)

    def create_model_card(self, **kwargs) -> None:
        """Write the card of a model that is pushed from training; `kwargs` as for `Trainer.create_model_card`."""
        if self.teacher is None:
            super().create_model_card(**kwargs)
        elif self.is_world_process_zero():
            card = write_training_card(self.args, self.state, self.teacher.config, **kwargs)
            card.save(Path(self.args.output_dir) / "README.md")

    def _teacher(self, teacher: PreTrainedModel | CachedTeacher | str | Path | None) -> LiveTeacher | CachedTeacher | None:
        args, needed = self.args, self.args.losses.keys() - {CROSS_ENTROPY}
        if teacher is None and needed:
            raise ValueError(f"losses: {sorted(needed)[0]} needs a teacher, and none is given; cross_entropy alone does not")
        if not needed:
            return None
        if isinstance(teacher, str | Path) and (Path(teacher) / CACHE).is_file():
            teacher = CachedTeacher(teacher)
        if not isinstance(teacher, CachedTeacher):
            return LiveTeacher(teacher, self.accelerator.device, args.teacher_model_init_kwargs, args.top_k)
        teacher.check_losses(args.losses, args.temperature)
        if args.top_k is not None:
            raise ValueError(
                f"top_k: {args.top_k}, but a cache holds what it holds; make it with k: {args.top_k}, or leave top_k out"
            )
        if isinstance(self.train_dataset, Dataset):
            teacher.check_blocks(self.train_dataset)
        return teacher

    def _state_losses(self, student: PreTrainedModel) -> StateLosses | None:
        args, names = self.args, [name for name in self.args.losses if name in STATE_LOSSES]
        if not names:
            return None
        plan = Path(student.name_or_path) / "plan.json"
        kept = Plan.load(plan).kept_layers if args.layer_pairs == "plan" and plan.is_file() else None
        return StateLosses(
            student, self.teacher.model, names, args.layer_pairs, kept, args.state_distance, args.chunk_size, args.seed
        )

    def _balanced(self, logits: Tensor, states: Tensor) -> Tensor:
        """Scale the sum of the losses on states to that of the others (2407.14679, section 3), the same on all processes."""
        if self.args.balance == "static":
            return states
        ours, theirs = self.accelerator.reduce(torch.stack([logits, states.detach()]), "sum")
        return states * (ours / theirs.clamp(min=torch.finfo(theirs.dtype).tiny))

    def _chunk_loss(
        self, signal: DenseSignal | SparseSignal | StoredSignal | None, targets: Tensor, logits: Tensor, rows: slice
    ) -> dict[str, Tensor]:
        temperature, losses = self.args.temperature, {}
        if names := [name for name in self._logit_weights if name != CROSS_ENTROPY]:
            student_logp, teacher_logp = signal.align(logits, rows, temperature)
            formulas = TOKEN_LOSSES | {"jsd": partial(TOKEN_LOSSES["jsd"], beta=self.args.beta)}
            losses = {name: formulas[name](student_logp, teacher_logp) * temperature**2 for name in names}
        if CROSS_ENTROPY in self._logit_weights:
            losses[CROSS_ENTROPY] = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")
        return losses

    def _keep_parts(self, parts: dict[str, Tensor], num_items: Tensor | int, count: int) -> None:
        """Add the named losses of a batch to what is logged."""
        for name, part in parts.items():
            if self.model.training:
                self._part_sums[name] = self._part_sums.get(name, 0) + part
            else:
                self._eval_sums[name] = self._eval_sums.get(name, 0) + torch.stack([part * num_items, part.new_tensor(count)])

    def _terminate(self) -> None:
        self.terminated = True

    def _refuse(self, bad: Sequence[str]) -> None:
        """Stop at a loss that is no number, naming it and the last checkpoint whose weights are finite."""
        step, what = self.state.global_step + 1, ", ".join(bad) or "on another process"
        checkpoints = sorted(Path(self.args.output_dir).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
        good = next((str(path) for path in checkpoints if _is_finite(path)), "none")
        raise ValueError(f"The loss is not a number at step {step} ({what}). Last good checkpoint: {good}. Use a smaller "
                         "learning_rate, or float32 instead of mixed precision, and start again from there")  # fmt: skip

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._states and self.args.should_save:
            self._states.save(Path(output_dir) / PROJECTIONS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._states and checkpoint is not None:
            self._states.load(Path(checkpoint) / PROJECTIONS)


@contextmanager
def _on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Act on SIGTERM until the context ends; elsewhere than in the main thread it cannot be heeded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_finite(checkpoint: Path) -> bool:
    """Return whether a checkpoint is complete and its weights are numbers."""
    try:
        stored = Checkpoint(checkpoint)
        for name in stored.specs:
            check_finite(name, stored.read(name))
    except ValueError:
        return False
    return (checkpoint / "trainer_state.json").is_file()


def _check_vocabularies(teacher, student, tokenizer, blocks: Dataset | IterableDataset | None) -> None:
    """Vocabularies may differ by padding, and by added tokens that the text does not use."""
    sizes = {"teacher": teacher.vocab_size, "student": student.vocab_size}
    least = min(sizes.values())
    if not hasattr(tokenizer, "get_vocab") or len(tokenizer) <= least:
        return
    added = tokenizer.get_added_vocab()
    beyond = sorted(token for token, index in tokenizer.get_vocab().items() if index >= least and token not in added)
    if beyond:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but vocabularies are {sizes}: they differ by more than padding "
            f"({beyond[0]!r} is beyond). Use a teacher and a student with the same tokenizer"
        )
    if isinstance(blocks, Dataset):
        check_ids(blocks, least, tokenizer)
