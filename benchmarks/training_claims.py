"""What the papers say about training pruned models, beside what a short training of SmolLM2-135M says.

    python benchmarks/training_claims.py ../shared/data runs/race      # an hour of a core; killed, it goes on

Two recipes for each claim, from the same text, with the same tokens and seed, and as many parameters where both are pruned: the
published recipe of `models.py`, changed in what the claim is about. Compared document by document on the race's test texts.
"""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import numpy as np
import race

from hf_minitron.environment import environment
from hf_minitron.json_files import write_whole
from hf_minitron.stages.search import start

RESULT = Path(__file__).with_name("results") / "training_claims.json"
FIRST, HALF = models.TRIED_WITH // models.BLOCK, models.TRIED_WITH // models.BLOCK // 2  # steps
STATES = {"distill": {"losses": {"forward_kl": 1.0, "block": 1.0, "embedding": 1.0}}}
HALF_OF_LAYERS = {"prune": {"target": {"layers": 15}}}
SMALL = {"prune": {"target": models.SIZES["70m"][0]["432x768"]}}
WRITTEN = {"tokens": models.TRIED_WITH, "prompts": models.PUBLISHED_TEXT, "prompt_tokens": 16, "max_new_tokens": 160}
# what the published recipe is changed to; of several, each begins with the student of the one before
Recipes = Sequence[Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the two ways that it speaks of.

    Args:
        says (`str`): The claim.
        paper (`str`): Its source.
        better (`tuple`): The name and the recipes of what is better by the claim, or as good.
        other (`tuple`): Those of the other.
    """

    says: str
    paper: str
    better: tuple[str, Recipes]
    other: tuple[str, Recipes]


PUBLISHED: tuple[str, Recipes] = ("width", [{}])
CLAIMS = (
    Claim(
        "width before depth",
        "2407.14679, practice 4; 2408.11796",
        PUBLISHED,
        ("depth", [{"prune": {"target": {"layers": 20}}}]),
    ),
    Claim(
        "half of the layers: states and embeddings help logits",
        "2407.14679, practice 6",
        ("half-states", [HALF_OF_LAYERS | STATES]),
        ("half-logits", [HALF_OF_LAYERS]),
    ),
    Claim(
        "width: logits alone are enough",
        "2407.14679, practice 7",
        PUBLISHED,
        ("width-states", [STATES]),
    ),
    Claim(
        "distillation, not labels",
        "2407.14679, practice 5",
        PUBLISHED,
        ("labels", [{"distill": {"losses": {"cross_entropy": 1.0}}}]),
    ),
    Claim(
        "135M to 100M to 70M, not at once",
        "2407.14679, practice 8",
        ("chain", [{"distill": {"max_steps": HALF}}, {**SMALL, "distill": {"max_steps": FIRST - HALF}}]),
        ("at-once", [SMALL]),
    ),
    Claim(
        "a corrected teacher",
        "2408.11796, teacher correction",
        ("corrected", [{"correct": {"max_steps": HALF, "learning_rate": 2e-5, "losses": {"cross_entropy": 1.0}}}]),
        PUBLISHED,
    ),
    Claim(
        "logits on the text, not labels on what the teacher wrote (SDG)",
        "2407.14679, practice 5",
        PUBLISHED,
        ("written", [{"synthesize": WRITTEN, "distill": {"text": "synthesized", "losses": {"cross_entropy": 1.0}}}]),
    ),
)


def main() -> None:
    """Make what is missing, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with text/ and tasks/")
    parser.add_argument("out", type=Path, help="the folder of models.py's runs")
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the result goes")
    args = parser.parse_args()
    args.out = args.out.resolve()
    texts = models.prepare(args.data.resolve(), args.out, args.model)
    for claim in CLAIMS:
        for name, recipes in (claim.better, claim.other):
            make(args.out, args.model, name, recipes, texts)
        save(args.out, texts, args.json)


def published() -> models.Entry:
    """Return the entry of the race whose recipe is changed."""
    size, (widths, _) = next(iter(models.SIZES.items()))
    return models.Entry(size, race.PUBLISHED, next(iter(widths)), models.TRIED_WITH, 0, next(iter(models.SETTINGS)))


def folder_of(name: str, step: int, steps: int) -> str:
    """Return the folder of a run below that of all."""
    return f"claims/{name}" if step == steps - 1 else f"claims/{name}-{step}"


def make(out: Path, model: str, name: str, recipes: Recipes, texts: dict[str, list[list[int]]]) -> None:
    """Make a student by recipes that follow each other, and measure it."""
    for step, changes in enumerate(recipes):
        recipe = models.recipe_of(out, model, published())
        for section, settings in changes.items():
            trained = recipe["distill"] if section == "correct" else {}
            recipe[section] = copy.deepcopy({**trained, **recipe.get(section, {}), **settings})
        if "synthesize" in recipe:
            recipe["synthesize"]["prompts"] = str(out / WRITTEN["prompts"])
        run = models.write_recipe(out, folder_of(name, step, len(recipes)), recipe)
        if step:
            models.do("score", run)
        else:
            scored = models.begin(out, model, published())
            start(run, scored, ("score",))
        for stage in ("prune", "correct", "synthesize", "distill"):
            if stage in recipe:
                models.do(stage, run)
        model = str(run.path("distill") / "student")
    models.measure(out, run, texts)


def save(out: Path, texts: dict[str, list[list[int]]], path: Path) -> None:
    """Write, for every claim of which both students are measured, the ratio of their perplexities on every test text."""
    found = []
    for claim in CLAIMS:
        losses = [models.measured(out, f"claims/{name}") for name, _ in (claim.better, claim.other)]
        if not all(losses):
            continue
        ratios = {}
        for text in models.TESTS:
            lengths = np.array([len(row) - 1 for row in texts[text]], dtype=float)
            better, other = ({models.TRIED_WITH: np.array(of[text])[None, :, 0]} for of in losses)
            (row,) = race.answers({race.PUBLISHED: other, "better": better}, lengths, [models.TRIED_WITH])["equal_tokens"]
            ratios[text] = {key: row[key] for key in ("ratio", "low", "high")}
        found.append({"says": claim.says, "paper": claim.paper, "better": claim.better[0], "other": claim.other[0],
                      "ratios": ratios})  # fmt: skip
    facts = {"environment": environment(), "tokens": models.TRIED_WITH, "seeds": 1, "claims": found}
    write_whole(path, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
