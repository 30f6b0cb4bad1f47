"""What a trainer was given as its teacher: a model, where to load one from, or a cache; and what it is refused for."""

from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.distillation.cached import META, CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.documents import check_documents_apart
from hf_minitron.distillation.losses.tokens import CROSS_ENTROPY
from hf_minitron.distillation.teacher import LiveTeacher
from hf_minitron.vocabulary import check_vocabularies


def teacher_for(
    args: DistillationArguments,
    teacher: PreTrainedModel | CachedTeacher | str | Path | None,
    device: torch.device,
    datasets: Iterable[object],
) -> LiveTeacher | CachedTeacher | None:
    """Return the teacher of a training; `None` where no loss needs one.

    Args:
        args (`DistillationArguments`): The losses, and how the teacher is loaded.
        teacher (`PreTrainedModel`, `CachedTeacher`, `str`, `Path` or `None`): What `DistillationTrainer` was given.
        device (`torch.device`): Where a live teacher runs.
        datasets (`Iterable`): What is read; a cache must hold every row of those that are a `Dataset`.

    Raises:
        ValueError: for a missing teacher, arguments without effect, and a cache of other text or that cannot serve the losses.
    """
    needed = args.losses.keys() - {CROSS_ENTROPY}
    if teacher is None and needed:
        raise ValueError(f"losses: {sorted(needed)[0]} needs a teacher, and none is given; cross_entropy alone does not")
    if not needed:
        return None
    if isinstance(teacher, str | Path) and (Path(teacher) / META).is_file():
        teacher = CachedTeacher(teacher)
    if args.teacher_model_init_kwargs and not isinstance(teacher, str | Path):
        raise ValueError("teacher_model_init_kwargs: the teacher is loaded already; leave them out, or name the teacher")
    if not isinstance(teacher, CachedTeacher):
        return LiveTeacher(teacher, device, args.teacher_model_init_kwargs, args.top_k)
    teacher.check_losses(args.losses, args.temperature)
    if args.top_k is not None:
        raise ValueError(
            f"top_k: {args.top_k}, but a cache holds what it holds; make it with k: {args.top_k}, or leave top_k out"
        )
    for blocks in datasets:
        if isinstance(blocks, Dataset):
            teacher.check_blocks(blocks)
    return teacher


def check_models(
    student: PreTrainedModel,
    teacher: LiveTeacher | CachedTeacher | None,
    tokenizer: PreTrainedTokenizerBase | None,
    train_dataset: object,
) -> int:
    """Refuse two vocabularies that differ by more than padding, and a model that cannot mask attention between documents.

    Args:
        student (`PreTrainedModel`): The student.
        teacher (`LiveTeacher` or `CachedTeacher`, *optional*): From `teacher_for`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): That of both.
        train_dataset (`Dataset` or another): What is trained on.

    Returns:
        `int`: The size of the smaller vocabulary.
    """
    readers = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    least = check_vocabularies(readers, tokenizer, train_dataset)
    if "position_ids" in (getattr(train_dataset, "column_names", None) or ()):
        for reader in [student, *([teacher.model] if isinstance(teacher, LiveTeacher) else [])]:
            check_documents_apart(reader)
    return least
