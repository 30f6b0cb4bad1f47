"""synthesize: let the teacher write text to distil on; continues after its last batch when it was interrupted (optional)."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hf_minitron.architecture.config import positions_of
from hf_minitron.checkpoint.checkpoint import best_device, best_dtype, load_model, resolve
from hf_minitron.data.formats import SYNTHESIZED
from hf_minitron.data.packing import adds_bos_token
from hf_minitron.data.texts import check_text
from hf_minitron.distillation.prompts import Prompts, Start, start_ids
from hf_minitron.distillation.synthesis import Sieve, generate_batch, sampling
from hf_minitron.inputs import text_files
from hf_minitron.run import CHECKPOINTS, Run
from hf_minitron.stage import Stage
from hf_minitron.stages.correct import teacher_of

TEXT = "text.jsonl"
# After so many batches in a row of which nothing is kept, nothing will be.
HOPELESS = 50


@dataclass(frozen=True)
class Args:
    """The `synthesize:` section: the teacher (the corrected one, if any) writes, `distill.text: synthesized` reads."""

    documents: int | None = field(default=None, metadata={"min": 1, "help": "Texts wanted; or tokens."})
    tokens: int | None = field(default=None, metadata={"min": 1, "help": "Tokens wanted, prompts included; or documents."})
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Texts to begin and continue, or chats to answer; from nothing when left out.",
            "reads": text_files,
        },
    )
    text_column: str = field(
        default="text", metadata={"help": "Column of the prompts; where there is no text: messages, conversations or prompt."}
    )
    split: str = field(default="train", metadata={"help": "Split of a folder or a Hub dataset."})
    prompt_tokens: int = field(default=32, metadata={"min": 1, "help": "Tokens taken from the start of each text."})
    chat_template: bool = field(
        default=False, metadata={"help": "Put texts into the chat template, as the user's words, as messages always are."}
    )
    add_bos_token: bool | None = field(
        default=None, metadata={"help": "Begin prompts with the BOS token; as the tokenizer does when left out."}
    )
    max_new_tokens: int = field(default=512, metadata={"min": 1, "help": "Tokens to generate per text, at most."})
    batch_size: int = field(default=16, metadata={"min": 1, "help": "Texts generated in one batch."})
    temperature: float = field(
        default=1.0, metadata={"min": 0, "help": "Divides the logits; 0: always the most probable token."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Share of probability to sample from."})
    top_k: int = field(default=0, metadata={"min": 0, "help": "Tokens to sample from; 0: all."})
    min_tokens: int = field(default=16, metadata={"min": 1, "help": "Texts with fewer new tokens are rejected."})
    max_repeated: float = field(
        default=0.1,
        metadata={
            "min": 0,
            "help": "Share of tokens in repeated 10-grams that is too much (2112.11446, table A1); code needs more.",
        },
    )


def names(run: Run, text: str) -> bool:
    """Return whether a section's text is the synthesized one; refuse the name in a recipe that makes none."""
    if text == SYNTHESIZED and "synthesize" not in run.recipe:
        raise ValueError(f"text: {SYNTHESIZED} is what the teacher writes: add a `synthesize:` section, or name another text")
    return text == SYNTHESIZED


def text_of(run: Run, text: str | Mapping) -> str | dict:
    """Return a section's text, one or a table of several, with the file of this stage where it is named."""
    if isinstance(text, Mapping):
        return {text_of(run, name): weight for name, weight in text.items()}
    return str(run.path("synthesize") / TEXT) if names(run, text) else text


def check(args: Args, run: Run) -> None:
    """Refuse settings that make no text or always the same, and texts longer than the model's positions."""
    if (args.documents is None) == (args.tokens is None):
        raise ValueError("how much? Set one of documents and tokens")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"top_p: {args.top_p} is not above 0 and at most 1")
    if args.min_tokens > args.max_new_tokens:
        raise ValueError(f"min_tokens: {args.min_tokens} is more than max_new_tokens: {args.max_new_tokens}")
    folder = resolve(run.model)
    tokenizer, taken, name = AutoTokenizer.from_pretrained(folder), 1, "prompt_tokens"
    if args.prompts is not None:
        if args.chat_template and not tokenizer.chat_template:
            raise ValueError(f"chat_template: the tokenizer in {folder} has none")
        check_text(args.prompts)
        prompts, taken = _prompts(args, tokenizer, run.seed), args.prompt_tokens
        first = prompts.batch(0, args.batch_size)
        if prompts.chats and args.add_bos_token is not None:
            raise ValueError("add_bos_token: a chat template has its own BOS token; leave add_bos_token out")
        if prompts.chats:
            taken, name = min(len(start.ids) for start in first), f"the shortest of {len(first)} prompts"
    elif args.chat_template:
        raise ValueError("chat_template needs prompts: name a text whose documents are what the user says")
    elif args.temperature == 0:
        raise ValueError("temperature: 0 without prompts writes one and the same text; raise it, or name prompts")
    if args.add_bos_token:
        adds_bos_token(tokenizer, True)
    longest, wanted = positions_of(AutoConfig.from_pretrained(folder)), taken + args.max_new_tokens
    if wanted > longest:
        raise ValueError(f"{name} and max_new_tokens: {wanted} together, more than the {longest} positions of the model")


