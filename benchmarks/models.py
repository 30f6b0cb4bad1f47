"""The race: how many tokens do our students need for what the published recipe makes of all of them?

    python benchmarks/models.py ../shared/data runs/race              # days on 2 cores; killed, it goes on where it was
    python benchmarks/models.py ../shared/data runs/race --hours 2    # no run is begun after two hours
    python benchmarks/models.py ../shared/data runs/race --only '100m/published*' --budget 12288
    benchmarks/gpu.sh OUT race ../shared/data                         # a million tokens and more, in minutes

SmolLM2-135M to two sizes in three shapes: as the papers do it, ours uniform, and ours nonuniform, each with several budgets of
tokens and seeds. Every model is a recipe that the `hf-minitron` command runs in a folder of its own; those that differ in
their tokens alone share scores and pruned weights. Trained and calibrated on web, questions and answers, and code; tested on
documents held out of each, and on books and documentation that neither training nor calibration has read. How wide a student
is, is tried with few tokens, and how fast it learns with every budget; both are chosen for every recipe and size, the
published one too, by the loss on a validation split that is apart from all test text.

The cheapest runs come first, and what is known is written to `benchmarks/results/race.json` after every one, with the losses
of every run: on another machine the same command goes on from that file. The file belongs to one version of the code, for what
a student was made with is not looked at again once it is measured: remove it when the code makes other students.
"""

import argparse
import fnmatch
import itertools
import json
import pydoc_data.topics
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import race
import torch
import yaml
from filelock import FileLock
from transformers import AutoTokenizer

from hf_minitron import load_text
from hf_minitron.__main__ import main as command
from hf_minitron.checkpoint.checkpoint import best_device, best_dtype, load_model
from hf_minitron.environment import environment
from hf_minitron.evaluation.text import read_text
from hf_minitron.evaluation.text_metrics import TEXT_METRICS
from hf_minitron.json_files import read_json, write_whole
from hf_minitron.recipe import load_recipe
from hf_minitron.run import Run
from hf_minitron.stages.every import STAGES
from hf_minitron.stages.search import start

BLOCK = 256
# Widths of a size, hidden x ffn, the first as the papers cut both; and the share of the layers' parameters that a nonuniform
# student of that size has.
SIZES: dict[str, tuple[dict[str, dict[str, int]], float]] = {
    "100m": (
        {"504x1152": {"hidden": 504, "ffn": 1152}, "544x992": {"hidden": 544, "ffn": 992}, "576x864": {"ffn": 864}},
        0.675,
    ),
    "70m": (
        {"432x768": {"hidden": 432, "ffn": 768}, "512x480": {"hidden": 512, "ffn": 480}, "576x320": {"ffn": 320}},
        0.393,
    ),
}
SHAPES = (race.PUBLISHED, "uniform", NONUNIFORM := "nonuniform")
OURS = "ours"
# How a student is trained, beyond what all have: learning rate, then sequences a step. `economy.py` compares more ways with
# fewer tokens.
SETTINGS: dict[str, dict[str, Any]] = {
    name: {
        "per_device_train_batch_size": int(rows or 1),
        "learning_rate": float(rate),
        "lr_scheduler_type": "linear",
    }
    for name in ("3e-4", "1.5e-4", "6e-4", "1e-3x16", "5e-4x16", "1e-3x64")
    for rate, _, rows in [name.partition("x")]
}
# Tokens that a student is trained with, and the settings that are tried with them: those named, or so many, the best of the
# budget before. A curve begins at less than a tenth of the least that is asked about.
TRIED: dict[int, int | tuple[str, ...]] = {
    **dict.fromkeys((1_024, 4_096, 12_288), ("3e-4", "1.5e-4", "6e-4")),
    36_864: 2,
    122_880: 1,
    368_640: 1,
    983_040: ("1e-3x16", "5e-4x16"),
    2_949_120: 1,
    9_830_400: ("1e-3x64",),
}
BUDGETS = tuple(TRIED)
ON_CPU = BUDGETS[:6]  # what two cores do in days
ASKED = tuple(budget for budget in BUDGETS if budget >= 12_288)  # budgets of the published recipe
SEEDS = {budget: (0, 1, 2) if budget <= 36_864 else (0,) for budget in BUDGETS}
TRIED_WITH = 12_288  # tokens with which widths are tried
TRAINING = ("c4_1", "stackexchange", "code")
# Tokens of the calibration: what ours is fitted on, and an eighth of it, with which the published recipe scores as well.
CALIBRATION = {OURS: {"tokens": 131_072}, race.PUBLISHED: {"tokens": 16_384}}
PIECES = {OURS: 600, race.PUBLISHED: 40}  # of every source, of 2,000 characters
PUBLISHED_TEXT = "calibration-published.jsonl"
# What they are read from. Ours takes as many tokens of every source, of as many documents as there are.
TEXTS = {OURS: tuple(f"calibration-{name}.jsonl" for name in TRAINING), race.PUBLISHED: (PUBLISHED_TEXT,)}
TESTS = ("c4_2", "stackexchange", "code", "books", "documentation")
VALIDATION = "validation"
DOCUMENTS = {"c4_2": 32, VALIDATION: 24}  # of a text; of the others 16
MEASURED = "measured.json"
RESULT = Path(__file__).with_name("results") / "race.json"


