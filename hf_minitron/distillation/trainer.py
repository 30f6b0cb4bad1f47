"""`DistillationTrainer`: the Hugging Face Trainer with a teacher.

It overrides how the loss is computed, what is logged and what a stop leaves behind; the rest is the Trainer's.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import CONFIG_NAME

from hf_minitron.distillation.batch import collate, predicts, visible, with_labels
from hf_minitron.distillation.cached import META as CACHE
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.checks import check_engine
from hf_minitron.distillation.config import CROSS_ENTROPY, DistillationArguments
from hf_minitron.distillation.documents import check_documents_apart
from hf_minitron.distillation.losses.chunked import chunked_loss
from hf_minitron.distillation.losses.tokens import TOKEN_LOSSES
from hf_minitron.distillation.named import NamedLosses
from hf_minitron.distillation.signals import DenseSignal, SparseSignal, StoredSignal
from hf_minitron.distillation.states import STATE_LOSSES, StateLosses
from hf_minitron.distillation.stopping import last_finite_checkpoint, on_sigterm
from hf_minitron.distillation.teacher import LiveTeacher, base_of, gathered, no_tokens
from hf_minitron.head import head_of, next_token_rows
from hf_minitron.hub.training_card import write_training_card
from hf_minitron.memory import keep_freed_memory
from hf_minitron.plan import Plan
from hf_minitron.probe import last_hidden_states
from hf_minitron.saving import complete_side_files, repair_generation, save_config
from hf_minitron.vocabulary import check_vocabularies

# The projections of the losses on states, in a checkpoint.
PROJECTIONS = "projections.safetensors"


class DistillationTrainer(Trainer):
    """Train a student to say what its teacher says.

    Args:
        model (`PreTrainedModel` or `PeftModel`, *optional*): The student, in float32 for mixed precision; or give `model_init`.
        teacher (`PreTrainedModel`, `PeftModel`, `CachedTeacher`, `str`, `Path` or `None`): A model with the same tokenizer, or
            what it said before (`write_cache`), or where to load either from; `None` when the only loss is cross_entropy.
        args (`DistillationArguments`, *optional*): Settings; plain `TrainingArguments` get the defaults of distillation.
        data_collator (`Callable`, *optional*): Makes a batch with `labels` of rows; `collate` when left out.
        **kwargs: As for `transformers.Trainer`, but for `compute_loss_func`. Datasets have rows of `input_ids`, and optionally
            `labels` (not shifted, -100 where nothing is learnt), `attention_mask` (0 at padding, as there) and
            `position_ids`, where blocks hold documents that do not see each other.

    Example:

    ```python
    >>> args = DistillationArguments("out/example", max_steps=1, report_to="none", disable_tqdm=True)
    >>> trainer = DistillationTrainer(student, teacher, args, train_dataset=blocks)
    >>> result = trainer.train()
    {'train_runtime': ...}
    >>> result.global_step
    1
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher: PreTrainedModel | CachedTeacher | str | Path | None = None,
        args: DistillationArguments | TrainingArguments | None = None,
        data_collator=None,
        **kwargs,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: the loss is made chunk by chunk, and full logits never exist; put a function "
                             "of two tables of log-probabilities into TOKEN_LOSSES, and name it in losses")  # fmt: skip
        args = DistillationArguments.of(args)
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(model=model, args=args, data_collator=data_collator or collate, **kwargs)
        check_engine(self)
        keep_freed_memory()
        student = base_of(self.model)
        if self._use_cache is not None:  # the Trainer switches it off in the saved config; here every call says it is off
            student.config.use_cache = self._use_cache
        repair_generation(student.generation_config)  # what cannot be saved is told now, not at the first checkpoint
        head_of(student)  # refuses what cannot be chunked, before the teacher is loaded
        self.teacher = self._teacher(teacher)
        readers = {"student": student} if self.teacher is None else {"teacher": self.teacher, "student": student}
        least = check_vocabularies(readers, self.processing_class, self.train_dataset)
        self.data_collator = data_collator or partial(collate, ignored=[args.length_column_name], vocab_size=least)
        if "position_ids" in (getattr(self.train_dataset, "column_names", None) or ()):  # documents of their own
            for reader in [student, *([self.teacher.model] if isinstance(self.teacher, LiveTeacher) else [])]:
                check_documents_apart(reader)
        self._logit_weights = {name: weight for name, weight in args.losses.items() if name not in STATE_LOSSES}
        self._watch(self.model)
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.shard(self.accelerator)
        self.loss_is_scaled_for_ga = True  # we divide by the token count of the whole accumulated batch,
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True  # which is counted for every class of models
        self.terminated = self._loss_only = False
        self._named = NamedLosses(self.accelerator, args.average_tokens_across_devices)

    def train(self, *args, **kwargs):
        """Train as the Trainer does; on SIGTERM save a checkpoint at the end of the step, stop, and set `terminated`."""
        with on_sigterm(self._terminate):
            return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the weighted loss of a batch, divided by the tokens of the whole accumulated batch.

        Without `num_items_in_batch` (a direct call) it is divided by the batch's own tokens.
        """
        inputs = with_labels(inputs)
        labels, student = inputs["labels"], base_of(self.accelerator.unwrap_model(model))
        # logits exist where they are asked for only; else the head is applied to no token, through the wrapper all the same,
        # so that DDP and FSDP see the forward pass. The Trainer's debugging cannot look at none
        few = 1 if "underflow_overflow" in self.args.debug else no_tokens(labels)
        kept = {} if return_outputs and not self._loss_only else {"logits_to_keep": few}
        with self._states.tapped() if self._states else nullcontext() as seen, last_hidden_states(student) as hidden:
            signal = None if self.teacher is None else self.teacher(inputs)
            kwargs = {name: value for name, value in inputs.items() if name != "labels"}
            outputs = model(**kwargs, use_cache=False, **kept)
        rows, targets = next_token_rows(hidden.pop(), labels)
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
            loss = loss + outputs.logits[:, :0].sum()
        self._named.add(parts, num_items, len(targets), self.model.training)
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
        self._named.steps += 1
        bad = self._named.not_finite()
        flags = torch.tensor([len(bad), int(self.terminated)], device=loss.device)
        others_bad, terminated = self.accelerator.reduce(flags, "sum").tolist()  # all processes stop at the same step
        if others_bad:
            self._refuse(bad)
        if self._states:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._states.step(self._get_learning_rate(), self.args.max_grad_norm, self.accelerator.num_processes, scale)
        if terminated:
            self.terminated = self.control.should_save = self.control.should_training_stop = True
        return loss

    def _run_epoch(self, *args, **kwargs):
        """Train an epoch; none when the end was reached before: resumed, the Trainer would take one step more."""
        if self.state.global_step == self._initial_global_step:
            self._named.begin_training()  # drop those of an attempt with too large a batch, or an earlier `train`
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def call_model_init(self, trial=None):
        """Make a new student as the Trainer does, and read its states."""
        model = super().call_model_init(trial)
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        if hasattr(self, "_hidden"):  # not while the trainer is made
            self._move_model_to_device(model, self.args.device)
            self._watch(model)
        return model

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict as the Trainer does; logits exist where somebody reads them only."""
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Count the tokens that are learnt from: not those that a mask alone marks as padding."""
        return super()._get_num_items_in_batch([with_labels(batch) for batch in batch_samples], device)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluate as the Trainer does; add the mean over tokens of every named loss."""
        self._named.begin_evaluation()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, mean in self._named.evaluation_means().items():
            output.metrics[f"{metric_key_prefix}_{name}"] = mean
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the mean of every named loss since the last log."""
        if "loss" in logs and self._named.steps:
            logs |= self._named.training_means()
        super().log(logs, *args, **kwargs)

    def create_model_card(self, **kwargs) -> None:
        """Write the card of a model that is pushed from training; `kwargs` as for `Trainer.create_model_card`."""
        if self.teacher is None:
            super().create_model_card(**kwargs)
        elif self.is_world_process_zero():
            card = write_training_card(self, **kwargs)
            card.save(Path(self.args.output_dir) / "README.md")

    def _watch(self, model: PreTrainedModel) -> None:
        """Read a student's states from now on: that of this trainer, or the next that `model_init` makes."""
        self._states = self._state_losses(base_of(model))

    def _teacher(self, teacher: PreTrainedModel | CachedTeacher | str | Path | None) -> LiveTeacher | CachedTeacher | None:
        args, needed = self.args, self.args.losses.keys() - {CROSS_ENTROPY}
        if teacher is None and needed:
            raise ValueError(f"losses: {sorted(needed)[0]} needs a teacher, and none is given; cross_entropy alone does not")
        if not needed:
            return None
        if isinstance(teacher, str | Path) and (Path(teacher) / CACHE).is_file():
            teacher = CachedTeacher(teacher)
        if args.teacher_model_init_kwargs and not isinstance(teacher, str | Path):
            raise ValueError("teacher_model_init_kwargs: the teacher is loaded already; leave them out, or name the teacher")
        if not isinstance(teacher, CachedTeacher):
            return LiveTeacher(teacher, self.accelerator.device, args.teacher_model_init_kwargs, args.top_k)
        teacher.check_losses(args.losses, args.temperature)
        if args.top_k is not None:
            raise ValueError(
                f"top_k: {args.top_k}, but a cache holds what it holds; make it with k: {args.top_k}, or leave top_k out"
            )
        others = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for blocks in (self.train_dataset, *others):
            if isinstance(blocks, Dataset):
                teacher.check_blocks(blocks)
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
            settings = {"reduction": "none", "label_smoothing": self.args.label_smoothing_factor}
            losses[CROSS_ENTROPY] = torch.nn.functional.cross_entropy(logits, targets[rows], **settings)
        return losses

    def _terminate(self) -> None:
        self.terminated = True

    def _refuse(self, bad: Sequence[str]) -> None:
        """Stop at a loss that is no number, naming it and the last checkpoint whose weights are finite."""
        step, what = self.state.global_step + 1, ", ".join(bad) or "on another process"
        good = last_finite_checkpoint(Path(self.args.output_dir)) or "none"
        raise ValueError(f"The loss is not a number at step {step} ({what}). Last good checkpoint: {good}. Use a smaller "
                         "learning_rate, or float32 instead of mixed precision, and start again from there")  # fmt: skip

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if (folder / CONFIG_NAME).is_file():  # not beside an adapter
            save_config(base_of(self.accelerator.unwrap_model(self.model)).config, folder)
        complete_side_files(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._states and self.args.should_save:
            self._states.save(Path(output_dir) / PROJECTIONS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._states and checkpoint is not None:
            self._states.load(Path(checkpoint) / PROJECTIONS)
