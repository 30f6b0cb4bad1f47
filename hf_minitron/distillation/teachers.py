"""What a trainer was given as its teacher: a model, where to load one from, or a cache; and what it is refused for."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.architecture.config import model_of, pruned_vocab
from hf_minitron.data.vocabulary import check_vocabularies
from hf_minitron.distillation.cached import META, CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.documents import check_documents_apart
from hf_minitron.distillation.engine import sharded_loading
from hf_minitron.distillation.losses.tokens import CROSS_ENTROPY
from hf_minitron.distillation.records import check_losses
from hf_minitron.distillation.teacher import LiveTeacher
from hf_minitron.errors import one_line
from hf_minitron.head import check_head

Given = PreTrainedModel | CachedTeacher | str | Path | None


def teacher_for(
    args: DistillationArguments,
    given: Given,
    device: torch.device,
    datasets: Iterable[object],
    student: PreTrainedConfig,
    tokenizer: object,
) -> LiveTeacher | CachedTeacher | None:
    """Return the teacher of a training, `None` where no loss needs one; refuse one that cannot serve its losses and data.

    It has the vocabulary of the student.
    """
    needed = args.losses.keys() - {CROSS_ENTROPY}
    if given is None and needed:
        raise ValueError(f"losses: {sorted(needed)[0]} needs a teacher: give teacher_model; cross_entropy alone needs none")
    if not needed:
        return None
    if isinstance(given, str | Path) and (Path(given) / META).is_file():
        given = CachedTeacher(given)
    if args.teacher_model_init_kwargs and not isinstance(given, str | Path):
        raise ValueError("teacher_model_init_kwargs: teacher_model is loaded already; leave them out, or give its name")
    if not isinstance(given, CachedTeacher):
        shares = pruned_vocab(student) is not None  # its head and embedding must be whole to lose rows
        sharding = {} if shares else {"sharding": partial(sharded_loading, args, trained=False)}
        live = LiveTeacher(given, device, args.teacher_model_init_kwargs, args.top_k, **sharding)
        set_attention(live.model, args.attn_implementation)
        live.share_vocabulary(student, tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None)
        return live
    if args.lmbda:
        raise ValueError(f"lmbda: {args.lmbda}, but a cached teacher has no answer to what the student writes; give the "
                         "teacher itself, or set lmbda to 0")  # fmt: skip
    check_losses(given.record, args.losses, args.temperature)
    given.check_vocabulary(pruned_vocab(student))
    if args.top_k is not None:
        raise ValueError(
            f"top_k: {args.top_k}, but a cache holds what it holds; make it with k: {args.top_k}, or leave top_k out"
        )
    for blocks in datasets:
        if isinstance(blocks, Dataset):
            given.check_blocks(blocks)
    return given


def set_attention(model: PreTrainedModel, name: str | None) -> None:
    """Let a model compute attention as `attn_implementation` says; as it does where that is `None`.

    Raises:
        ValueError: for a name that Transformers does not know, a package that is not installed, or a class that cannot.
    """
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"attn_implementation: {name!r} cannot be had ({one_line(error)}); leave it out") from error
    if model.config._attn_implementation != name:  # Transformers only warns
        raise ValueError(f"attn_implementation: {name!r} is not for {model.config.model_type}; leave it out")


def check_attention(config: PreTrainedConfig, name: str | None) -> None:
    """Refuse as `set_attention` does, by a model without weights."""
    if name is not None:
        with torch.device("meta"):
            set_attention(model_of(config), name)


def check_models(
    student: PreTrainedModel,
    teacher: LiveTeacher | CachedTeacher | None,
    tokenizer: PreTrainedTokenizerBase | None,
    train_dataset: object,
) -> int:
    """Refuse vocabularies that differ by more than padding, heads that are more than a matrix, and models that cannot mask
    attention between documents.

    Returns: the size of the smaller vocabulary.
    """
    run = [student, *([teacher.model] if isinstance(teacher, LiveTeacher) else [])]
    for model in run:
        check_head(model.config)
    models = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    least = check_vocabularies(models, tokenizer, train_dataset)
    if "position_ids" in (getattr(train_dataset, "column_names", None) or ()):
        for model in run:
            check_documents_apart(model)
    return least