@dataclass(frozen=True)
class Entry:
    """A student of the race.

    Args:
        size (`str`): A key of `SIZES`.
        shape (`str`): One of `SHAPES`.
        width (`str`): Of `SIZES`; the shape itself where layers differ.
        budget (`int`): Tokens that it is trained with.
        seed (`int`): Of calibration, training text and order.
        setting (`str`): A key of `SETTINGS`.
    """

    size: str
    shape: str
    width: str
    budget: int
    seed: int
    setting: str

    @property
    def name(self) -> str:
        """Its folder below that of all runs."""
        return f"{self.size}/{self.kind}-{self.budget}-{self.setting}-{self.seed}"

    @property
    def pruned(self) -> str:
        """The folder of the run whose pruned weights it shares with other budgets."""
        return f"{self.size}/{self.kind}-pruned-{self.seed}"

    @property
    def scores(self) -> str:
        """The folder of the run whose scores it shares with other sizes and shapes."""
        return f"scores/{self.recipe}-{self.seed}"

    @property
    def recipe(self) -> str:
        """A key of `CALIBRATION`."""
        return race.PUBLISHED if self.shape == race.PUBLISHED else OURS

    @property
    def kind(self) -> str:
        """The recipe, and the width where all layers have one."""
        return self.shape if self.width == self.shape else f"{self.shape}-{self.width}"


