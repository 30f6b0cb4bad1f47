"""`hf-minitron init`: a short recipe for a model, without its weights, with the reason for every number."""

import argparse
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_minitron.architecture.config import DEQUANTIZED, text_config
from hf_minitron.checkpoint.model_files import resolve
from hf_minitron.errors import RecipeError, told
from hf_minitron.json_files import read_json
from hf_minitron.planning.cost_text import cost_text
from hf_minitron.planning.costs import CHECKPOINTING, GB, Cost, Machine, Models, training_cost
from hf_minitron.planning.own_text import check_texts, splits_for, tokens_of
from hf_minitron.recipe_file import read_yaml
from hf_minitron.shape import Shape
from hf_minitron.stages.share import divisors, share_of, sizes_for
from hf_minitron.stages.target import teacher, unquantizable
from hf_minitron.yaml_text import scalar

TEXT = "HuggingFaceFW/fineweb-edu:sample-10BT"
CHATS = "HuggingFaceTB/smoltalk:all"  # with splits train and test
LEARNT = " # a million chats, read again where steps want more; only answers are learnt"
GPU_MEMORY = 80e9  # of a GPU where none is named
HOURS = 24  # of distillation that a draft is made for
MOST_TOKENS = 94_000_000_000  # 2408.11796, table 4
STEPS = 2000  # of a draft, with a batch between these numbers of tokens
LEAST_BATCH, MOST_BATCH = 2**16, 2**22
FEWEST_STEPS = 200  # where a short text gives fewer tokens, with smaller batches
PASSES = 4  # over a text of one's own: a fifth teaches less than new text would (2305.16264)
BLOCK = 4096  # tokens of a packed sequence, at most
FEWEST_BLOCKS, LEAST_BLOCK = 64, 256  # of a short text
TEMPLATE = """\
# {title} to {after:,} parameters, {kept:.0%} of {before:,}.
# Written by hf-minitron init; change what you like.
#   hf-minitron plan {words}      what it takes
#   hf-minitron run {words}       all of it
model: {model}
run: {run}
seed: 0

score: # one forward pass: which channels matter
  text: {text}{split}
  tokens: {score_tokens} # {sequences}
  block_size: {block}

prune:
  target: # {why}
{target}
  multiple_of: {multiple_of} # what GPUs and quantized formats like
{dequantize}  # corrections: []  # for plain slicing; by default kept weights are corrected by least squares
  # sequential: true  # fits them again, layer by layer: the best start, where score's text is of several domains

distill: # forward KL to the teacher's logits (2407.14679, table 15)
  text: {text}{learnt}{split}
  streaming: true
  block_size: {block}
  max_steps: {steps} # {budget}
  per_device_train_batch_size: {batch} # {fits}
  gradient_accumulation_steps: {accumulation} # {step_tokens:,} tokens a step on {gpus}
  {checkpointing_key}: {checkpointing}
{adapters}  learning_rate: {rate}
  warmup_steps: {warmup}
  save_steps: {save}
  save_total_limit: 2
  logging_steps: 10
  report_to: none # trackio, wandb, tensorboard

evaluate:
{evaluate}

publish: # hf-minitron publish {words} --push
  # repo_id: me/{slug}
  # license: # the teacher's, where its card does not say so
  # export: [gguf, mlx] # files for llama.cpp and MLX, loaded there and compared
  {language}
"""
# What is measured of a base model, and of one that answers in chats.
WIKI = "Salesforce/wikitext:wikitext-2-raw-v1"
BASE = """\
  tasks: [arc_easy, hellaswag, winogrande] # a base model's"""
INSTRUCT = """\
  tasks: [gsm8k, ifeval] # the second needs pip install "lm-eval[ifeval]"
  chat_template: true # of the tokenizer, around every question
  generate: # answers of teacher, pruned and distilled model, side by side in the card
    - Explain in two sentences why leaves are green.
    - Write a polite email that asks for a day off."""


