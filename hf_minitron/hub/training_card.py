"""The card of a model that is pushed right from training: how it was trained, and that nobody has measured it yet.

`hub.card` writes the full one; this one stands above the trainer, which needs it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, TrainerState

import hf_minitron
from hf_minitron.distillation.config import DistillationArguments

TAGS = ["hf_minitron", "minitron", "pruning", "structured-pruning", "knowledge-distillation"]
MAX_ROWS = 12  # of the log
TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

Taught by {{ teacher }} with knowledge distillation, the Minitron way ([2407.14679](https://arxiv.org/abs/2407.14679),
[2408.11796](https://arxiv.org/abs/2408.11796)), using hf_minitron {{ version }}. Pushed from training: **its quality has not
been measured.** `hf-minitron evaluate` measures it beside its teacher, and `hf-minitron publish` writes a card with both.

## Training

Step {{ state.global_step }} of {{ state.max_steps }}, {{ "{:,}".format(sequences) }} sequences
{%- if state.num_input_tokens_seen %}, {{ "{:,}".format(state.num_input_tokens_seen) }} tokens{% endif %}.

| setting | value |
| --- | --- |
{%- for key, value in settings.items() %}
| {{ key }} | {{ value }} |
{%- endfor %}
{% if rows %}
| {{ columns | join(" | ") }} |
|{% for column in columns %} ---: |{% endfor %}
{%- for row in rows %}
| {{ row | join(" | ") }} |
{%- endfor %}
{% endif -%}
"""


def write_training_card(
    args: DistillationArguments,
    state: TrainerState,
    teacher: PreTrainedConfig,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tags: str | Sequence[str] | None = None,
    **metadata: Any,
) -> ModelCard:
    """Render the card of a model as its trainer knows it.

    Args:
        args (`DistillationArguments`): Losses and hyperparameters.
        state (`TrainerState`): Steps done and the log.
        teacher (`PreTrainedConfig`): The teacher's config, which knows where the teacher came from.
        model_name (`str`, *optional*): The model's name; the output folder's when left out.
        finetuned_from (`str`, *optional*): Hub id of the base model; the teacher's, where it has one, when left out.
        tags (`str` or `Sequence[str]`, *optional*): More tags.
        **metadata: What else `Trainer.create_model_card` takes: `license` (never guessed), `language`, `dataset`.

    Returns:
        `ModelCard`: Ready to `save` as README.md.
    """
    source = getattr(teacher, "name_or_path", "")  # a cache does not know it
    # a path of this machine is nobody's business; what is no folder here and has a Hub id's form is one
    hub_id = source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() else None
    name = model_name or Path(args.output_dir).name
    data = ModelCardData(
        base_model=finetuned_from or hub_id,
        base_model_relation="finetune" if finetuned_from or hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=name,
        tags=[*TAGS, *([tags] if isinstance(tags, str) else tags or [])],
        license=metadata.get("license"),
        language=metadata.get("language"),
        datasets=metadata.get("dataset"),
    )
    columns, rows = _log(state.log_history, args.losses)
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        teacher=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"a {teacher.model_type} model",
        state=state,
        sequences=state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        settings=_settings(args),
        columns=columns,
        rows=rows,
        version=hf_minitron.__version__,
    )


def _settings(args: DistillationArguments) -> dict[str, object]:
    return {
        "losses": ", ".join(f"{weight} {name}" for name, weight in args.losses.items()),
        "temperature": args.temperature,
        "learning rate": args.learning_rate,
        "schedule": args.lr_scheduler_type,
        "optimizer": args.optim,
        "sequences per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
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
