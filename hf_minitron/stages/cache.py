"""cache: precompute the teacher's outputs for the training text, bit-packed, so that distill needs no teacher."""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import concatenate_datasets
from transformers import AutoConfig, AutoTokenizer

from hf_minitron.architecture.config import text_config
from hf_minitron.checkpoint.model_kinds import adapter_base
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.records import check_losses, record_of
from hf_minitron.distillation.served import served_teacher
from hf_minitron.distillation.teacher import teacher_folder
from hf_minitron.recipe import bind
from hf_minitron.run import Run
from hf_minitron.stage import Stage
from hf_minitron.stages import distill, prune, synthesize
from hf_minitron.stages.training import BLOCK_SETTINGS, blocks_of, tokens_made, tokens_wanted


@dataclass(frozen=True)
class Args:
    """The `cache:` section; text, block size and teacher are those of the `distill:` section."""

    method: str = field(
        default="random", metadata={"help": "random: unbiased draws (2503.16870); top_k: and the mass of the rest."}
    )
    draws: int = field(default=50, metadata={"min": 1, "help": "Draws per token (random); 50 in 2503.16870."})
    k: int = field(default=64, metadata={"min": 1, "help": "Tokens kept (top_k); the vocabulary or more: all."})
    dtype: str = field(default="float16", metadata={"help": "How log-probabilities are stored (top_k): float16 or float32."})
    tokens: int | None = field(
        default=None, metadata={"min": 1, "help": "Tokens of text; those of distill with as many processes when left out."}
    )
    batch_size: int = field(
        default=4, metadata={"min": 1, "help": "Packed sequences per forward pass, or that the server is asked about together."}
    )
    server: str | None = field(
        default=None,
        metadata={
            "help": "Ask a server that runs the teacher (vLLM, SGLang, llama.cpp), such as http://127.0.0.1:8000/v1, and load "
            "none; needs method: top_k. Its key is that of the environment, OPENAI_API_KEY."
        },
    )
    NO_BITS = ("server",)  # the same teacher at another address

    @property
    def how(self) -> dict[str, int]:
        """The method as `write_cache` takes it."""
        numbers = {"random": self.draws, "top_k": self.k}
        if self.method not in numbers:
            raise ValueError(f"method: {self.method!r} is not one of {', '.join(numbers)}")
        return {self.method: numbers[self.method]}


def check(args: Args, run: Run) -> None:
    """Refuse a distillation that the cache could not serve."""
    training = bind(run, "distill", distill.Args)
    distill.check_blocks(training, run)
    if training.teacher and adapter_base(training.teacher):
        raise ValueError(f"distill.teacher: {training.teacher} is a PEFT adapter, of which no cache is made; leave the cache "
                         "out, or merge the adapter (merge_and_unload) and save the model")  # fmt: skip
    if args.server is not None:
        _check_server(args, training, run)
    config = AutoConfig.from_pretrained(teacher_folder(training.teacher or run.model, training.teacher_model_init_kwargs))
    vocab = run.section("prune")["target"]["vocab"] if prune.cuts_vocab(run) else text_config(config).vocab_size
    check_losses(record_of(args.how, vocab, args.dtype), training.losses, training.temperature)


def _check_server(args: Args, training: distill.Args, run: Run) -> None:
    """Refuse a server that does not answer, or not for this teacher, and what only a teacher here could do."""
    if "correct" in run.recipe and not training.teacher:
        raise ValueError("server: the teacher of this run is the one that `correct:` makes, which no server has yet; leave one "
                         "of the two out, or serve it and name its folder as distill.teacher of another recipe")  # fmt: skip
    if prune.cuts_vocab(run):
        raise ValueError("server: it speaks of all of the teacher's tokens, and prune.target.vocab leaves the student some of "
                         "them; leave one of the two out")  # fmt: skip
    teacher, kwargs = training.teacher or run.model, training.teacher_model_init_kwargs
    served_teacher(args.server, teacher, args.how, kwargs, apart=not training.cross_documents)


def work(args: Args, run: Run) -> dict[str, float]:
    """Return nothing: the teacher's reading of the text is counted with distill's, which it replaces."""
    return {}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `cache.json` and the shards; say how many bytes a token takes."""
    training = bind(run, "distill", distill.Args)
    tokenizer = AutoTokenizer.from_pretrained(prune.student_of(run))
    training.text, training.eval_text = (synthesize.text_of(run, text) for text in (training.text, training.eval_text))
    blocks, eval_blocks = blocks_of(
        training, tokenizer, out, run.seed, args.tokens or tokens_wanted(training), tokens_made(run)
    )
    if eval_blocks:
        read = [name for name in blocks.column_names if name in eval_blocks.column_names]  # without labels: all positions
        blocks = concatenate_datasets([part.select_columns(read) for part in (blocks, eval_blocks)])
    teacher = distill.teacher_of(training, run)
    facts = write_cache(teacher, blocks, out, args.how, args.dtype, run.seed, args.batch_size, training.chunk_size,
                        training.teacher_model_init_kwargs,
                        prune.student_of(run) if prune.cuts_vocab(run) else None, args.server)  # fmt: skip
    PartialState().print(
        f"{facts['tokens']:,} tokens of {facts['blocks']:,} sequences, {facts['bytes_per_token']:.1f} bytes per token",
        flush=True,
    )


STAGE = Stage(
    "cache",
    __doc__,
    Args,
    check,
    run,
    work,
    uses=("correct", "synthesize", "tokenize"),
    needs_for=prune.vocab_needs,
    reads=tuple(f"distill.{key}" for key in (*BLOCK_SETTINGS, "teacher", "teacher_model_init_kwargs")),
    optional=True,
    distributed=True,
)
