"""evaluate: quality and speed of the teacher, the pruned and the distilled student and any other models, into report.json."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer

from hf_minitron.architecture.config import text_config
from hf_minitron.checkpoint.checkpoint import resolve
from hf_minitron.data.encoding import is_chat
from hf_minitron.data.packing import adds_bos_token, check_first_block, token_blocks
from hf_minitron.data.texts import check_text, load_text
from hf_minitron.data.vocabulary import difference
from hf_minitron.environment import environment
from hf_minitron.evaluation.answers import NEW_TOKENS, Prompts
from hf_minitron.evaluation.compare import check_model, check_tensor_parallel, compare, open_model
from hf_minitron.evaluation.speed import SpeedSettings, measure_speed
from hf_minitron.evaluation.task_files import check_folder, task_files
from hf_minitron.evaluation.tasks import DOCUMENT_TOKENS, DOCUMENTS, Tasks, splits_evenly
from hf_minitron.evaluation.wording import ROLES
from hf_minitron.inputs import model_files, text_files
from hf_minitron.run import Run
from hf_minitron.stage import Stage
from hf_minitron.stages import correct

TAKEN = (*ROLES, "prompt")  # names that mean something else in a report


@dataclass(frozen=True)
class Args:
    """The `evaluate:` section."""

    text: str = field(metadata={"help": "Held-out text for perplexity, as for score.", "reads": text_files})
    text_column: str = field(
        default="text", metadata={"help": "Column of the text, messages, completions beside their prompt, or tokens."}
    )
    split: str = field(default="test", metadata={"help": "Split of a folder or a Hub dataset."})
    tokens: int = field(default=131_072, metadata={"min": 1, "help": "Tokens of held-out text."})
    block_size: int = field(default=512, metadata={"min": 2, "help": "Tokens per block."})
    add_bos_token: bool | None = field(
        default=None,
        metadata={"help": "Begin documents, blocks and tasks with the BOS token; as the tokenizer does when left out."},
    )
    batch_size: int | str = field(default=8, metadata={"help": "Sequences per forward pass, or auto for what fits."})
    models: dict = field(
        default_factory=dict,
        metadata={
            "help": "Other models to compare with: name: folder or Hub id (owner/name@revision).",
            "reads": model_files,
        },
    )
    tasks: list = field(
        default_factory=list,
        metadata={"help": "lm-eval tasks: names, or paths of their YAML files.", "reads": task_files},
    )
    include_path: str | None = field(default=None, metadata={"help": "Folder with lm-eval task files of your own."})
    limit: int | None = field(default=None, metadata={"min": 1, "help": "Documents per task; all when left out."})
    few_shot: int | None = field(default=None, metadata={"min": 0, "help": "Examples before a question; else the task's own."})
    chat_template: bool | None = field(
        default=None,
        metadata={
            "help": "Ask the questions of tasks and generate in the chat template; when left out, where text holds chats."
        },
    )
    generate: list | str = field(
        default_factory=list,
        metadata={
            "help": "Prompts that every model answers, side by side in the card; in the chat template as a user's words."
        },
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"min": 1, "help": "Tokens of an answer to a prompt of generate; 64 when left out."}
    )
    speed: bool | dict = field(default=True, metadata={"help": "true, false, or batch_sizes, prompt, new_tokens, rounds."})
    tensor_parallel: bool = field(default=False, metadata={"help": "Split models over processes, rather than text and tasks."})

    @property
    def prompts(self) -> list:
        """The prompts of `generate`, which may be one."""
        return [self.generate] if isinstance(self.generate, str) else self.generate


def check(args: Args, run: Run) -> None:
    """Refuse a missing text or model, an unknown task, and settings that a model or the processes cannot take."""
    check_text(args.text, args.block_size)
    if args.batch_size != "auto" and (not isinstance(args.batch_size, int) or args.batch_size < 1):
        raise ValueError(f"batch_size: {args.batch_size!r} is neither a whole number from 1 on nor auto")
    if wrong := [prompt for prompt in args.prompts if not isinstance(prompt, str) or not prompt.strip()]:
        raise ValueError(f"generate: {wrong[0]!r} is no prompt, a text that models go on with")
    if args.max_new_tokens is not None and not args.prompts:
        raise ValueError(f"max_new_tokens: {args.max_new_tokens} has no effect without generate; name prompts, or leave it out")
    check_folder(args.include_path)
    chat = asks_in_chats(args)
    of_tasks = chat and bool(args.tasks or not args.prompts)  # it is of prompts, too
    settings = {"limit": args.limit, "few_shot": args.few_shot, "chat_template": of_tasks}
    chosen = Tasks.find(args.tasks, args.include_path, **settings)
    chosen.check()
    processes = PartialState().num_processes
    if not args.tensor_parallel and args.tasks:
        splits_evenly(args.limit, processes)
    speed = _speed(args, run)
    for name, source in args.models.items():
        if name in TAKEN or not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise ValueError(
                f"models: {name!r} is no name for another model: letters, digits, . - and _, none of {', '.join(TAKEN)}"
            )
        if not isinstance(source, str):
            raise ValueError(f"models.{name}: {source!r} is not a folder or a Hub id")
    for name, source in {"teacher": run.model, **args.models}.items():
        config = check_model(source, args.block_size, chat)
        if args.add_bos_token:
            adds_bos_token(AutoTokenizer.from_pretrained(source), True)
        positions = getattr(text_config(config), "max_position_embeddings", None)
        chosen.check_positions(name, positions)
        if speed and name in _timed(args):
            speed.check(positions, name)
        if args.tensor_parallel:
            check_tensor_parallel(config, processes)
    tokenizer = AutoTokenizer.from_pretrained(resolve(run.model))
    kind = check_first_block(args.text, tokenizer, args.block_size, args.tokens, args.split, args.text_column)
    for name, source in args.models.items() if kind in ("messages", "completion") else ():
        if difference(AutoTokenizer.from_pretrained(resolve(source)), tokenizer):
            raise ValueError(f"text: {args.text} holds chats, which {name} would read in tokens of another tokenizer, where "
                             f"answers are not found: name plain text, or leave {name} out")  # fmt: skip


def asks_in_chats(args: Args) -> bool:
    """Return whether tasks and prompts are asked in the chat template: as is said, else where the text holds chats."""
    if args.chat_template is not None or not (args.tasks or args.prompts):
        return bool(args.chat_template)
    row = next(iter(load_text(args.text, args.split, args.text_column, streaming=True)))
    return is_chat(list(row), row)


def work(args: Args, run: Run) -> dict[str, float]:
    """Return the units of work, see `hf_minitron.planning.estimate`: the text and the tasks of every model, and speed."""
    others = 2 + ("correct" in run.recipe) + len(args.models)
    read, decode = args.tokens, 0
    read += (1 + others) * len(args.tasks) * (args.limit or DOCUMENTS) * DOCUMENT_TOKENS
    if speed := _speed(args, run):
        turns = len(_timed(args)) * len(speed.batch_sizes) * len(speed.prompt)
        decode = turns * (speed.rounds + 1) * speed.new_tokens
        read += len(_timed(args)) * (2 * speed.rounds + 1) * sum(speed.batch_sizes) * sum(speed.prompt)
    decode += (1 + others) * _new_tokens(args)
    return {"read": read, "compare": others * args.tokens, "decode": decode}


def _new_tokens(args: Args) -> int:
    """Return how many tokens an answer has at most; none where nothing is asked."""
    return (args.max_new_tokens or NEW_TOKENS) if args.prompts else 0


def run(args: Args, run: Run, out: Path) -> None:
    """Write `report.json` and `samples/`. Under `accelerate launch` every process does its share."""
    models = {
        "teacher": run.model,
        **({"corrected": correct.teacher_of(run)} if "correct" in run.recipe else {}),
        "pruned": run.path("prune") / "student",
        "distilled": run.path("distill") / "student",
        **args.models,
    }
    tokenizer = AutoTokenizer.from_pretrained(resolve(run.model))
    documents = load_text(args.text, args.split, args.text_column)
    blocks = token_blocks(documents, tokenizer, args.block_size, args.tokens, run.seed, add_bos_token=args.add_bos_token)
    chat = asks_in_chats(args)
    prompts = Prompts(args.prompts, _new_tokens(args), chat, args.add_bos_token) if args.prompts else None
    report = compare(
        models, blocks, args.tasks, args.include_path, args.limit, args.batch_size, args.few_shot, chat,
        args.tensor_parallel, out, run.seed, args.add_bos_token, prompts=prompts,
    )  # fmt: skip
    speed, main = _speed(args, run), PartialState().is_main_process
    if speed and (main or args.tensor_parallel):  # one process alone, or all of one model; models take turns, all in memory
        live = {name: open_model(resolve(models[name]), args.tensor_parallel) for name in _timed(args)}
        report = dataclasses.replace(report, speed=measure_speed(live, speed))
    if main:
        report = dataclasses.replace(report, machine=environment())
        report.save(out / "report.json")


def _speed(args: Args, run: Run) -> SpeedSettings | None:
    """Return what speed is measured at: what was asked for, or for a mere `true` what the teacher's positions hold."""
    speed = SpeedSettings.read(args.speed)
    if args.speed is not True:
        return speed
    return speed.within(getattr(text_config(AutoConfig.from_pretrained(resolve(run.model))), "max_position_embeddings", None))


def _timed(args: Args) -> list[str]:
    """Return whose speed is measured; the pruned student's is the distilled one's."""
    return ["teacher", "distilled", *args.models]


STAGE = Stage(
    "evaluate",
    __doc__,
    Args,
    check,
    run,
    work,
    needs=("prune", "distill"),
    uses=("correct",),
    scales=("tokens", "limit"),
    distributed=True,
)
