"""Write the figures of README and docs from what was measured: no number in them is typed by hand.

    python benchmarks/update_readme.py --run runs/smollm2-135m-width --chain runs/smollm2-135m-chain

Reads the run's report, plan and training log and `benchmarks/results/`; writes what stands between the markers
`<!-- NAME:begin -->` and `<!-- NAME:end -->`, copies the run's pictures beside its recipe and its card to `model_cards/`.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from claims import PAPER
from keep_cards import keep
from race_page import plot_race, race_block, table_block, widths_block

from hf_minitron import Report
from hf_minitron.evaluation.report import TEXT, Comparison
from hf_minitron.evaluation.wording import counted, measured, quality_rows, sentence, speed_rows
from hf_minitron.json_files import read_json
from hf_minitron.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "benchmarks/results/claims.json"
RACE, ECONOMY = ROOT / "benchmarks/results/race.json", ROOT / "benchmarks/results/economy.json"
TRAINING_CLAIMS = ROOT / "benchmarks/results/training_claims.json"
MODELS, SEARCH = ROOT / "benchmarks/results/models", ROOT / "benchmarks/results/search"


def turned(rows: list[list[str]]) -> list[list[str]]:
    """Return a table with a row for each of its columns, which is narrow where models are few."""
    return [list(column) for column in zip(*rows, strict=True)]


def demo_block(kept: Path, recipe: Path) -> str:
    """Return the demo's tables, pictures and times, from its kept card."""
    report, log, seconds = Report.load(kept / "report.json"), read_json(kept / "log.json"), seconds_of(kept)
    times = ", ".join(f"{stage} {time:.0f} s" for stage, time in seconds.items())
    picture = recipe.relative_to(ROOT)
    return "\n\n".join(
        [
            markdown_table(turned(quality_rows(report))),
            "Held-out text, ± standard error; *pruned* is the student before it learns, "
            f"*distilled* after {log['tokens']:,} tokens. Top-1 match: the share of tokens for which the teacher's first "
            "choice is the student's, too.",
            markdown_table(turned(speed_rows(report))),
            f"| what was cut | what was learnt |\n| --- | --- |\n| ![Sizes before and after]({picture}/shapes.png) "
            f"| ![Distillation loss]({picture}/loss.png) |",
            f"2 CPU cores, {sum(seconds.values()) / 60:.1f} minutes after installing: {times}.",
        ]
    )


def seconds_of(kept: Path) -> dict[str, float]:
    """Return what each stage of a kept run took."""
    return json.loads((kept / "card.json").read_text())["seconds"]


def expected_block(kept: Path, recipe: Path) -> str:
    """Return the table of the demo's recipe: sizes, tokens, and what to expect of it."""
    report, log = Report.load(kept / "report.json"), read_json(kept / "log.json")
    whole = yaml.safe_load((recipe / "recipe.yaml").read_text())
    distill = whole["distill"]
    rows = distill["per_device_train_batch_size"] * distill.get("gradient_accumulation_steps", 1)
    tokens = distill["max_steps"] * rows * distill["block_size"]
    sizes = [report.models[name]["parameters"] for name in ("teacher", "distilled")]
    expected = ", ".join(f"{measured(report.entry(name, 'perplexity'))} ({name})" for name in report.models)
    seconds = sum(seconds_of(kept).values())
    rows = [
        ["parameters", f"{sizes[0]:,} to {sizes[1]:,}"],
        ["tokens", f"{tokens / 1e3:.1f} k (fewer where `minutes: {whole['minutes']}` are too few)"],
        ["hardware", "2 CPU cores, no GPU"],
        ["expected", f"perplexity on held-out text {expected}, after {log['tokens'] / 1e3:.1f} k tokens"],
        ["source", "measured: the table in the main README and [its card](../../model_cards/smollm2-135m-width/README.md)"],
        ["run by us", f"yes, {seconds / 60:.1f} minutes"],
    ]
    return facts_table(rows)


def facts_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of two columns without titles."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)])