def work(args: Args, run: Run) -> dict[str, float]:
    """Return the units of work, see `planning.estimate`: steps of generation, of a batch as many as of its longest text."""
    taken = 1 if args.prompts is None else args.prompt_tokens
    documents = args.documents or args.tokens / (taken + args.max_new_tokens)
    return {"decode": math.ceil(documents / args.batch_size) * args.max_new_tokens}


def run(args: Args, run: Run, out: Path) -> None:
    """Write `text.jsonl` and `synthesize.json`.

    Under `accelerate launch` every process makes every n-th batch, and all look at all batches in the same order: the result
    does not depend on the number of processes.
    """
    state, journal = PartialState(), out / CHECKPOINTS / "batches.jsonl"
    if state.is_main_process:
        journal.parent.mkdir(exist_ok=True)
        _drop_half_written(journal)
    state.wait_for_everyone()
    written = sum(1 for _ in _read(journal))
    state.wait_for_everyone()  # nothing is added before all have counted
    sieve, wanted = Sieve(args.min_tokens, args.max_repeated), args.tokens or args.documents
    unit = "tokens" if args.documents is None else "documents"
    with tqdm(desc="Writing", total=wanted, unit=f" {unit}", disable=not state.is_main_process) as bar:
        for _ in _sift(
            args, sieve, itertools.chain(itertools.islice(_read(journal), written), _write(args, run, journal, written))
        ):
            bar.update(min(getattr(sieve, unit), wanted) - bar.n)
    if state.is_main_process:
        sieve = Sieve(args.min_tokens, args.max_repeated)
        with (out / TEXT).open("w", encoding="utf-8") as file:
            for rows in _sift(args, sieve, _read(journal)):
                file.writelines(json.dumps(row) + "\n" for row in rows)
        facts = {"documents": sieve.documents, "tokens": sieve.tokens, "rejected": dict(sieve.rejected)}
        (out / "synthesize.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _sift(args: Args, sieve: Sieve, batches: Iterable[list[dict]]) -> Iterator[list[dict]]:
    """Yield what is kept of every batch, as rows of a text, until it is enough."""
    in_vain = 0
    for rows in batches:
        kept = []
        for row in rows:
            if sieve.keeps(row["text"], row["new"], row["tokens"]):
                kept.append(row["chat"] or {"text": row["text"]})
            if _enough(args, sieve):
                break
        yield kept
        if _enough(args, sieve):
            return
        in_vain = 0 if kept else in_vain + 1
        if in_vain == HOPELESS:
            raise ValueError(f"Nothing of the last {in_vain * args.batch_size:,} texts could be kept; {sieve.documents:,} were "
                             f"before, and rejected {dict(sieve.rejected)}. Change prompts, temperature, min_tokens or "
                             "max_repeated")  # fmt: skip


def _enough(args: Args, sieve: Sieve) -> bool:
    return sieve.tokens >= args.tokens if args.documents is None else sieve.documents >= args.documents


def _write(args: Args, run: Run, journal: Path, made: int) -> Iterator[list[dict]]:
    """Yield new batches without end, one from every process in turn, each written down first."""
    state, device, folder = PartialState(), best_device(), resolve(teacher_of(run))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(folder, best_dtype(device), device)
    config = sampling(model, tokenizer, args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    prompts, room = _prompts(args, tokenizer, run.seed), positions_of(model.config) - args.max_new_tokens
    while True:
        number = made + state.process_index
        if prompts is None:
            starts = [Start(ids) for ids in start_ids(tokenizer, None, 1, args.add_bos_token)] * args.batch_size
        else:
            starts = prompts.batch(number, args.batch_size)
        seed = (run.seed * 1_000_003 + number) % 2**32  # of which a CPU's generator takes no more
        fit = [start.ids for start in starts if len(start.ids) <= room]
        new = iter(generate_batch(model, fit, config, seed) if fit else [])
        rows = [_row(tokenizer, start, next(new) if len(start.ids) <= room else None) for start in starts]
        batches = gather_object([rows])
        if state.is_main_process:
            with journal.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(batch) + "\n" for batch in batches)
        made += len(batches)
        yield from batches


def _prompts(args: Args, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prompts | None:
    """Return what generation starts from; `None` for nothing."""
    if args.prompts is None:
        return None
    how = (args.prompt_tokens, args.chat_template, args.add_bos_token, seed)
    return Prompts(args.prompts, args.split, args.text_column, tokenizer, *how)


def _row(tokenizer: PreTrainedTokenizerBase, start: Start, new: Sequence[int] | None) -> dict:
    """Return a text with its new ids, `None` where the prompt left no room; an answer keeps the signs of its calls.

    An end token will follow, as in `token_blocks`.
    """
    whole = [*start.ids, *(new or ())]
    text = tokenizer.decode(whole, skip_special_tokens=start.chat is None)
    chat = None if start.chat is None else start.with_answer(tokenizer.decode(new or ()))
    return {"text": text, "chat": chat, "new": new, "tokens": len(whole) + 1}


def _read(journal: Path) -> Iterator[list[dict]]:
    if journal.is_file():
        with journal.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _drop_half_written(journal: Path) -> None:
    """Cut off a last line that a killed process has begun."""
    if journal.is_file():
        with journal.open("rb+") as file:
            end = 0
            for line in file:
                end += len(line) if line.endswith(b"\n") else 0
            file.truncate(end)


STAGE = Stage("synthesize", __doc__, Args, check, run, work, uses=("correct",), optional=True, distributed=True)
