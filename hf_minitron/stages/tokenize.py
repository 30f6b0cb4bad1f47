"""tokenize: tokenize and pack distill's text once, on all cores and without a GPU, for cache and distill to read (optional)."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from hf_minitron.checkpoint.checkpoint import require_space, resolve
from hf_minitron.data.packing import bytes_per_token
from hf_minitron.recipe import bind
from hf_minitron.run import Run
from hf_minitron.stage import Stage
from hf_minitron.stages import distill, prune, synthesize
from hf_minitron.stages.training import PACKING_SETTINGS, make_blocks, make_eval_blocks


@dataclass(frozen=True)
class Args:
    """The `tokenize:` section; the text, and how it is packed, are those of the `distill:` section."""

    tokens: int | None = field(
        default=None, metadata={"min": 1, "help": "Tokens of text, for all steps of all processes; all of it when left out."}
    )


def check(args: Args, run: Run) -> None:
    """Refuse a text that distill could not read, and a disk that cannot hold it."""
    training = bind(run, "distill", distill.Args)
    distill.check_blocks(training, run)
    packing = (training.block_size, training.cross_documents, training.add_bos_token)
    needed = (args.tokens or 0) * bytes_per_token(AutoTokenizer.from_pretrained(resolve(run.model)), *packing)
    require_space(run.folder, needed - run.left_bytes("tokenize"), "the text's tokens")


def work(args: Args, run: Run) -> dict[str, float]:
    """Return nothing: reading text takes little beside the models that read it."""
    return {}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `train/` and, where distill evaluates, `eval/`."""
    training = bind(run, "distill", distill.Args)
    training.text, training.eval_text = (synthesize.text_of(run, text) for text in (training.text, training.eval_text))
    tokenizer = AutoTokenizer.from_pretrained(prune.student_of(run))
    blocks = make_blocks(training, tokenizer, out / "train", run.seed, args.tokens)
    make_eval_blocks(training, tokenizer, out / "eval")
    print(f"{len(blocks) * training.block_size:,} tokens in {len(blocks):,} sequences", flush=True)


STAGE = Stage(
    "tokenize",
    __doc__,
    Args,
    check,
    run,
    work,
    uses=("synthesize",),
    needs_for=prune.vocab_needs,
    reads=tuple(f"distill.{key}" for key in PACKING_SETTINGS),
    optional=True,
)
