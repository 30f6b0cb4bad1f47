"""`DistillationTrainer`: the Hugging Face Trainer with a teacher.

It overrides how the loss is computed, what is logged and what a checkpoint holds, by the Trainer's public methods.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, get_last_checkpoint
from transformers.utils import CONFIG_NAME

from hf_minitron.checkpoint.saving import complete_side_files, repair_generation, save_config
from hf_minitron.distillation.averaging import WeightAverage
from hf_minitron.distillation.batch import POSITIONS, TARGETS, at_positions, collate, model_inputs, positions_of, with_targets
from hf_minitron.distillation.cached import CachedCollator, CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.engine import prepare_engine, shard_models, train_in_float32
from hf_minitron.distillation.float32 import float32_as_it_is
from hf_minitron.distillation.losses.liger import check_liger_models
from hf_minitron.distillation.losses.output import OutputLosses
from hf_minitron.distillation.on_policy import OnPolicy
from hf_minitron.distillation.reduction import NamedMeans, balanced, per_token, token_counts
from hf_minitron.distillation.states import state_losses_of
from hf_minitron.distillation.stopping import Attempt, not_finite
from hf_minitron.distillation.teacher import base_of, freeze_vision, no_tokens, unsharded_head
from hf_minitron.distillation.teachers import Given, check_models, set_attention, teacher_for
from hf_minitron.distillation.training_card import write_training_card
from hf_minitron.head import head_of
from hf_minitron.probe import last_hidden_states

# The projections of the losses on states, in a checkpoint.
PROJECTIONS = "projections.safetensors"


class DistillationTrainer(Trainer):
    """Train a student to match its teacher.

    Args:
        model (`PreTrainedModel` or `PeftModel`, *optional*): The student, in float32 for mixed precision; or give `model_init`.
        teacher_model (`PreTrainedModel`, `PeftModel`, `CachedTeacher`, `str`, `Path` or `None`): A model with the same
            tokenizer, or its precomputed outputs (`write_cache`), or where to load either from; `None` when the only loss is
            cross_entropy.
        args (`DistillationArguments`, *optional*): Settings; plain `TrainingArguments` get the defaults of distillation.
        data_collator (`Callable`, *optional*): Makes a batch with `labels` of rows; `collate` when left out.
        train_dataset (`Dataset` or `IterableDataset`, *optional*): Rows of `input_ids`, and optionally `labels` (not shifted,
            -100 where nothing is learnt), `attention_mask` (0 at padding) and `position_ids`, which start again at every
            document of a packed sequence (document-masked attention).
        eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*): The same, or several by name.
        compute_loss_func (`Callable`, *optional*): Refused: a loss of one's own is a key of `args.losses`.

    The other arguments are those of `transformers.Trainer`.

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

    _resumed_from: str | None = None

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher_model: Given = None,
        args: DistillationArguments | TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        if compute_loss_func is not None:
            raise ValueError("compute_loss_func: the loss is made chunk by chunk, and full logits never exist; pass a function "
                             "of two tables of log-probabilities: DistillationArguments(losses={my_loss: 1.0})")  # fmt: skip
        args = DistillationArguments.of(args)
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        prepare_engine(self)
        self._prepare_models(teacher_model)
        self._losses = OutputLosses.of(args)
        self.loss_is_scaled_for_ga = True  # we divide by the token count of the whole accumulated batch,
        self.model_accepts_loss_kwargs = True  # which is counted for every class of models
        self._loss_only = False
        self._trained, self._evaluated = NamedMeans(self.accelerator), NamedMeans(self.accelerator)
        self._attempt = Attempt(self._begin)
        self._average, self._batches = WeightAverage(args.ema_decay), OnPolicy(self)
        for callback in (self._attempt, self._average):
            self.add_callback(callback)

    def _prepare_models(self, teacher_model: Given) -> None:
        """Load the teacher and refuse what the two models, the losses and the text do not allow together."""
        student = base_of(self.model)
        if self._use_cache is not None:  # the Trainer switches it off in the saved config; here every call says it is off
            student.config.use_cache = self._use_cache
        repair_generation(student.generation_config)  # what cannot be saved is told now, not at the first checkpoint
        head_of(student)  # refuses what cannot be chunked, before the teacher is loaded
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        data, theirs = [self.train_dataset, *evaluated], (student.config, self.processing_class)
        self.teacher = teacher_for(self.args, teacher_model, self.accelerator.device, data, *theirs)
        least = check_models(student, self.teacher, self.processing_class, self.train_dataset)
        if self.data_collator is collate:
            self.data_collator = partial(collate, ignored=[self.args.length_column_name], vocab_size=least)
        self._watch(self.model)
        check_liger_models(self.args, student, getattr(self.teacher, "model", None))
        shard_models(self.accelerator, student, self.teacher)
        if isinstance(self.teacher, CachedTeacher):
            self.data_collator = CachedCollator(self.data_collator, self.teacher)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial=None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the Trainer does; the projections of losses on states go on from a checkpoint, too."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        self._resumed_from = resume_from_checkpoint or None
        with float32_as_it_is(self.args.float32_precision):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _begin(self) -> None:
        self._trained.begin()  # drop what too large a batch, or an earlier `train`, has added
        if self._states and self._resumed_from:
            self._states.load(Path(self._resumed_from) / PROJECTIONS)
        self._average.begin(self.model, Path(self._resumed_from) if self._resumed_from else None)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Fetch the batches of a step with their targets, which the Trainer counts; none where training was done before."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self._attempt.was_done = self.control.should_training_stop = True  # resumed, the Trainer would take one step more
            return [], None
        batches, count = super().get_batch_samples(map(with_targets, self._batches(epoch_iterator)), num_batches, device)
        return [{**batch, POSITIONS: positions_of(batch)} for batch in batches], count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the weighted loss of a batch, divided by the tokens of the whole accumulated batch.

        Without `num_items_in_batch` (a direct call) it is divided by the batch's own tokens.
        """
        inputs = with_targets(inputs)
        inputs[POSITIONS] = positions = positions_of(inputs)
        targets, student = inputs[TARGETS], base_of(self.accelerator.unwrap_model(model))
        # logits exist where they are asked for only; else the head is applied to no token, through the wrapper all the same,
        # so that DDP and FSDP see the forward pass. The Trainer's debugging cannot look at none
        few = 1 if "underflow_overflow" in self.args.debug else no_tokens(targets)
        kept = {} if return_outputs and not self._loss_only else {"logits_to_keep": few}
        with self._states.tapped() if self._states else nullcontext() as seen, last_hidden_states(student) as last:
            signal = None if self.teacher is None else self.teacher(inputs)
            outputs = model(**model_inputs(inputs), use_cache=False, **kept)
        hidden, targets = at_positions(last.pop(), positions), at_positions(targets, positions)
        with unsharded_head(student) as sharded, unsharded_head(getattr(self.teacher, "model", None)) as teacher_sharded:
            if teacher_sharded:
                signal = replace(signal, head=head_of(self.teacher.model))  # its weights of before were a shard
            total, sums = self._losses(hidden, head_of(student), signal, targets)
        if self._states:
            states = self._states(*seen, inputs)
            added = sum(self.args.losses[name] * part for name, part in states.items())
            total = total + (added if self.args.balance == "static" else balanced(added, total, self.accelerator))
            sums |= {name: part.detach() for name, part in states.items()}
        if sharded:  # nothing is added, but the backward pass goes through the head's module, which gathers its weights
            total = total + outputs.logits[:, :0].sum()
        # DDP averages the gradients of the processes, of whose tokens together the count is
        of_all = num_items_in_batch is not None and self.args.average_tokens_across_devices
        count = (num_items_in_batch if num_items_in_batch is not None else len(targets),
                 self.accelerator.num_processes if of_all else 1)  # fmt: skip
        if self.model.training:
            self._trained.add({name: per_token(part, *count) for name, part in sums.items()})
        else:
            self._evaluated.add(sums, len(targets))
        loss = per_token(total, *count)
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self):
        """Mixed precision for all of the loss: accelerate's own ends with the student's forward pass, before the head."""
        return self.accelerator.autocast()

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Take a step as the Trainer does; train the projections, and stop at a NaN or infinite loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return loss
        self._trained.count += 1
        if self.accelerator.reduce((~self._trained.finite()).long(), "sum"):  # all processes stop at the same step
            raise not_finite(self.state.global_step + 1, self._trained.not_finite(), Path(self.args.output_dir))
        if self._states:
            scaler, rate = self.accelerator.scaler, self.optimizer.param_groups[0]["lr"]
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._states.step(rate, self.args.max_grad_norm, self.accelerator.num_processes, scale)
        return loss

    def call_model_init(self, trial=None) -> PreTrainedModel:
        """Make a new student as the Trainer does, and read its states."""
        model = super().call_model_init(trial)
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        repair_generation(base_of(model).generation_config)
        if hasattr(self, "_states"):  # not while the trainer is made
            self._watch(model.to(self.args.device))
        return model

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict as the Trainer does; logits exist where somebody reads them only."""
        self._loss_only = prediction_loss_only
        labelled = inputs.get("labels") is not None
        try:
            return super().prediction_step(
                model, with_targets(inputs) if labelled else inputs, prediction_loss_only, ignore_keys
            )
        finally:
            self._loss_only = False

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as the Trainer does; add the mean over tokens of every named loss."""
        self._evaluated.begin()
        with self._average.applied():
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        for name, mean in self._evaluated.take().items():
            output.metrics[f"{metric_key_prefix}_{name}"] = mean
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every named loss since the last log, and the tokens read."""
        if "loss" in logs and self._trained.count:
            counts = token_counts(self, self._batches.width, self._trained.count, self._trained.since)
            logs |= self._trained.take() | counts | self._batches.take()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the Trainer does, in words that transformers 4 knows, too; in a checkpoint also the projections."""
        with self._average.applied():
            super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        resumable = folder.name.startswith(PREFIX_CHECKPOINT_DIR) and not self.args.save_only_model
        if resumable:
            self._average.save(folder, self.args.should_save)
        if not self.args.should_save:
            return
        if (folder / CONFIG_NAME).is_file():  # not beside an adapter
            save_config(base_of(self.accelerator.unwrap_model(self.model)).config, folder)
        complete_side_files(folder)
        if resumable and self._states:
            self._states.save(folder / PROJECTIONS)

    def create_model_card(self, **kwargs) -> None:
        """Write the card of a model that is pushed from training; `kwargs` as for `Trainer.create_model_card`."""
        if self.teacher is None:
            super().create_model_card(**kwargs)
        elif self.is_world_process_zero():
            card = write_training_card(self, **kwargs)
            card.save(Path(self.args.output_dir) / "README.md")

    def _watch(self, model: PreTrainedModel) -> None:
        """Prepare a student, that of this trainer or the next that `model_init` makes, and read its states from now on."""
        set_attention(base_of(model), self.args.attn_implementation)
        freeze_vision(base_of(model))
        if not self.is_deepspeed_enabled:  # it keeps a float32 copy itself
            train_in_float32(model)
        self._states = state_losses_of(self.args, base_of(model), self.teacher)
