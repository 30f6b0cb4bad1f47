"""hf_minitron: prune and distill causal language models the Minitron way."""

import importlib

import hf_minitron.modeling  # noqa: F401  transformers' Auto classes know nonuniform models from here on

__version__ = "0.1.0"

# Loaded at first use, so that importing one part does not import all.
_HOME = {
    "DistillationArguments": "distillation.config",
    "DistillationTrainer": "distillation.trainer",
    "Architecture": "architecture.architecture",
    "Plan": "plan",
    "Report": "evaluation.report",
    "Shape": "shape",
    "Statistics": "statistics",
    "calibrate": "importance.calibrate",
    "compare": "evaluation.compare",
    "load_text": "texts",
    "make_plan": "plan",
    "prune_checkpoint": "pruning.prune",
    "prune_model": "pruning.prune",
    "register_family": "architecture.family",
    "token_blocks": "data",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"hf_minitron.{_HOME[name]}"), name)
    raise AttributeError(f"hf_minitron has no {name!r}; it has {', '.join(_HOME)}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
