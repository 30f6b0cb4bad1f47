"""`hf-minitron plan`: what a recipe's target costs, from `config.json` alone."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_minitron.errors import RecipeError, told
from hf_minitron.planning.cost_text import cost_text
from hf_minitron.planning.costs import Machine
from hf_minitron.planning.drafting import draft
from hf_minitron.recipe_file import KEYS, arguments, check_listed, read_recipe, read_yaml
from hf_minitron.shape import Shape
from hf_minitron.stages import target
from hf_minitron.stages.share import share_of, with_sizes
from hf_minitron.tables import markdown_table

VLLM = "its Transformers backend takes layers that differ in ffn"


def main(args: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    """Print the plan of a recipe; return the command's exit code."""
    with told():
        machine = Machine(args.gpus, args.memory, args.gpu_tflops * 1e12, args.utilization)
        known = dict.fromkeys(KEYS["stages"])
        if not args.is_model:
            if args.keep is not None:
                raise RecipeError(f"--keep: {args.keep!r} is for a model; a recipe has prune.target, which may be such a share")
            recipe = searched(with_sizes(read_recipe(args.recipe, overrides, known)))
            check_listed(recipe)
        else:
            recipe = as_drafted(str(args.recipe), args, overrides, machine)
        print(plan_text(recipe, args.context))
        print("\n" + cost_text(recipe, machine))
    return 0


def searched(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe that leaves its target to `search` with the sizes of one shape near the budget, and say so."""
    prune = recipe.get("prune") or {}
    if "search" not in recipe or prune.get("target") or "nonuniform" in prune:
        return recipe
    from hf_minitron.run import Run  # both import what trains and evaluates, which other plans do without
    from hf_minitron.stages import search

    args, path = arguments(recipe["search"] or {}, "search", search.Args), Path()
    if measured := search.measured(args):
        raise RecipeError(f"search.budget: {measured[0]} is measured when search runs; give prune.target for a plan before")
    run = Run(path, str(recipe["model"]), 0, dict(recipe), path)
    found = search.near(args, run)
    chosen = search.even(found, target.teacher(run.model).shape)
    print(f"search chooses between {len(found):,} shapes near the budget, {args.budget}. As one of them:\n")
    return {**recipe, "prune": {**prune, "target": dict(chosen.target)}}


def as_drafted(model: str, args: argparse.Namespace, overrides: Mapping[str, Any], machine: Machine) -> Mapping[str, Any]:
    """Return the recipe that `init` would write for a model, and say so."""
    if overrides:
        raise RecipeError(f"--{next(iter(overrides))} is a setting of a recipe, and {model} is a model: write one with init")
    share = share_of(args.keep or "50%", "--keep")
    text = draft(model, share, machine)
    print(f"{model}, {share:.0%} of its parameters, as hf-minitron init {model} --keep {share:.0%} writes it\n")
    return read_yaml(text, model)


def plan_text(recipe: Mapping[str, Any], context: int | None = None) -> str:
    """Say what the target shape costs beside the teacher, from `config.json` alone; at a context of so many tokens as well."""
    if context is not None and context < 1:
        raise RecipeError(f"--context: {context} is not a number of tokens from 1 on")
    args, model = arguments(recipe.get("prune") or {}, "prune", target.Args), str(recipe["model"])
    before, after, rows = target.shapes(args, model)
    stored = target.teacher(model, args.dequantize).config.dtype or torch.float32
    size = stored.itemsize

    def costs(shape: Shape, rows: Mapping[str, str]) -> dict[str, int]:
        parameters = shape.num_parameters(rows)
        found = shape.axes | {
            "parameters": parameters,
            f"bytes ({str(stored).removeprefix('torch.')})": parameters * size,
            "KV-cache bytes per token": shape.kv_cache_bytes_per_token(size),
            "FLOPs per token": shape.flops_per_token(rows),
        }
        if context:
            found[f"cache bytes at {context:,} tokens"] = shape.cache_bytes(context, size)
            found[f"FLOPs per token at {context:,} tokens"] = shape.flops_per_token(rows, context)
        return found | ({"state bytes": shape.state_bytes(size)} if shape.states else {})

    table = [["", "before", "after", ""]]
    for (name, old), new in zip(
        costs(before, rows).items(), costs(after, target.student_rows(args, model)).values(), strict=True
    ):
        table.append([name, f"{old:,}", f"{new:,}", "" if old == new else f"{new / old - 1:+.1%}"])
    inexact = target.inexact(args, model, before, after)
    if args.nonuniform is not None:
        share = f"{args.nonuniform:.0%} of the layers' parameters stay"
        alike = "heads" not in target.differing(args, model)
        inexact = {
            "nonuniform": f"{share}; score says where, so the table above shows the teacher twice",
            "vllm": VLLM if alike else f"{VLLM}, not heads: set nonuniform_axes: [ffn], or it takes the student padded",
        } | inexact
    if target.uses_rotation(args):
        inexact = {"rotation": "unties the output head, so the student has a matrix of vocab x hidden more"} | inexact
    notes = [*inexact.items(), *target.unquantizable(before, after).items()]
    return markdown_table(table) + "".join(f"\n{axis}: {reason}" for axis, reason in notes)
