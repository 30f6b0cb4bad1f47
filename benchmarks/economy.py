"""Which way of training makes most of few tokens: loss on the race's validation split, from the same start, text and seed.

    python benchmarks/economy.py ../shared/data runs/race --tokens 4096

Begins with the students that `models.py` prunes, the published recipe's beside ours, and trains both in the same ways: what
helps one only is no gain of the other. A way that is measured already is skipped; the table in docs/measurements.md is made
of the result file.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from models import BLOCK, PUBLISHED_TEXT, TRAINING, VALIDATION, begin, chosen, prepare, trials
from sublayers import Tuning, tune
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

from hf_minitron import DistillationArguments, DistillationTrainer, Plan, load_text, token_blocks
from hf_minitron.checkpoint.checkpoint import best_device, best_dtype, load_model
from hf_minitron.data.mixture import mixed_blocks, read_sources
from hf_minitron.evaluation.text import read_text
from hf_minitron.evaluation.text_metrics import TEXT_METRICS
from hf_minitron.memory import keep_freed_memory

RESULT = Path(__file__).with_name("results") / "economy.json"
LINEAR = {"lr_scheduler_type": "linear"}
TUNED = 28  # sequences of the calibration text that sublayers are tuned on
SELECTED = 0.2  # of the positions, where the student is least certain


def uncertain_positions(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the forward KL where the student's entropy is among the highest of the chunk, and nothing elsewhere."""
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    entropy = -(student.exp() * student).sum(-1)
    return divergence * (entropy >= entropy.quantile(1 - SELECTED)) / SELECTED


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of layers, AdamW for all else, in groups of one optimizer."""

    def __init__(self, model: nn.Module, lr: float):
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        matrices = [each for name, each in named if each.ndim == 2 and "embed" not in name and "lm_head" not in name]
        others = [each for name, each in named if each.ndim != 2 or "embed" in name or "lm_head" in name]
        self.parts = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.AdamW(others, lr=lr, weight_decay=0.0)]  # fmt: skip
        super().__init__([part.param_groups[0] for part in self.parts], {})
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def step(self, closure: Callable | None = None) -> None:
        """Take a step with both."""
        for part in self.parts:
            part.step()


class EarlyStates(TrainerCallback):
    """Lets the weight of the losses on states fall to nothing in the first third of training."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Set the weight of this step."""
        args.losses["block"] = max(1 - 3 * state.global_step / state.max_steps, 0.0)


