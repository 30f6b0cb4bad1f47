"""prune: keep the best-scored part of every axis and write the student as a stock checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig

from hf_minitron.checkpoint import Checkpoint, resolve
from hf_minitron.families.family import check_target, family_of
from hf_minitron.plan import make_plan
from hf_minitron.pruning.prune import prune_checkpoint
from hf_minitron.run import Run
from hf_minitron.scores import Scores
from hf_minitron.shape import Shape

NEEDS = ("score",)


@dataclass(frozen=True)
class Args:
    """The `prune:` section."""

    target: dict = field(metadata={"help": "New sizes of any of: layers, hidden, ffn, heads, kv_heads."})
    multiple_of: dict = field(
        default_factory=lambda: {"hidden": 8, "ffn": 8},
        metadata={"help": "Divisors of new sizes; GPUs like multiples of 8 at least, 64 for tensor parallel."},
    )
    max_shard_bytes: int = field(default=5_000_000_000, metadata={"min": 1, "help": "Size limit of one weights file."})


def shapes(args: Args, model: str) -> tuple[Shape, Shape, dict[str, str]]:
    """Return the shapes before and after and the rows of the model, from `config.json` alone; refuse an illegal target."""
    config = AutoConfig.from_pretrained(resolve(model))
    family = family_of(config)
    before = family.shape_of(config)
    after = before.cut_to(args.target, args.multiple_of)
    check_target(config, family, after)
    return before, after, family.rows_of(config)


def check(args: Args, run: Run) -> None:
    """Refuse an illegal target, and a checkpoint with a missing or truncated shard, before any weight is read."""
    shapes(args, run.model)
    Checkpoint(resolve(run.model))


def tokens(args: Args) -> dict[str, int]:
    """Pruning runs no model."""
    return {}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `student/`."""
    before, after, _ = shapes(args, run.model)
    scores = Scores.load(run.path("score") / "scores.safetensors")
    prune_checkpoint(resolve(run.model), make_plan(scores, before, after), out / "student", args.max_shard_bytes)
