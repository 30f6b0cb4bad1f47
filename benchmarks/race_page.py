"""The race's sentences and curves for the README and its table for docs/, from `benchmarks/results/race.json` alone."""

import statistics
from collections.abc import Iterable
from pathlib import Path

import race
from matplotlib import pyplot as plt

from hf_minitron.hub import plots
from hf_minitron.tables import markdown_table

FIRST_TEXT = "c4_2"  # of the test texts
COLORS = {"published": plots.BEFORE, "uniform": plots.AFTER, "nonuniform": plots.LINES[0]}


def race_block(found: dict) -> str:
    """Return the race's answer in a sentence for each size, and the curves."""
    sizes = sorted({row["size"] for row in found["rows"]}, key=millions, reverse=True)
    said = "\n".join(f"- {sentence_of(found, size)}" for size in sizes)
    more = f"{before_training(found)} {worst_text(found['equal_tokens'])}"
    return f"![Perplexity against tokens](benchmarks/results/race.png)\n\n{said}\n\n{more}"


def sentence_of(found: dict, size: str) -> str:
    """Say what a size needs for what the published recipe makes of the most tokens and of the fewest that were asked about.

    Of the most that ours was trained with, too.
    """
    most = max(budget for of, shape, budget in points_of(found) if of == size and shape != race.PUBLISHED)
    rows = ordered(row for row in found["rows"] if row["size"] == size and row["budget"] <= most)
    least = fewest(found)
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    said = []
    for budget in dict.fromkeys((budgets[0], budgets[-1])):
        of = [f"{row['shape']} {needed(row, least)}" for row in rows if row["budget"] == budget]
        said.append(f"with {budget:,} tokens, ours needs of them {', '.join(of)}")
    return f"{size.upper()}: to equal the published recipe {'; '.join(said)}."


def table_block(found: dict) -> str:
    """Return the race's table, what both were chosen from, and where ours is worst."""
    points, least = points_of(found), fewest(found)
    rows = [["published recipe", "its perplexity", "ours", "perplexity", "tokens ours needs for that"]]
    for row in ordered(found["rows"]):
        size, shape, budget = (row[key] for key in ("size", "shape", "budget"))
        published, ours = (perplexity_of(points.get((size, of, budget))) for of in ("published", shape))
        rows.append([f"{size.upper()}, {budget:,} tokens", published, shape, ours, needed(row, least)])
    return "\n\n".join(
        [
            markdown_table(rows),
            f"Perplexity on {FIRST_TEXT}; the last column is a share of the published recipe's tokens, with 95 % intervals "
            f"over documents and seeds. {worst_text(found['equal_tokens'])} {before_training(found)} Every recipe's width "
            "(hidden x ffn) and learning "
            f"rate were chosen on a validation split: {chosen_of(found['tried'])}. {machines(found)}",
        ]
    )


def ordered(rows: Iterable[dict]) -> list[dict]:
    """Return rows of the race: the largest student first, then by tokens, the stock shape first."""
    return sorted(rows, key=lambda row: (-millions(row["size"]), row["budget"], row["shape"] != "uniform"))


def points_of(found: dict) -> dict[tuple[str, str, int], dict]:
    """Return the curves' points on the first text, by size, shape and tokens."""
    return {(row["size"], row["shape"], row["budget"]): row for row in found["curves"] if row["text"] == FIRST_TEXT}


def fewest(found: dict) -> dict[tuple[str, str], int]:
    """Return the fewest tokens that every size and shape was measured with."""
    least: dict[tuple[str, str], int] = {}
    for size, shape, budget in sorted(points_of(found)):
        least.setdefault((size, shape), budget)
    return least


def machines(found: dict) -> str:
    """Say what every kind of machine has trained, and its hours."""
    said = []
    for hardware, hours in found["hours"].items():
        budgets = {int(name.split("/")[1].split("-")[-4]) for name in of_stage(found["seconds"][hardware], "distill")}
        said.append(f"{hours:.1f} hours of {hardware}, {min(budgets):,} to {max(budgets):,} tokens")
    return f"{'; '.join(said)}."


def before_training(found: dict) -> str:
    """Say what is read before training, and how long that takes beside training, on the machine that most was trained on."""
    slowest = found["seconds"][max(found["hours"], key=found["hours"].__getitem__)]
    ours = {name: value for name, value in slowest.items() if f"/{race.PUBLISHED}" not in name}
    before = sum(max(of_stage(ours, stage).values()) for stage in ("score", "prune"))  # other widths were tried with less text
    trained = of_stage(ours, "distill").items()  # names end with the tokens, the rate and the seed
    each = statistics.median(value / int(name.split("/")[1].split("-")[-4]) for name, value in trained)
    read = found["calibration"]
    return (f"Before its training ours reads {read['ours']:,} tokens, once for all budgets, in forward passes alone, and takes "
            f"for scores and fits as long as for {before / each:,.0f} tokens of training; the published recipe scores with "
            f"{read[race.PUBLISHED]:,}.")  # fmt: skip