def chain_block(rounds: Sequence[Path]) -> str:
    """Return the table of a recipe of several rounds, from their runs."""
    reports = [Report.load(run / "evaluate/report.json") for run in rounds]
    logs = [read_json(run / "distill/log.json") for run in rounds]
    seconds = sum(read_json(path)["seconds"] for run in rounds for path in run.glob("*/done.json"))
    rows = []
    for run, report in zip(rounds, reports, strict=True):
        sizes = (report.models[name]["parameters"] for name in ("teacher", "distilled"))
        rows.append([f"parameters, `{run.name}.yaml`", " to ".join(f"{size:,}" for size in sizes)])
    rows.append(["tokens, each", " and ".join(dict.fromkeys(f"{log['tokens'] / 1e3:.1f} k" for log in logs))])
    rows.append(["hardware", "2 CPU cores, no GPU"])
    tasks = [entry.task for entry in reports[0].of_tasks("teacher") if entry.metric == "acc"]
    for metric, task in [("perplexity", TEXT), *(("acc", task) for task in tasks)]:
        values = [f"{measured(reports[0].entry('teacher', metric, task))} (teacher)"]
        for number, report in enumerate(reports, 1):
            pruned, distilled = (measured(report.entry(name, metric, task)) for name in ("pruned", "distilled"))
            values.append(f"{distilled} (round {number}; {pruned} before training)")
        rows.append([f"expected {metric}, {task}", ", ".join(values)])
    rows.append(["source", "measured: the reports of the rounds, ± standard error"])
    rows.append(["run by us", f"yes, {seconds / 60:.1f} minutes"])
    return facts_table(rows)


def benchmark_block(results: Path) -> str:
    """Return the benchmarks' ratios: what was measured, the command, and a line for each answer."""
    parts = []
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        if path in (CLAIMS, RACE, ECONOMY, TRAINING_CLAIMS):
            continue
        answers = "\n".join(f"- {answer}" for answer in found["result"].split("; "))
        parts.append(f"**{found['what'][0].upper()}{found['what'][1:]}** (`{found['command']}`)\n\n{answers}")
    return "\n\n".join(parts)


def claims_block(claims: dict) -> str:
    """Return the papers' claims beside ours: reductions, rounds of estimation, choices of layers."""
    order = sorted(claims["reductions"], key=claims["reductions"].get)
    paper = sorted(PAPER, key=PAPER.get)
    rows = [["metric", "perplexity", "place among the nine", "paper's loss", "paper's place"]]
    ours = [name for name in order if name in PAPER]
    for name in order:
        places = [str(ours.index(name) + 1), f"{PAPER[name]}", str(paper.index(name) + 1)] if name in PAPER else [""] * 3
        rows.append([f"`{name}`", f"{claims['reductions'][name]:,.1f}", *places])
    target = ", ".join(f"{axis} {size}" for axis, size in claims["target"].items())
    rounds = ", ".join(f"{count} round{'s' * (count != '1')} {value:,.1f}" for count, value in claims["rounds"].items())
    depth = [["8 of 30 layers dropped, chosen by", "perplexity"]]
    depth += [[name, f"{value:,.1f}"] for name, value in claims["depth"].items()]
    return (
        f"Cut to {target}; the teacher has {claims['teacher']}.\n\n{markdown_table(rows)}\n\n"
        f"Iterative estimation (ffn 768): {rounds}; the paper found no gain that lasts.\n\n{markdown_table(depth)}"
    )


def models_block(sizes: dict[str, tuple[Report, int]]) -> str:
    """Return one size after the other: the table of its models, their curves and the sentences."""
    parts = []
    for size, (report, tokens) in sizes.items():
        tasks = [entry.task for entry in report.of_tasks("teacher") if entry.metric == "acc"]
        columns = [(TEXT, "perplexity"), (TEXT, "teacher_kl"), *((task, "acc") for task in tasks)]
        rows = [["model", "parameters", "perplexity", "KL to teacher", *(task.removeprefix("local_") for task in tasks)]]
        for name, model in report.models.items():
            title = {"pruned": "ours, before training", "distilled": "**ours**"}.get(name, name)
            cells = [measured(report.entry(name, metric, task)) for task, metric in columns]
            rows.append([title, counted(model["parameters"]), *cells])
        said = [sentence(report, found) for found in asked(report)]
        parts += [
            f"**{size.upper()}**, {tokens:,} tokens; ± standard error",
            markdown_table(rows),
            f"![Distillation losses](../benchmarks/results/models/{size}.png)",
            "With all tokens, and with a third of them (*distilled* is ours):",
            "\n".join(f"- {words}" for words in said if " published " in f" {words}"),
            '<details markdown="1"><summary>The others</summary>',
            "\n".join(f"- {words}" for words in said if " published " not in f" {words}"),
            "</details>",
        ]
    return "\n\n".join(parts)


def asked(report: Report) -> list[Comparison]:
    """Return the comparisons by perplexity that answer the README's questions."""
    pairs = [("published", "distilled"), ("ours-third", "published"), ("nonuniform-third", "published")]
    pairs += [(name, "distilled") for name in report.models if name not in ("teacher", "pruned", "distilled", "published")]
    found = {(c.model, c.baseline): c for c in report.comparisons if (c.task, c.metric) == (TEXT, "perplexity")}
    return [found[pair] for pair in pairs]