def main(args: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    """Write a recipe and print what it takes; return the command's exit code."""
    with told():
        if overrides:
            raise RecipeError(f"--{next(iter(overrides))} is a setting of a recipe; edit {args.output}, or give it to run")
        if args.output.is_dir():
            raise RecipeError(f"--output: {args.output} is a folder; name a file, such as {args.output / 'recipe.yaml'}")
        if args.text is not None and not args.text.strip():
            raise RecipeError(f"--text: {args.text!r} names no text; leave it out for one that suits the model")
        if args.output.exists():
            raise RecipeError(f"{args.output} is there already; name another --output, or delete it")
        machine = Machine(args.gpus, args.memory or GPU_MEMORY, args.gpu_tflops * 1e12, args.utilization)  # the plan's, too
        text = draft(args.model, share_of(args.keep, "--keep"), machine, args.text, args.output)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
        recipe = read_yaml(text, str(args.output))
        shape = Models.of(recipe).teacher.shape
        notes = unquantizable(shape, shape.cut_to(recipe["prune"]["target"]))
        print("\n".join([text, cost_text(recipe, machine), *(f"{axis}: {note}" for axis, note in notes.items())]))
        print(f"\nRecipe: {args.output}", flush=True)
    if args.text:
        check_texts(recipe, resolve(args.model, weights=False), args.output)
    return 0


def draft(model: str, share: float, machine: Machine, text: str | None = None, path: Path = Path("recipe.yaml")) -> str:
    """Return the text of a recipe that keeps a share of a model's parameters.

    Args:
        model (`str`): A folder or a Hub id.
        share (`float`): Of the parameters.
        machine (`Machine`): What it shall run on.
        text (`str`, *optional*): Training text; when left out chats for a model that answers in chats, else text of the web.
        path (`Path`, *optional*): Where the recipe will lie, for its comments.
    """
    folder = resolve(model, weights=False)
    quantization = read_json(folder / "config.json").get("quantization_config") or {}
    stored = quantization.get("quant_method")
    architecture = teacher(model, stored in DEQUANTIZED)
    sizes = sizes_for(architecture, share)
    shape, rows = architecture.shape, architecture.rows
    after = shape.cut_to(sizes)
    machine = replace(machine, gpu_bytes=machine.gpu_bytes or GPU_MEMORY)
    positions = getattr(text_config(architecture.config), "max_position_embeddings", None) or BLOCK
    local = Path(model).expanduser()
    name = Path(os.path.abspath(local) if local.is_dir() else model.partition("@")[0]).name  # noqa: PTH100 (keeps links)
    chat, own = is_instruct(name, folder), tokens_of(text) if text else None
    split, held = splits_for(text) if text else ("train", None)
    block = min(BLOCK, positions)
    while own and block > LEAST_BLOCK and own < FEWEST_BLOCKS * block:
        block //= 2
    slug = re.sub(r"[^\w.-]+", "-", f"{name}-{share * 100:.0f}").lower().strip("-")
    before, kept = shape.num_parameters(rows), after.num_parameters(rows)
    divisor = divisors(shape)
    facts = {
        "model": scalar(model), "title": _printable(name), "words": _printable(shlex.quote(str(path))), "block": block,
        "before": before, "after": kept, "kept": kept / before, "slug": slug, "run": scalar(f"runs/{slug}"),
        "target": "\n".join(f"    {axis}: {size} # of {shape[axis]}, {size / shape[axis]:.0%}" for axis, size in sizes.items()),
        "why": reason(shape, after, sizes),
        "multiple_of": "{" + ", ".join(f"{axis}: {divisor[axis]}" for axis in sizes if axis in divisor) + "}",
        "checkpointing_key": CHECKPOINTING,
        "text": scalar(text or (CHATS if chat else TEXT)), "evaluate": measured(text, held, chat),
        "split": f"\n  split: {split}" if split != "train" else "",
        "language": "# language: # of your text, such as en" if text else "language: en",
        "learnt": LEARNT if chat and text is None else "",
        "dequantize": f"  dequantize: true # stored in {stored}\n" if stored in DEQUANTIZED else "",
        "memory": machine.gpu_bytes / GB,
        "gpus": f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''}",
    }  # fmt: skip
    short = own is not None and own < 1024 * block
    facts["score_tokens"] = max(own // block, 1) * block if short else 1024 * block
    facts["sequences"] = (
        f"about all of the text; 2408.11796 reads {1024 * block}" if short else "1024 sequences, as in 2408.11796"
    )
    return TEMPLATE.format(**facts, **_training(model, facts, machine, sizes, own))


def reason(before: Shape, after: Shape, sizes: Mapping[str, int]) -> str:
    """Say why a target cuts what it cuts, and what follows and stays."""
    if "experts" in sizes:
        what = "experts, half of them at most, as in REAP (2510.13999)" + (
            "; then channels of the rest" if "ffn" in sizes else ""
        )
    elif {"hidden", "ffn"} <= sizes.keys():
        what = "width, as in Llama-3.1-Minitron-4B-Width (2408.11796, table 3)"
    else:
        what = "width, which is ahead of depth after training (2407.14679, table 13)"
    tied = ["heads follow hidden, as this class ties them"] if "heads" in sizes else []
    follow = [f"{axis} follow {leader}" for axis, leader in before.coupled.items() if leader in sizes]
    stay = [axis for axis in ("hidden", "ffn", "heads", "layers") if axis in before.sizes and after[axis] == before[axis]]
    return "; ".join([what, *tied, *follow, *([f"{' and '.join(stay)} stay"] if stay else [])])


def measured(text: str | None, held: str | None, chat: bool) -> str:
    """Return what a draft's `evaluate` section says: of a text of one's own its held-out split, where it has one."""
    if held:
        line = f"  text: {scalar(text)} # its split {held}: held out" + (f"\n  split: {held}" if held != "test" else "")
    elif text:
        line = f"  text: {CHATS if chat else WIKI} # not your text: hold out a part of that, and name its file here"
    elif chat:
        line = f"  text: {CHATS} # its split test: held out; answers alone are measured"
    else:
        line = f"  text: {WIKI} # held out"
    return f"{line}\n{INSTRUCT if chat else BASE}"


def _printable(text: str) -> str:
    """Return text as a comment can hold it."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def is_instruct(name: str, folder: Path) -> bool:
    """Return whether a model answers in chats: its tokenizer has a chat template, and its name does not say base.

    Where there is no tokenizer beside a config.json, the name alone tells.
    """
    words = re.split(r"[-_. ]", name.lower())
    if not (folder / "tokenizer_config.json").is_file():
        return not {"instruct", "chat", "it"}.isdisjoint(words)
    template = any(folder.glob("chat_template*")) or read_json(folder / "tokenizer_config.json").get("chat_template")
    return bool(template) and "base" not in words


ADAPTERS = """\
  lora: {r: 32, lora_alpha: 64} # adapters: to train all weights takes more memory
  base_dtype: bfloat16 # of the weights below them, which are frozen
"""


def _training(
    model: str, facts: Mapping[str, Any], machine: Machine, sizes: Mapping[str, int], own: int | None
) -> dict[str, Any]:
    """Return the batch that the memory holds, and the steps that take `HOURS`, or `PASSES` over a short text of one's own."""
    block, gpus = facts["block"], machine.gpus
    models = Models.of({"model": model, "prune": {"target": dict(sizes), "dequantize": bool(facts["dequantize"])}})

    def distillation(batch: int, checkpointing: bool, adapters: bool, accumulation: int = 2) -> Cost:
        section = {"block_size": block, "per_device_train_batch_size": batch, CHECKPOINTING: checkpointing,
                   "gradient_accumulation_steps": accumulation, "max_steps": 1, "streaming": True}  # fmt: skip
        section |= {"lora": {}, "base_dtype": "bfloat16"} if adapters else {}
        return training_cost("distill", {"distill": section}, models, machine)

    ways = ((False, False), (True, False), (True, True))  # the fastest first
    tried = [(batch, *way) for way in ways for batch in (8, 4, 2, 1)]
    limit = 0.9 * machine.gpu_bytes
    fit = next((settings for settings in tried if distillation(*settings).gpu_bytes <= limit), None)
    batch, checkpointing, adapters = fit or (1, True, False)
    one = distillation(batch, checkpointing, adapters, 1)
    carried = min(MOST_TOKENS, HOURS / machine.hours(one.flops / one.tokens))
    tokens = min(carried, PASSES * own) if own else carried
    wanted = min(max(tokens / STEPS, min(LEAST_BATCH, tokens / FEWEST_STEPS)), MOST_BATCH)
    held = batch
    while batch > 1 and batch * block * gpus > wanted:
        batch //= 2
    micro = batch * block * gpus
    accumulation = max(1, round(wanted / micro))
    steps = max(10, round(tokens / (micro * accumulation)))
    done = steps * micro * accumulation
    hours = f"about {machine.hours(one.flops / one.tokens * done):.2g} hours on {facts['gpus']}"
    fits = f"what {facts['memory']:.0f} GB hold" if fit else f"more than {facts['memory']:.0f} GB: plan says what helps"
    return {
        "budget": f"{done / 1e9:.2g} B tokens: {hours}; more is better, up to 94 (2408.11796, table 4)" if tokens == carried
        else f"{done:,} tokens: {done / own:.2g} passes over about {own:,}; more text is better",
        "fits": fits if batch == held else f"{held} would fit; small batches make enough steps of so few tokens",
        "adapters": ADAPTERS if adapters else "",
        "rate": "2.0e-4 # of adapters" if adapters else "1.0e-4 # 2408.11796, table 4",
        "batch": batch, "checkpointing": str(checkpointing).lower(), "accumulation": accumulation, "steps": steps,
        "step_tokens": micro * accumulation,
        "warmup": max(1, steps // 50), "save": max(10, steps // 20),
    }  # fmt: skip