# Arguments of the training, a callback class, whether Muon trains the matrices, and how sublayers are tuned before.
WAYS: dict[str, dict[str, Any]] = {
    "4 sequences a step, 6e-4": {"per_device_train_batch_size": 4, "learning_rate": 6e-4},
    "1 sequence, 3e-4, linear": {"learning_rate": 3e-4, **LINEAR},
    "1 sequence, 6e-4, linear": {"learning_rate": 6e-4, **LINEAR},
    "1 sequence, 1.5e-4, linear": {"learning_rate": 1.5e-4, **LINEAR},
    "1 sequence, 3e-4, linear, no warm-up": {"learning_rate": 3e-4, **LINEAR, "warmup_steps": 0},
    "average (EMA 0.9)": {"learning_rate": 3e-4, **LINEAR, "ema_decay": 0.9},
    "20 % most uncertain positions": {"learning_rate": 3e-4, **LINEAR, "losses": {uncertain_positions: 1.0}},
    "Muon, 4 sequences, 1e-3, linear": {"per_device_train_batch_size": 4, "learning_rate": 1e-3, **LINEAR, "muon": True},
    "sublayers tuned first": {"learning_rate": 3e-4, **LINEAR, "sublayers": Tuning()},
    "half the text, read twice": {"learning_rate": 3e-4, **LINEAR, "num_train_epochs": 2},
    "block loss, first third": {"learning_rate": 3e-4, **LINEAR, "losses": {"forward_kl": 1.0, "block": 1.0},
                                "balance": "static", "callback": EarlyStates},
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """What all ways have in common.

    Args:
        teacher (`str`): The model that was pruned.
        blocks (`Dataset`): Packed sequences of the training text.
        calibration (`Dataset`): Those that sublayers are tuned on.
        rows (`list[list[int]]`): The validation split's documents.
        seed (`int`): Of the text and its order.
        out (`Path`): A folder for the trainer.
    """

    teacher: str
    blocks: Dataset
    calibration: Dataset
    rows: list[list[int]]
    seed: int
    out: Path


def main() -> None:
    """Train in every way that is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with text/ and tasks/")
    parser.add_argument("runs", type=Path, help="the folder of models.py's runs")
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--size", default="100m")
    parser.add_argument("--shapes", nargs="+", default=["published", "uniform"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    args.runs = args.runs.resolve()
    keep_freed_memory()
    found = json.loads(args.json.read_text()) if args.json.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        given = prepared(args, Path(folder))
        for way, shape in itertools.product(args.ways, args.shapes):
            first = next(entry for entry in trials(args.runs) if (entry.size, entry.shape) == (args.size, shape))
            entry = replace(chosen(args.runs, args.size, shape) or first, seed=args.seed)
            facts = {
                "size": args.size,
                "shape": shape,
                "width": entry.width,
                "tokens": args.tokens,
                "seed": args.seed,
                "way": way,
            }
            if any(facts.items() <= row.items() for row in found):
                continue
            student = begin(args.runs, args.model, entry).path("prune") / "student"
            found.append({**facts, **trained(student, given, WAYS[way])})
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(*found[-1].values(), flush=True)


def prepared(args: argparse.Namespace, folder: Path) -> Given:
    """Return what all ways read."""
    rows = prepare(args.data.resolve(), args.runs, args.model)[VALIDATION]
    texts = read_sources({str(args.runs / f"{name}.jsonl"): 1.0 for name in TRAINING})
    tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    blocks = mixed_blocks(texts, tokenizer, BLOCK, max_tokens=args.tokens, seed=args.seed, folder=folder / "blocks")
    documents = load_text(str(args.runs / PUBLISHED_TEXT))
    calibration = token_blocks(documents, tokenizer, BLOCK, TUNED * BLOCK, seed=args.seed)
    return Given(args.model, blocks, calibration, rows, args.seed, folder / "out")


def trained(student: Path, given: Given, way: dict[str, Any]) -> dict[str, float]:
    """Train a student in one way; return what it makes of the validation split, and the tokens that it saw."""
    device = best_device()
    model = load_model(student, torch.float32, device).train()
    way = {"per_device_train_batch_size": 1, "warmup_steps": 0.05, "num_train_epochs": 1, **way}
    muon, callback, how = (way.pop(name, None) for name in ("muon", "callback", "sublayers"))
    tuned = tune_sublayers(model, student, given, how) if how else 0
    blocks = given.blocks.select(range(len(given.blocks) // way["num_train_epochs"]))
    settings = {"save_strategy": "no", "report_to": "none", "logging_steps": 4, "max_grad_norm": 1.0, "seed": given.seed}
    args = DistillationArguments(str(given.out), **settings, **way)
    optimizers = (MuonAdamW(model, args.learning_rate) if muon else None, None)
    callbacks = [callback()] if callback else None
    trainer = DistillationTrainer(model, given.teacher, args, train_dataset=blocks, optimizers=optimizers, callbacks=callbacks)
    trainer.train()
    model = trainer.model.eval().to(best_dtype(device))
    sums, _ = read_text(model, given.rows, description="Validation", metrics=TEXT_METRICS[:1])
    mean = -sums[TEXT_METRICS[0].name].sum() / sum(len(row) - 1 for row in given.rows)
    seen = {"unique_tokens": len(blocks) * BLOCK, "tuning_tokens": tuned, "steps": trainer.state.global_step}
    return {"validation": float(np.exp(mean)), **seen}


def tune_sublayers(model: PreTrainedModel, student: Path, given: Given, how: Tuning) -> int:
    """Tune a student's sublayers in place; return the tokens that each of them saw, some of them again."""
    ids = torch.tensor(given.calibration.with_format(None)["input_ids"][:], device=model.device)
    plan = Plan.load(student / "plan.json")
    kept = torch.tensor(plan.keep.get("hidden", [*range(plan.before["hidden"])]), device=model.device)
    whole = load_model(given.teacher, torch.bfloat16, model.device)
    for layer, kind, before, after in tune(model, whole, kept, ids, how):
        print(f"layer {layer} {kind}: {before:.4f} -> {after:.4f}", flush=True)
    return how.steps * how.batch * BLOCK


if __name__ == "__main__":
    main()
