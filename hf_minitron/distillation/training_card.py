"""The card of a model that is pushed right from training: how it was trained, and that nobody has measured it yet.

`hub.card` writes the full one, of a finished run.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer, TrainingArguments

import hf_minitron
from hf_minitron.architecture.config import pipeline_tag
from hf_minitron.distillation.batch import rows_read
from hf_minitron.distillation.teacher import base_of

TAGS = ["hf_minitron", "minitron", "pruning", "structured-pruning", "knowledge-distillation"]
MAX_ROWS = 12  # of the log
TEMPLATE = Path(__file__).with_name("training_card_template.md")


def write_training_card(
    trainer: Trainer,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tags: str | Sequence[str] | None = None,
    **metadata: Any,
) -> ModelCard:
    """Render the card of a model as its trainer knows it.

    Args:
        trainer (`Trainer`): A `DistillationTrainer` with a teacher.
        model_name (`str`, *optional*): The model's name; the output folder's when left out.
        finetuned_from (`str`, *optional*): Hub id of the base model; the teacher's, where it has one, when left out.
        tags (`str` or `Sequence[str]`, *optional*): More tags.
        **metadata: What else `Trainer.create_model_card` takes: `license` (never guessed), `language`, `dataset`.

    Returns:
        `ModelCard`: Ready to `save` as README.md.
    """
    args, state, teacher = trainer.args, trainer.state, trainer.teacher.config
    source = getattr(teacher, "name_or_path", "")  # a cache does not know it
    # a path of this machine is nobody's business; what is no folder here and has a Hub id's form is one
    hub_id = source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() else None
    name = model_name or Path(args.output_dir).name
    data = ModelCardData(
        base_model=finetuned_from or hub_id,
        base_model_relation="finetune" if finetuned_from or hub_id else None,
        library_name="transformers",
        pipeline_tag=pipeline_tag(base_of(trainer.model).config),
        model_name=name,
        tags=[*TAGS, *([tags] if isinstance(tags, str) else tags or [])],
        license=metadata.get("license"),
        language=metadata.get("language"),
        datasets=metadata.get("dataset"),
    )
    columns, rows = _log(state.log_history, args.losses)
    return ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        name=name,
        teacher=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"a {teacher.model_type} model",
        state=state,
        sequences=rows_read(trainer),
        settings=_settings(args, trainer.model.dtype),
        columns=columns,
        rows=rows,
        version=hf_minitron.__version__,
    )


def _settings(args: TrainingArguments, dtype: torch.dtype) -> dict[str, object]:
    mixed = ", bf16 mixed precision" if args.bf16 else ", fp16 mixed precision" if args.fp16 else ""
    return {
        "losses": ", ".join(f"{weight} {name}" for name, weight in args.losses.items()),
        "temperature": args.temperature,
        "learning rate": args.learning_rate,
        "schedule": args.lr_scheduler_type,
        "optimizer": args.optim,
        "sequences per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size,
        "precision": str(dtype).removeprefix("torch.") + mixed,
        "seed": args.seed,
    }


def _log(history: Sequence[Mapping[str, float]], losses: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and at most `MAX_ROWS` rows of the log, evenly spaced, first and last among them."""
    entries = [entry for entry in history if "loss" in entry]
    if len(entries) > MAX_ROWS:
        entries = [entries[i * (len(entries) - 1) // (MAX_ROWS - 1)] for i in range(MAX_ROWS)]
    columns = ["loss", *(name for name in losses if any(name in entry for entry in entries))]
    return ["step", *columns], [[str(entry["step"]), *(f"{entry[c]:.4f}" if c in entry else "" for c in columns)]
                                for entry in entries]  # fmt: skip