def main() -> None:
    """Make what is missing, the cheapest first, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with text/ and tasks/")
    parser.add_argument("out", type=Path, help="where the runs go")
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--only", default="*", help="a pattern of names, such as '70m/nonuniform-*'")
    parser.add_argument("--budget", type=int, choices=BUDGETS, nargs="+", default=ON_CPU, help="tokens")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the result goes")
    args = parser.parse_args()
    args.data, args.out, begun = args.data.resolve(), args.out.resolve(), time.monotonic()
    texts = prepare(args.data, args.out, args.model)
    restore(args.out, texts, args.json)
    while (found := following(args.out, args.only, args.budget)) is not None:
        entry, names = found
        if time.monotonic() - begun > args.hours * 3600:
            print(f"{args.hours:g} hours are over; the same command goes on with {entry.name}")
            break
        make(args.out, args.model, entry, {name: texts[name] for name in names})
        save(args.out, texts, args.json)
    save(args.out, texts, args.json)


def following(out: Path, only: str, budgets: Sequence[int]) -> tuple[Entry, Sequence[str]] | None:
    """Return the cheapest run of which something is missing, and the texts that it is measured on.

    Settings are tried before what depends on them, and look at no test text.
    """
    wanted = [(entry, (VALIDATION,)) for entry in trials(out)] + [(entry, (VALIDATION, *TESTS)) for entry in entries(out)]
    for entry, names in sorted(wanted, key=lambda one: one[0].budget * (1 + 3 * one[0].seed)):
        asked = fnmatch.fnmatch(entry.name, only) and entry.budget in budgets
        if asked and not set(names) <= measured(out, entry.name).keys():
            return entry, names
    return None


def measured(out: Path, name: str) -> dict[str, list[list[float]]]:
    """Return the loss and the tokens of every document that a run was measured on, by text."""
    path = out / name / MEASURED
    return read_json(path)["losses"] if path.is_file() else {}


def trials(out: Path) -> Iterator[Entry]:
    """Yield the runs that are tried: every width with the first setting, and settings with the best width and every budget."""
    for size, shape in itertools.product(SIZES, SHAPES):
        yield from widths_of(size, shape)
        for budget in BUDGETS:
            yield from settings_of(out, size, shape, budget)


def widths_of(size: str, shape: str) -> list[Entry]:
    """Return the runs that choose the width of a recipe."""
    widths = [shape] if shape == NONUNIFORM else SIZES[size][0]
    return [Entry(size, shape, width, TRIED_WITH, 0, next(iter(SETTINGS))) for width in widths]


def settings_of(out: Path, size: str, shape: str, budget: int) -> list[Entry]:
    """Return the runs that choose the setting of a budget; none while what they depend on is not known."""
    widths = widths_of(size, shape)
    if any(validation_loss(out, entry) is None for entry in widths):
        return []
    asked = TRIED[budget]
    if isinstance(asked, int):
        below = settings_of(out, size, shape, BUDGETS[BUDGETS.index(budget) - 1])
        losses = {entry.setting: validation_loss(out, entry) for entry in below}
        if not losses or None in losses.values():
            return []
        asked = tuple(sorted(losses, key=losses.__getitem__)[:asked])
    return [replace(best_of(out, widths), budget=budget, setting=setting) for setting in asked]


def entries(out: Path) -> list[Entry]:
    """Return the runs of the race as far as their settings are chosen; the first seed of each is one that was tried."""
    found = ((chosen(out, *one), one[-1]) for one in itertools.product(SIZES, SHAPES, BUDGETS))
    return [replace(best, seed=seed) for best, budget in found if best for seed in SEEDS[budget]]


def chosen(out: Path, size: str, shape: str, budget: int) -> Entry | None:
    """Return the trial whose setting has the least validation loss with a budget; `None` until all were made."""
    tried = settings_of(out, size, shape, budget)
    return best_of(out, tried) if all(validation_loss(out, entry) is not None for entry in tried) else None


def best_of(out: Path, tried: Iterable[Entry]) -> Entry | None:
    """Return the one with the least loss on the validation split of those that were made."""
    known = {entry: loss for entry in tried if (loss := validation_loss(out, entry)) is not None}
    return min(known, key=known.__getitem__, default=None)


def validation_loss(out: Path, entry: Entry) -> float | None:
    """Return a run's mean loss on the validation split; `None` where it was not made yet."""
    table = np.array(measured(out, entry.name).get(VALIDATION, ()))
    return float(table[:, 0].sum() / table[:, 1].sum()) if len(table) else None