def economy_block(found: list[dict]) -> str:
    """Return the ways of training that were tried, each beside the first of the same start and tokens."""
    ways = list(dict.fromkeys(row["way"] for row in found))
    columns = list(dict.fromkeys((row["size"], row["shape"], row["tokens"]) for row in found))
    values = {(row["way"], row["size"], row["shape"], row["tokens"]): row for row in found}
    rows = [["way", *(f"{size.upper()} {shape}, {tokens:,} tokens" for size, shape, tokens in columns)]]
    for way in ways:
        of = [values.get((way, *column)) for column in columns]
        rows.append([way, *("" if row is None else f"{row['validation']:.1f}{tokens_beside(row)}" for row in of)])
    return markdown_table(rows)


def training_claims_block(found: dict) -> str:
    """Return what the papers say about training, and the ratio of the perplexities that we measured for it."""
    texts = list(found["claims"][0]["ratios"])
    first, *others = texts
    rows = [["paper says", "ratio", "we measured", *others]]
    for claim in found["claims"]:
        ratios = claim["ratios"]
        cells = [f"{ratios[text]['ratio']:.2f}" for text in others]
        rows.append([f"{claim['says']} ({claim['paper']})", interval_of(ratios[first]), verdict(ratios[first]), *cells])
    return (
        f"Perplexity on {first} of what the paper finds better over that of the other, after {found['tokens']:,} tokens, one "
        f"seed, with a 95 % interval over documents; the last columns are the ratios on other texts.\n\n{markdown_table(rows)}"
    )


def interval_of(row: dict) -> str:
    """Return a ratio with its interval."""
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def verdict(row: dict) -> str:
    """Say in words what an interval of a ratio says."""
    if row["high"] < 1:
        return "the same"
    return "the other way" if row["low"] > 1 else "no difference"


def tokens_beside(row: dict) -> str:
    """Say which tokens of a row are not what its column says: fewer different ones, or such that sublayers were tuned with."""
    tuned = row.get("tuning_tokens", 0)
    different = f" ({row['unique_tokens']:,} different)" if row["unique_tokens"] < row["tokens"] else ""
    return different + (f" (and {tuned:,} for each sublayer before)" if tuned else "")


def main() -> None:
    """Rewrite the blocks; the demo's card first where its run is there, the race's where it was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/smollm2-135m-width")
    parser.add_argument("--chain", type=Path, default=ROOT / "runs/smollm2-135m-chain")
    args = parser.parse_args()
    run = args.run.resolve()
    blocks = {"benchmarks": benchmark_block(CLAIMS.parent), "search": (SEARCH / "ranking.md").read_text().strip()}
    blocks["claims"] = claims_block(json.loads(CLAIMS.read_text()))
    if RACE.is_file() and (race := json.loads(RACE.read_text()))["rows"]:
        blocks |= {"race": race_block(race), "race_table": table_block(race), "widths": widths_block(race)}
        plot_race(race, RACE.with_suffix(".png"))
    if ECONOMY.is_file():
        blocks["economy"] = economy_block(json.loads(ECONOMY.read_text()))
    if TRAINING_CLAIMS.is_file():
        blocks["training_claims"] = training_claims_block(json.loads(TRAINING_CLAIMS.read_text()))
    cards = {path.stem: ROOT / f"model_cards/smollm2-135m-{path.stem}/report.json" for path in sorted(MODELS.glob("*.json"))}
    tokens = {size: json.loads((MODELS / f"{size}.json").read_text())["tokens"] for size in cards}
    models = {size: (Report.load(path), tokens[size]) for size, path in cards.items()}
    blocks["models"] = models_block(models)
    recipe, kept = ROOT / "recipes" / run.name, ROOT / "model_cards" / run.name
    if run.is_dir():
        for name in ("loss.png", "shapes.png"):
            shutil.copyfile(run / "publish/model" / name, ROOT / "recipes" / run.name / name)
        keep(run, run.name)
    blocks |= {"demo": demo_block(kept, recipe), "expected": expected_block(kept, recipe)}
    if args.chain.is_dir():
        blocks["chain"] = chain_block([args.chain / name for name in ("first", "second")])
    for name, block in blocks.items():
        write_block(name, block)


def write_block(name: str, block: str) -> None:
    """Write what stands between two markers, in the one file that has them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]
    (path,) = (path for path in pages if begin in path.read_text(encoding="utf-8"))
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
