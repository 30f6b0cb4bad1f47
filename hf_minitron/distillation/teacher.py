"""Teachers: who says what the student should learn.

A live teacher is frozen, in eval mode and in its own dtype; it is never part of the student or of its checkpoints.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.checkpoint import best_dtype, load_model
from hf_minitron.distillation.losses.chunked import head_of, next_token_rows
from hf_minitron.distillation.signals import DenseSignal


class LiveTeacher:
    """A model that is run on every batch.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): The teacher, or where to load it from (in bf16 where the device has it).
        device (`torch.device`): Where it runs.
        init_kwargs (`dict`, *optional*): Passed to `from_pretrained` when a path or Hub id is given.
    """

    def __init__(self, model: PreTrainedModel | str | Path, device: torch.device, init_kwargs: dict | None = None):
        if isinstance(model, str | Path):
            kwargs = {"dtype": best_dtype(device), **(init_kwargs or {})}
            model = load_model(model, device=device, **kwargs)
        self.model = model.to(device).eval().requires_grad_(False)
        self.config = self.model.config

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> DenseSignal:
        """Return what the teacher says about the labelled tokens of a batch."""
        with torch.autocast(self.model.device.type, enabled=False):
            kwargs = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
            hidden = self.model.base_model(**kwargs, use_cache=False).last_hidden_state
            rows, _ = next_token_rows(hidden, inputs["labels"])
            return DenseSignal(rows, head_of(self.model))


def check_tokenizers(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Refuse two tokenizers that give a token different ids: logits could not be compared.

    Raises:
        ValueError: naming the first token whose ids differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        token = different[0]
        raise ValueError(
            f"Teacher and student have different tokenizers: {len(different):,} tokens differ, such as {token!r} with id "
            f"{theirs.get(token)} (teacher) and {ours.get(token)} (student). Distill from a teacher of the same family"
        )
