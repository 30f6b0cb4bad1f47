"""evaluate: perplexity, lm-eval tasks and speed of the teacher, the pruned and the distilled student, into report.json."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from hf_minitron.checkpoint import best_device, best_dtype, load_model, resolve
from hf_minitron.data import check_text, load_text, token_blocks
from hf_minitron.evaluation.compare import compare, task_manager
from hf_minitron.evaluation.speed import tokens_per_second
from hf_minitron.run import Run
from hf_minitron.stages import correct

NEEDS = ("prune", "distill")
USES = ("correct",)


@dataclass(frozen=True)
class Args:
    """The `evaluate:` section."""

    text: str = field(metadata={"help": "Held-out text for perplexity: a file or a dataset's Hub id."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    split: str = field(default="test", metadata={"help": "Split of a Hub dataset."})
    tokens: int = field(default=131_072, metadata={"min": 1, "help": "Tokens of held-out text."})
    block_size: int = field(default=512, metadata={"min": 2, "help": "Tokens per block."})
    batch_size: int = field(default=8, metadata={"min": 1, "help": "Sequences per forward pass."})
    tasks: list = field(default_factory=list, metadata={"help": "Names of lm-eval tasks."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with lm-eval task files of your own."})
    limit: int | None = field(default=None, metadata={"min": 1, "help": "Documents per task; all when left out."})
    speed: bool = field(default=True, metadata={"help": "Measure tokens per second of teacher and student."})


def check(args: Args, run: Run) -> None:
    """Refuse a missing text or an unknown task."""
    check_text(args.text, args.block_size)
    if args.include_path and not Path(args.include_path).expanduser().is_dir():
        raise ValueError(f"include_path: no folder at {args.include_path}")
    unknown = set(args.tasks) - set(task_manager(args.include_path).all_tasks) if args.tasks else set()
    if unknown:
        raise ValueError(f"tasks: lm-eval knows no {sorted(unknown)[0]!r}; see `lm-eval ls tasks`, or set include_path")


def tokens(args: Args) -> dict[str, int]:
    """Return how many tokens of held-out text pass through each model (tasks and speed cost about as much again)."""
    return {"teacher": 2 * args.tokens, "student": 4 * args.tokens}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `report.json`."""
    models = {
        "teacher": run.model,
        **({"corrected": correct.teacher_of(run)} if "correct" in run.recipe else {}),
        "pruned": run.path("prune") / "student",
        "distilled": run.path("distill") / "student",
    }
    tokenizer = AutoTokenizer.from_pretrained(resolve(run.model))
    documents = load_text(args.text, args.split, args.text_column)
    blocks = token_blocks(documents, tokenizer, args.block_size, args.tokens, run.seed)
    report = compare(models, blocks, args.tasks, args.include_path, args.limit, args.batch_size)
    if args.speed:
        device = best_device()
        live = {name: load_model(models[name], best_dtype(device), device) for name in ("teacher", "distilled")}
        report = dataclasses.replace(report, speed=tokens_per_second(live))
    report.save(out / "report.json")
