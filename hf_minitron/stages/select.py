"""select: rank the candidates of a search by what they are worth after their short distillation."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from hf_minitron.evaluation.report import Entry, Report
from hf_minitron.evaluation.wording import counted, measured
from hf_minitron.hub.plots import plot_sizes
from hf_minitron.recipe import bind
from hf_minitron.recipe_file import read_yaml
from hf_minitron.run import RecipeError, Run, damaged, done_digest
from hf_minitron.stage import Stage
from hf_minitron.stages import distill, evaluate, prune, score, search
from hf_minitron.tables import markdown_table
from hf_minitron.yaml_text import dump_yaml

CANDIDATE = (score.STAGE, prune.STAGE, distill.STAGE, evaluate.STAGE)


@dataclass(frozen=True)
class Args:
    """The `select:` section: there is nothing to set."""


def check(args: Args, run: Run) -> None:
    """Refuse to rank nothing."""
    if done_digest(run.path("search")) and not any(finished(child) for child in candidates(run).values()):
        raise RecipeError("no candidate is finished yet:\n" + _commands(run, list(candidates(run))))


def candidates(run: Run) -> dict[str, Run]:
    """Return name and run of the candidates that the last search named, their recipes as they are now."""
    runs = {}
    for entry in search.load(run)["candidates"]:
        folder = run.folder / search.FOLDER / entry["name"]
        path = folder / "recipe.yaml"
        recipe = read_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}
        runs[entry["name"]] = Run(folder, str(recipe.get("model")), recipe.get("seed", 0), recipe, path, run.sections)
    return runs


def finished(child: Run) -> bool:
    """Return whether a candidate is evaluated, and all of it done as its recipe says."""
    return all(
        done_digest(child.path(stage.name)) == child.digest(stage.name, stage.needs_in(child))
        and damaged(child.path(stage.name)) is None
        for stage in CANDIDATE
    )


def run(args: Args, run: Run, out: Path) -> None:
    """Write `ranking.json`, `ranking.md`, `candidates.png` and `best.yaml`."""
    shapes, runs = search.load(run)["candidates"], candidates(run)
    reports = {name: Report.load(child.path("evaluate") / "report.json") for name, child in runs.items() if finished(child)}
    entries = []
    for by_score, entry in enumerate(shapes, 1):
        if entry["name"] in reports:
            report = reports[entry["name"]]
            facts = {key: entry[key] for key in ("name", "target", "score")} | {"rank_by_score": by_score}
            facts["parameters"] = report.models["distilled"]["parameters"]
            facts |= {name: vars(report.entry(name, "perplexity")) for name in ("pruned", "distilled")}
            entries.append(facts)
    pruned = sorted(entry["pruned"]["value"] for entry in entries)
    entries = [entry | {"rank_pruned": pruned.index(entry["pruned"]["value"]) + 1} for entry in entries]
    entries.sort(key=lambda entry: entry["distilled"]["value"])
    unfinished = [name for name in runs if name not in reports]
    content = {"ranking": entries, "unfinished": unfinished}
    (out / "ranking.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    text = markdown_table(_rows(entries))
    if unfinished:
        text += "\n\nNot finished:\n\n" + _commands(run, unfinished)
    (out / "ranking.md").write_text(text + "\n", encoding="utf-8")
    points = {e["name"]: (e["parameters"], e["distilled"]["value"], *(e["distilled"]["interval"] or ())) for e in entries}
    plot_sizes(points, out / "candidates.png", "perplexity", marked=entries[0]["name"])
    best = _best(run, entries[0])
    (out / "best.yaml").write_text(dump_yaml(dict(best.recipe)), encoding="utf-8")


def report(run: Run) -> str:
    """Return the ranking, and start the run of the best with the finished scores."""
    best = _best(run, json.loads((run.path("select") / "ranking.json").read_text(encoding="utf-8"))["ranking"][0])
    search.start(best, run)
    return (run.path("select") / "ranking.md").read_text(encoding="utf-8") + f"\nThe best: hf-minitron run {best.recipe_path}"


def _best(run: Run, entry: dict) -> Run:
    """Return the full run of a candidate; each has a folder of its own, so that another winner replaces nothing."""
    folder = run.folder / "best" / entry["name"]
    recipe = search.child_recipe(run, folder, entry["target"], bind(run, "search", search.Args))
    return dataclasses.replace(run, folder=folder, recipe=recipe, recipe_path=run.path("select") / "best.yaml")


def _rows(entries: list[dict]) -> list[list[str]]:
    rows = [["candidate", "parameters", "perplexity pruned", "perplexity distilled", "rank by score", "rank pruned"]]
    for entry in entries:
        perplexities = [measured(Entry(**entry[name])) for name in ("pruned", "distilled")]
        cells = [counted(entry["parameters"]), *perplexities]
        rows.append([entry["name"], *cells, str(entry["rank_by_score"]), str(entry["rank_pruned"])])
    return rows


def _commands(run: Run, names: list[str]) -> str:
    return "\n".join(f"    hf-minitron run {run.folder / search.FOLDER / name / 'recipe.yaml'}" for name in names)


STAGE = Stage("select", __doc__, Args, check, run, needs=("search",), in_run=False, always=True, report=report)