def prepare(data: Path, out: Path, model: str) -> dict[str, list[list[int]]]:
    """Write what is trained on and calibrated with; return the tokens of every test text's documents, and of validation.

    The parts are the same whenever they are made. The calibration has pieces of the training text of every source.
    """
    out.mkdir(parents=True, exist_ok=True)
    held_out: dict[str, list[str]] = {VALIDATION: [], "c4_2": load_text(str(data / "text/c4_2.jsonl"))["text"]}
    mixed: list[str] = []
    for name in TRAINING:
        documents = load_text(str(data / f"text/{name}.jsonl")).shuffle(seed=0)["text"]
        tested = min(len(documents) // 5, 100)
        held_out[name], rest = documents[:tested], documents[tested:]
        few = len(rest) // 10
        held_out[VALIDATION] += rest[:few][:8]
        pieces = [(place, n, document[place : place + 2_000])
                  for n, document in enumerate(rest[few:]) for place in range(0, len(document), 2_000)]  # fmt: skip
        mixed += [piece for *_, piece in pieces[: PIECES[race.PUBLISHED]]]
        write_once(out / f"{name}.jsonl", rest[few:])
        write_once(out / f"calibration-{name}.jsonl", [piece for *_, piece in sorted(pieces)[: PIECES[OURS]]])
    write_once(out / PUBLISHED_TEXT, mixed)
    lines = (data / "tasks/lambada_openai.jsonl").read_text(encoding="utf-8").splitlines()
    held_out["books"] = [f"{row['context']} {row['continuation']}" for row in map(json.loads, lines[:100])]
    held_out["documentation"] = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    tokenizer = AutoTokenizer.from_pretrained(Path(model).expanduser())
    return {name: rows_of(held_out[name], tokenizer, DOCUMENTS.get(name, 16)) for name in (VALIDATION, *TESTS)}


def rows_of(documents: Sequence[str], tokenizer: Any, count: int) -> list[list[int]]:
    """Return the beginnings of the first documents that are no mere title."""
    rows = (tokenizer(document)["input_ids"][:BLOCK] for document in documents)
    return [row for row in rows if len(row) >= 64][: count if documents else None]


def write_once(path: Path, documents: Sequence[str]) -> None:
    """Write a text, unless it is there."""
    if not path.is_file():
        write_whole(path, "".join(json.dumps({"text": document}) + "\n" for document in documents))


def recipe_of(out: Path, model: str, entry: Entry) -> dict[str, Any]:
    """Return a student's recipe."""
    widths, share = SIZES[entry.size]
    texts = {str(out / name): 1.0 for name in TEXTS[entry.recipe]}
    score = {"text": texts, **CALIBRATION[entry.recipe], "layers_limit": 4}
    ours: dict[str, Any] = {"sequential": True}
    if entry.shape == race.PUBLISHED:
        score |= {"metric": "l2_mean", "moments": False}
        ours = {"corrections": []}
    else:
        ours["sequential_tokens"] = CALIBRATION[OURS]["tokens"]
        score |= {"metric": {"ffn": "contribution", "heads": "contribution"}, "sublayers": True}
    nonuniform = {"target": {}, "nonuniform": share}
    prune = ours | (nonuniform if entry.shape == NONUNIFORM else {"target": widths[entry.width]})
    setting = SETTINGS[entry.setting]
    steps = entry.budget // (BLOCK * setting["per_device_train_batch_size"])
    return {
        "model": model,
        "seed": entry.seed,
        "score": score,
        "prune": prune,
        "distill": {
            "text": {str(out / f"{name}.jsonl"): 1.0 for name in TRAINING},
            "block_size": BLOCK,
            "max_steps": steps,
            "warmup_steps": 0.05,
            "max_grad_norm": 1.0,
            "logging_steps": max(steps // 24, 1),
            "logging_first_step": True,
            "save_steps": max(steps // min(max(entry.budget // 12_288, 1), 30), 1),
            "save_total_limit": 1,
            "report_to": "none",
            **setting,
        },
    }


def write_recipe(out: Path, name: str, recipe: dict[str, Any]) -> Run:
    """Write a recipe beside the folder of its run, and read it as the command does."""
    path = out / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**recipe, "run": str(out / name)}, sort_keys=False), encoding="utf-8")
    return load_recipe(path, {}, {name: stage.args for name, stage in STAGES.items()})


def make(out: Path, model: str, entry: Entry, texts: dict[str, list[list[int]]]) -> None:
    """Score, prune, distill and measure; what is finished is skipped."""
    pruned = begin(out, model, entry)
    run = write_recipe(out, entry.name, recipe_of(out, model, entry))
    start(run, pruned, ("score", "prune"))
    do("distill", run)
    measure(out, run, texts)


def begin(out: Path, model: str, entry: Entry) -> Run:
    """Score and prune, once for all that differ in their training alone; return that run."""
    score, prune = recipe_of(out, model, entry), recipe_of(out, model, entry)
    del score["prune"], score["distill"], prune["distill"]
    scored, pruned = write_recipe(out, entry.scores, score), write_recipe(out, entry.pruned, prune)
    with FileLock(f"{scored.folder}.lock"):  # others that go on side by side wait for what they share
        do("score", scored)
    with FileLock(f"{pruned.folder}.lock"):
        start(pruned, scored, ("score",))
        do("prune", pruned)
    return pruned


def do(stage: str, run: Run) -> None:
    """Run a stage as the command does."""
    if command([stage, str(run.recipe_path)]):
        raise SystemExit(f"{run.recipe_path}: {stage} has failed; the same command goes on from there")


def measure(out: Path, run: Run, texts: dict[str, list[list[int]]]) -> None:
    """Write the negative log-likelihood and the tokens of every document, for a distilled student."""
    losses = measured(out, str(run.folder.relative_to(out)))
    if texts.keys() <= losses.keys():
        return
    device = best_device()
    model = load_model(run.path("distill") / "student", best_dtype(device), device)
    for name, rows in texts.items():
        if name not in losses:
            sums, _ = read_text(model, rows, description=name, metrics=TEXT_METRICS[:1])
            values = -sums[TEXT_METRICS[0].name]
            losses[name] = [[float(value), len(row) - 1] for value, row in zip(values, rows, strict=True)]
    facts = {"parameters": model.num_parameters(), "losses": losses}
    write_whole(run.folder / MEASURED, json.dumps(facts) + "\n")
    means = {name: np.exp(sum(v for v, _ in rows) / sum(n for _, n in rows)) for name, rows in losses.items()}
    print(run.folder.name, *(f"{name} {mean:.2f}" for name, mean in means.items()), flush=True)


