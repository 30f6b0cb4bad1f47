"""Writes `hf_minitron/keys.json`, what the command's help lists without importing a stage: `python tests/keys_table.py`.

A test compares the file with what this gives.
"""

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path

import transformers
from transformers import TrainingArguments

from hf_minitron.distillation.checks import BOUNDS
from hf_minitron.recipe_file import KINDS, TOP_LEVEL
from hf_minitron.stages.every import STAGES

FILE = Path(__file__).resolve().parent.parent / "hf_minitron" / "keys.json"
# Of what `TrainingArguments` has, what most recipes set.
USUAL = """
per_device_train_batch_size gradient_accumulation_steps max_steps num_train_epochs warmup_steps weight_decay max_grad_norm optim
gradient_checkpointing logging_steps save_steps save_total_limit eval_strategy eval_steps report_to fsdp
""".split()

AT_LEAST_ONE = {words: names for words, _, names in BOUNDS}["at least 1"]


def kinds_of(declared):
    """The types that a value may have."""
    union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    return [typing.get_origin(kind) or kind for kind in (typing.get_args(declared) if union else (declared,))]


def entry(field, declared):
    """What the help says of a key."""
    kinds = kinds_of(declared)
    if not set(kinds) & KINDS.keys() - {types.NoneType}:  # written as text, such as a path or a member of an enumeration
        kinds = [str, *kinds]
    names = [KINDS[kind] for kind in KINDS if kind in kinds]
    found = {"type": " or ".join(names), "help": " ".join(field.metadata.get("help", "").split())}
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if default is dataclasses.MISSING:
        found["required"] = True
    elif default is not None:
        found["default"] = default.value if isinstance(default, enum.Enum) else default
    allowed = [member.value for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum) for member in kind]
    if choices := list(field.metadata.get("choices", allowed)):
        found["choices"] = choices
    least = field.metadata.get("min", 1 if field.name in AT_LEAST_ONE else None)
    return found if least is None else found | {"min": least}


def keys(args):
    """The keys of a section: its own, and the usual ones of `TrainingArguments`."""
    inherited = {field.name: field.metadata for field in dataclasses.fields(TrainingArguments)}
    declared, found = typing.get_type_hints(args), {}
    for field in dataclasses.fields(args):
        own = inherited.get(field.name) != field.metadata and not field.metadata.get("help", "").startswith("Not here")
        if field.init and (own or field.name in USUAL):
            found[field.name] = entry(field, declared[field.name])
            if not own:
                found[field.name]["help"] = found[field.name]["help"].split(". ")[0].rstrip(".") + "."
    return found


def table():
    """What the file holds."""
    stages = {
        name: {
            "summary": stage.summary,
            "in_run": stage.in_run,
            "training": issubclass(stage.args, TrainingArguments),
            "keys": keys(stage.args),
            "more": [
                field.name for field in dataclasses.fields(stage.args) if field.init and field.name not in keys(stage.args)
            ],
        }
        for name, stage in STAGES.items()
    }
    return {"transformers": transformers.__version__, "top": TOP_LEVEL, "stages": stages}


if __name__ == "__main__":
    FILE.write_text(json.dumps(table(), indent=1) + "\n", encoding="utf-8")
