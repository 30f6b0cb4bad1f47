"""hf_minitron: prune and distill causal language models the Minitron way."""

import importlib
from typing import TYPE_CHECKING

from hf_minitron.registration import follow_transformers

if TYPE_CHECKING:
    from hf_minitron.architecture.architecture import Architecture
    from hf_minitron.architecture.family import register_family
    from hf_minitron.data.packing import token_blocks
    from hf_minitron.data.texts import load_text
    from hf_minitron.distillation.config import DistillationArguments
    from hf_minitron.distillation.trainer import DistillationTrainer
    from hf_minitron.evaluation.compare import compare
    from hf_minitron.evaluation.report import Report
    from hf_minitron.hub.values import push_to_hub
    from hf_minitron.importance.calibrate import calibrate
    from hf_minitron.plan import Plan, make_plan
    from hf_minitron.pruning.prune import prune_checkpoint, prune_model
    from hf_minitron.shape import Shape
    from hf_minitron.statistics import Statistics

__version__ = "0.1.0"
__all__ = [
    "Architecture",
    "DistillationArguments",
    "DistillationTrainer",
    "Plan",
    "Report",
    "Shape",
    "Statistics",
    "calibrate",
    "compare",
    "load_text",
    "make_plan",
    "prune_checkpoint",
    "prune_model",
    "push_to_hub",
    "register_family",
    "token_blocks",
]

# Where each name lives; it is loaded at its first use, so that importing one part does not import all.
_HOME = {
    "Architecture": "architecture.architecture",
    "DistillationArguments": "distillation.config",
    "DistillationTrainer": "distillation.trainer",
    "Plan": "plan",
    "Report": "evaluation.report",
    "Shape": "shape",
    "Statistics": "statistics",
    "calibrate": "importance.calibrate",
    "compare": "evaluation.compare",
    "load_text": "data.texts",
    "make_plan": "plan",
    "prune_checkpoint": "pruning.prune",
    "prune_model": "pruning.prune",
    "push_to_hub": "hub.values",
    "register_family": "architecture.family",
    "token_blocks": "data.packing",
}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"hf_minitron.{_HOME[name]}"), name)
    raise AttributeError(f"hf_minitron has no {name!r}; it has {', '.join(_HOME)}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]


follow_transformers()  # so that its Auto classes know nonuniform models