def of_stage(seconds: dict[str, float], stage: str) -> dict[str, float]:
    """Return the seconds of one stage, by its folder."""
    return {name: value for name, value in seconds.items() if name.endswith(f"/{stage}")}


def chosen_of(tried: list[dict]) -> str:
    """Return the widths that were chosen, and the rates with the budgets that each was the best of."""
    chosen: dict[str, dict[str, list[int]]] = {}
    for row in sorted((row for row in tried if row["chosen"]), key=lambda row: (-millions(row["size"]), row["budget"])):
        name = " ".join(dict.fromkeys([row["size"].upper(), row["shape"], row["width"]]))
        chosen.setdefault(name, {}).setdefault(row["setting"], []).append(row["budget"])
    return "; ".join(f"{name} at {rates_of(rates)}" for name, rates in chosen.items())


def rates_of(rates: dict[str, list[int]]) -> str:
    """Return the rates, where there are several with the budgets that each was chosen for."""
    if len(rates) == 1:
        return next(iter(rates))
    return ", ".join(f"{rate} ({' and '.join(f'{budget:,}' for budget in budgets)} tokens)" for rate, budgets in rates.items())


def widths_block(found: dict) -> str:
    """Return what every recipe makes of every width of a size, hidden x ffn."""
    first, budget = next(iter(found["settings"])), found["tried_with"]
    values = {(row["size"], row["width"], row["shape"]): row["validation_perplexity"]
              for row in found["tried"] if (row["setting"], row["budget"]) == (first, budget)}  # fmt: skip
    rows = [["size", "hidden x ffn", "published", "ours"]]
    for size, width in dict.fromkeys((size, width) for size, width, shape in values if width != shape):
        of = [values.get((size, width, shape)) for shape in ("published", "uniform")]
        rows.append([size.upper(), width, *("" if value is None else f"{value:.1f}" for value in of)])
    return markdown_table(rows)


def millions(size: str) -> int:
    """Return the number in a size such as `100m`."""
    return int(size.removesuffix("m"))


def perplexity_of(point: dict | None) -> str:
    """Return a point's perplexity, and of how many seeds; nothing where it was not measured."""
    if point is None:
        return ""
    return f"{point['perplexity']:.1f}" + (f" ({point['seeds']} seeds)" if point["seeds"] > 1 else "")


def needed(row: dict, least: dict[tuple[str, str], int]) -> str:
    """Return a fraction with its interval: a bound where the fewest tokens of the curve are enough."""
    ends = [f"{row[key]:.2f}" if row[key] is not None else "more than was measured" for key in ("fraction", "low", "high")]
    if row["fraction"] is not None and row["fraction"] * row["budget"] < least[row["size"], row["shape"]] * 1.001:
        return f"at most {ends[0]}" + (f" (up to {ends[2]})" if ends[2] != ends[0] else "")
    return f"{ends[0]} ({ends[1]} to {ends[2]})" if row["fraction"] is not None else ends[0]


def worst_text(ratios: list[dict]) -> str:
    """Say where ours is worst beside the published recipe at equal tokens."""
    if not ratios:
        return ""
    worst = max(ratios, key=lambda row: row["ratio"])
    texts = len({row["text"] for row in ratios})
    where = f"{worst['text']}, {worst['size'].upper()}, {worst['budget']:,} tokens, {worst['shape']}"
    return f"With equal tokens ours has at most {worst['ratio']:.2f} of its perplexity on any of {texts} texts ({where})."


def plot_race(found: dict, path: Path) -> None:
    """Draw every recipe's perplexity against its tokens, one panel for each size."""
    points = [row for row in found["curves"] if row["text"] == FIRST_TEXT]
    sizes = sorted({row["size"] for row in points}, key=millions, reverse=True)
    with plots.style():
        figure, panels = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 3.4), squeeze=False)
        for size, axes in zip(sizes, panels[0], strict=True):
            for shape, color in COLORS.items():
                of = sorted((row for row in points if (row["size"], row["shape"]) == (size, shape)), key=lambda r: r["budget"])
                tokens = [row["budget"] for row in of]
                axes.plot(tokens, [row["perplexity"] for row in of], marker="o", markersize=3, color=color, label=shape)
                axes.fill_between(tokens, *([row[end] for row in of] for end in ("low", "high")), color=color, alpha=0.15, lw=0)
            axes.set_xscale("log")
            plots.log_scale(axes)
            axes.set_title(size.upper())
            axes.set_xlabel("tokens")
        panels[0, 0].set_ylabel(f"perplexity, {FIRST_TEXT}")
        panels[0, -1].legend(frameon=False)
        plots.save(figure, path)
