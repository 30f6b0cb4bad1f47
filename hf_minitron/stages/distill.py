"""distill: train the student to match the teacher; resumes from its last checkpoint when it was interrupted."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from hf_minitron.architecture.config import pruned_vocab, text_config
from hf_minitron.checkpoint.checkpoint import resolve
from hf_minitron.data.packing import adds_bos_token
from hf_minitron.data.vocabulary import teacher_ids
from hf_minitron.distillation.adapters import check_lora
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.states import STATE_LOSSES, check_states
from hf_minitron.distillation.teacher import check_tokenizers, teacher_folder
from hf_minitron.head import check_head
from hf_minitron.inputs import teacher_files
from hf_minitron.plan import copy_plan
from hf_minitron.recipe import bind
from hf_minitron.run import Run
from hf_minitron.stage import Stage
from hf_minitron.stages import correct, prune, synthesize
from hf_minitron.stages.trained import train_model
from hf_minitron.stages.training import TextArguments, check_space, check_text_for, tokens_made, tokens_of
from hf_minitron.stages.validation import eval_tokens_of


@dataclass
class Args(TextArguments, DistillationArguments):
    """The `distill:` section: everything that `DistillationArguments` and `TrainingArguments` know, and the text."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Another teacher than `model` or, with a `correct:` section, the corrected one.",
            "reads": teacher_files,
        },
    )
    lora: dict | None = field(
        default=None,
        metadata={"help": "Train low-rank additions to the student and merge them: fields of peft.LoraConfig, or {}."},
    )


def check(args: Args, run: Run) -> None:
    """Refuse an unusable text, another tokenizer, a model without document-masked attention, and too small a disk."""
    check_blocks(args, run)
    if args.lmbda and "cache" in run.recipe:
        raise ValueError(f"lmbda: {args.lmbda}, but a cache has no answer to what the student writes; leave out the section "
                         "cache, or lmbda")  # fmt: skip
    if args.lmbda and args.max_new_tokens >= args.block_size:
        raise ValueError(f"max_new_tokens: {args.max_new_tokens} leave no room for a prompt in block_size: {args.block_size}; "
                         "set it lower")  # fmt: skip
    if names := [name for name in args.losses if name in STATE_LOSSES]:
        teacher, student = (AutoConfig.from_pretrained(resolve(model)) for model in (args.teacher or run.model, run.model))
        _, after, _ = prune.shapes(bind(run, "prune", prune.Args), run.model)
        check_states(teacher, student, after["layers"], names, args.layer_pairs)
    if args.lora is not None:
        check_lora(args.lora, AutoConfig.from_pretrained(resolve(run.model)))
    student = prune.student(bind(run, "prune", prune.Args), run.model)
    check_space(run, args, "distill", AutoTokenizer.from_pretrained(resolve(run.model)), student)


def check_blocks(args: Args, run: Run) -> None:
    """Refuse an unusable text, and a teacher with another tokenizer."""
    folder, models = resolve(run.model), [resolve(run.model)]
    if args.teacher or args.teacher_model_init_kwargs:
        if args.teacher or "correct" not in run.recipe:
            models.append(teacher_folder(args.teacher or run.model, args.teacher_model_init_kwargs))
        configs = [AutoConfig.from_pretrained(model) for model in (models[-1], folder)]
        sizes = [text_config(config).vocab_size for config in configs]
        tokenizers = [AutoTokenizer.from_pretrained(model) for model in (models[-1], folder)]
        if pruned_vocab(configs[0]) == pruned_vocab(configs[1]):
            check_tokenizers(*tokenizers, min(sizes))
        else:
            teacher_ids(*tokenizers, *sizes)
    tokenizer, configs = AutoTokenizer.from_pretrained(folder), [AutoConfig.from_pretrained(model) for model in models]
    for config in configs:
        check_head(config)
    if args.add_bos_token:
        adds_bos_token(tokenizer, True)
    kinds = check_text_for(args, partial(synthesize.names, run), configs, tokenizer)
    if prune.cuts_vocab(run) and (ready := [name for name, kind in kinds.items() if kind == "input_ids"]):
        raise ValueError(f"text: {ready[0]} holds input_ids, which are the teacher's, and prune.target.vocab gives the student "
                         "others: give it as text, or leave vocab out")  # fmt: skip


def work(args: Args, run: Run) -> dict[str, float]:
    """Return the units of work, see `hf_minitron.planning.estimate`."""
    read, steps = eval_tokens_of(args), max(args.max_steps, 0)
    sampled = args.lmbda * steps * args.gradient_accumulation_steps * (args.max_new_tokens or 0)
    return {"train": tokens_of(args), "step": steps, "read": read, "compare": read, "decode": sampled}


def teacher_of(args: Args, run: Run) -> str | Path:
    """Return where the teacher lies: that of the section, the corrected one, or the model that is pruned."""
    return args.teacher or correct.teacher_of(run)


def run(args: Args, run: Run, out: Path) -> None:
    """Write `student/` and `log.json`."""
    source, teacher, facts = run.path("prune") / "student", teacher_of(args, run), {}
    if "cache" in run.recipe:
        teacher = _cached_teacher(args, run)
        args.teacher_model_init_kwargs = None  # the teacher is not loaded
        facts["cache"] = teacher.meta
    args.text, args.eval_text = (synthesize.text_of(run, text) for text in (args.text, args.eval_text))
    if train_model(args, run, source, teacher, out, "student", tokens_made(run), **facts).is_world_process_zero():
        copy_plan(source, out / "student")


def _cached_teacher(args: Args, run: Run) -> CachedTeacher:
    """Open the cache; refuse one of another teacher."""
    teacher = CachedTeacher(run.path("cache"))
    teacher.check_teacher(teacher_of(args, run), args.teacher_model_init_kwargs)
    args.teacher_model_init_kwargs = None  # they have named the cache's teacher
    return teacher


STAGE = Stage(
    "distill",
    __doc__,
    Args,
    check,
    run,
    work,
    needs=("prune",),
    uses=("correct", "synthesize", "tokenize", "cache"),
    scales=("max_steps", "warmup_steps"),
    distributed=True,
)
