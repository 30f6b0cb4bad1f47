"""Teacher correction (2408.11796): next-token training of a model, whole or by LoRA, with the logits of some tokens at a time.

The Trainer is transformers' own. It must not know a student.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_minitron.checkpoint import load_model
from hf_minitron.distillation.config import ChunkedArguments
from hf_minitron.distillation.losses.chunked import chunked_loss, head_of, next_token_rows
from hf_minitron.distillation.trainer import collate
from hf_minitron.memory import keep_freed_memory

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


class ChunkedCrossEntropy:
    """Next-token cross-entropy for `Trainer(compute_loss_func=...)`, whose model then makes no logits of its own.

    Args:
        model (`PreTrainedModel` or `PeftModel`): What is trained; it gets two hooks.
        chunk_size (`int`): Tokens whose logits exist at the same time.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, chunk_size: int):
        self.model, self.chunk_size, self._hidden = _plain(model), chunk_size, None
        head_of(self.model)  # refuses what cannot be chunked
        model.register_forward_pre_hook(_without_logits, with_kwargs=True)
        self.model.base_model.register_forward_hook(self._keep_hidden)

    def __call__(self, outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of the last forward pass, divided by the tokens of the whole accumulated batch."""
        rows, targets = next_token_rows(self._hidden, labels)
        self._hidden = None
        num_items = len(targets) if num_items_in_batch is None else num_items_in_batch

        def cross_entropy(logits: Tensor, rows: slice) -> dict[str, Tensor]:
            return {"loss": torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")}

        return chunked_loss(rows, head_of(self.model), cross_entropy, {"loss": 1.0}, num_items, self.chunk_size)[0]

    def _keep_hidden(self, module, args, output) -> None:
        self._hidden = output.last_hidden_state


def _without_logits(module, args, kwargs):
    """Apply the head to no token and keep no cache."""
    none = torch.empty(0, dtype=torch.long, device=kwargs["input_ids"].device)
    return args, {**kwargs, "use_cache": False, "logits_to_keep": none}


def correction_trainer(model: PreTrainedModel | PeftModel, args: ChunkedArguments, **kwargs) -> Trainer:
    """Return a Trainer of next-token cross-entropy.

    Args:
        model (`PreTrainedModel` or `PeftModel`): In float32 for mixed precision.
        args (`ChunkedArguments`): Settings.
        **kwargs: As for `transformers.Trainer`. `train_dataset` has rows of `input_ids`, and optionally `labels`.
    """
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process (DataParallel): start with `accelerate launch` instead")
    keep_freed_memory()
    loss = ChunkedCrossEntropy(model, args.chunk_size)
    return Trainer(model=model, args=args, data_collator=collate, compute_loss_func=loss, **kwargs)


def add_lora(model: PreTrainedModel, settings: dict) -> PeftModel:
    """Return a model of which only low-rank additions are trained.

    Args:
        model (`PreTrainedModel`): The model; it is changed.
        settings (`dict`): Fields of `peft.LoraConfig`; what is left out is that of `LORA`.

    Raises:
        ValueError: for settings that peft refuses, and for additions to the embedding or the head, which the chunked loss
            would not see.
    """
    try:
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**LORA, **settings}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}") from error
    for layer, kind in ((model.get_input_embeddings(), torch.nn.Embedding), (model.get_output_embeddings(), torch.nn.Linear)):
        if not isinstance(layer, kind):
            raise ValueError(f"lora: {settings} changes the embedding or the output head; name other target_modules")
    return tuned


def merge_lora(source: str | Path, adapter: str | Path) -> PreTrainedModel:
    """Return the model of a folder, in float32, with a saved adapter added to its weights: a stock model."""
    return PeftModel.from_pretrained(load_model(source, torch.float32), adapter).merge_and_unload()


def _plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model