def save(out: Path, texts: dict[str, list[list[int]]], path: Path) -> None:
    """Write the answers on every text, the settings tried and the hours that all of it took.

    A size of which nothing was measured here keeps what the file says of it.
    """
    known = read_json(path) if path.is_file() else {}
    found: dict[str, list[dict]] = {"rows": [], "other_texts": [], "equal_tokens": [], "curves": []}
    every = entries(out)
    for size in SIZES:
        for text in TESTS:
            lengths = np.array([len(row) - 1 for row in texts[text]], dtype=float)
            curves = {shape: curve(out, every, size, shape, text) for shape in SHAPES}
            for key, rows in race.answers(curves, lengths, ASKED).items():
                kept = "other_texts" if key == "rows" and text != TESTS[0] else key
                found[kept] += [{"size": size, "text": text, **row} for row in rows]
    best = {entry for one in itertools.product(SIZES, SHAPES, BUDGETS) if (entry := chosen(out, *one))}
    tried = [{"size": entry.size, "shape": entry.shape, "width": entry.width, "budget": entry.budget, "setting": entry.setting,
              "chosen": entry in best, "validation_perplexity": float(np.exp(loss))}
             for entry in dict.fromkeys(trials(out)) if (loss := validation_loss(out, entry)) is not None]  # fmt: skip
    here = {row["size"] for row in tried}
    for key, rows in (found | {"tried": tried}).items():
        rows += [row for row in known.get(key, ()) if row["size"] not in here]
    seconds, used = known.get("seconds", {}), environment()
    elsewhere = set().union(*(of for hardware, of in seconds.items() if hardware != used["hardware"]))
    if own := {name: value for name, value in seconds_of(out).items() if name not in elsewhere}:
        seconds[used["hardware"]] = seconds.get(used["hardware"], {}) | own
    whole = {"environment": used, "threads": torch.get_num_threads(),
             "hours": {hardware: sum(of.values()) / 3600 for hardware, of in seconds.items()},
             "settings": SETTINGS, "calibration": {recipe: of["tokens"] for recipe, of in CALIBRATION.items()},
             "tried_with": TRIED_WITH, "tried": tried, **found, "seconds": seconds,
             "runs": runs_of(out)}  # fmt: skip
    write_whole(path, re.sub(r"\n {3,}", "", json.dumps(whole, indent=1)) + "\n")


def seconds_of(out: Path) -> dict[str, float]:
    """Return how long every stage took, by its folder; a stage that runs share is one file, and counts once, where it was made.

    Runs that share it have longer names.
    """
    done = {path.stat().st_ino: path for path in sorted(out.glob("*/*/*/done.json"), key=lambda path: -len(str(path)))}
    return {str(path.parent.relative_to(out)): read_json(path)["seconds"] for path in done.values()}


def runs_of(out: Path) -> dict[str, dict[str, list[float]]]:
    """Return the loss of every document that a run was measured on, by run and text."""
    names = sorted(str(path.parent.relative_to(out)) for path in out.glob(f"*/*/{MEASURED}"))
    return {name: {text: [round(loss, 3) for loss, _ in rows] for text, rows in measured(out, name).items()} for name in names}


def restore(out: Path, texts: dict[str, list[list[int]]], path: Path) -> None:
    """Take the runs that a result knows and `out` does not have, for the machine that made them may be gone."""
    known = read_json(path).get("runs", {}) if path.is_file() else {}
    for name, losses in known.items():
        if not (file := out / name / MEASURED).is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = {
                text: [[loss, len(row) - 1] for loss, row in zip(sums, texts[text], strict=True)]
                for text, sums in losses.items()
            }
            write_whole(file, json.dumps({"losses": rows}) + "\n")


def curve(out: Path, every: Sequence[Entry], size: str, shape: str, text: str) -> dict[int, np.ndarray]:
    """Return what was measured of one recipe: tokens to losses of shape `(seeds, documents)`."""
    found: dict[int, list[np.ndarray]] = {}
    for entry in sorted(every, key=lambda entry: (entry.budget, entry.seed)):
        losses = measured(out, entry.name) if (entry.size, entry.shape) == (size, shape) else {}
        if text in losses:
            found.setdefault(entry.budget, []).append(np.array(losses[text])[:, 0])
    return {budget: np.stack(losses) for budget, losses in found.items()}


if __name__ == "__main__":
    main()
