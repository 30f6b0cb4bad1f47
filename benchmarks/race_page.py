"""The race's table and curves for the README, from `benchmarks/results/race.json` alone."""

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from hf_minitron.hub import plots
from hf_minitron.tables import markdown_table

FIRST_TEXT = "c4_2"  # of the test texts
COLORS = {"published": plots.BEFORE, "uniform": plots.AFTER, "nonuniform": plots.LINES[0]}


def race_block(found: dict) -> str:
    """Return the race's answer: a sentence for every size and budget, the table, the curves."""
    points = {(row["size"], row["shape"], row["budget"]): row for row in found["curves"] if row["text"] == FIRST_TEXT}
    least: dict[tuple[str, str], int] = {}
    for size, shape, budget in sorted(points):
        least.setdefault((size, shape), budget)
    needed = {(row["size"], row["shape"], row["budget"]): tokens_needed(row, least[row["size"], row["shape"]])
              for row in found["rows"]}  # fmt: skip
    rows = [["size", "tokens", "seeds", "published", "uniform", "of its tokens", "nonuniform", "of its tokens", "worst text"]]
    asked = {(row["size"], row["budget"]) for row in found["rows"]}
    for size, budget in sorted(asked, key=lambda pair: (-millions(pair[0]), pair[1])):
        cells = [perplexity_of(points.get((size, "published", budget)))]
        for shape in ("uniform", "nonuniform"):
            cells += [perplexity_of(points.get((size, shape, budget))), needed.get((size, shape, budget), "")]
        seeds = points[size, "published", budget]["seeds"]
        rows.append([size.upper(), f"{budget:,}", str(seeds), *cells, worst_text(found["equal_tokens"], size, budget)])
    said = [f"At {row['size'].upper()} and {row['budget']:,} tokens, a {row['shape']} student of ours needs "
            f"{needed[row['size'], row['shape'], row['budget']]} of the published recipe's tokens for its perplexity."
            for row in found["rows"]]  # fmt: skip
    return "\n\n".join(
        [
            "\n".join(f"- {sentence}" for sentence in said),
            markdown_table(rows),
            "![Perplexity against tokens](benchmarks/results/race.png)",
            f"Perplexity on {FIRST_TEXT}, with 95 % intervals over documents and seeds; *of its tokens*: the share of the "
            "published recipe's tokens with which ours is as good; *worst text*: the highest ratio of ours to the published "
            "recipe's perplexity at equal tokens, on any of the texts. Every recipe's width and learning rate were chosen on a "
            f"validation split: {chosen_of(found['tried'])}. {found['hours']:.1f} hours so far, "
            f"{found['environment']['hardware']}.",
        ]
    )


def chosen_of(tried: list[dict]) -> str:
    """Return the widths and rates that were chosen."""
    chosen = [row for row in tried if row["chosen"]]
    names = [" ".join(dict.fromkeys([row["size"].upper(), row["shape"], row["width"]])) for row in chosen]
    return "; ".join(f"{name} at {row['setting']}" for name, row in zip(names, chosen, strict=True))


def widths_block(found: dict) -> str:
    """Return what every recipe makes of every width of a size, hidden x ffn."""
    first = next(iter(found["settings"]))
    values = {(row["size"], row["width"], row["shape"]): row["validation_perplexity"]
              for row in found["tried"] if row["setting"] == first}  # fmt: skip
    rows = [["size", "hidden x ffn", "published", "ours"]]
    for size, width in dict.fromkeys((size, width) for size, width, shape in values if width != shape):
        of = [values.get((size, width, shape)) for shape in ("published", "uniform")]
        rows.append([size.upper(), width, *("" if value is None else f"{value:.1f}" for value in of)])
    return markdown_table(rows)


def millions(size: str) -> int:
    """Return the number in a size such as `100m`."""
    return int(size.removesuffix("m"))


def perplexity_of(point: dict | None) -> str:
    """Return a point's perplexity with its interval; nothing where it was not measured."""
    return "" if point is None else f"{point['perplexity']:.1f} ({point['low']:.1f} to {point['high']:.1f})"


def tokens_needed(row: dict, least: int) -> str:
    """Return a fraction with its interval: a bound where the fewest tokens of the curve are enough."""
    ends = [f"{row[key]:.2f}" if row[key] is not None else "more than was measured" for key in ("fraction", "low", "high")]
    if row["fraction"] is not None and row["fraction"] * row["budget"] < least * 1.001:
        return f"at most {ends[0]}" + (f" (up to {ends[2]})" if ends[2] != ends[0] else "")
    return f"{ends[0]} ({ends[1]} to {ends[2]})" if row["fraction"] is not None else ends[0]


def worst_text(ratios: list[dict], size: str, budget: int) -> str:
    """Return where each shape of ours is worst beside the published recipe at equal tokens."""
    found = []
    for shape in ("uniform", "nonuniform"):
        of = [row for row in ratios if (row["size"], row["budget"], row["shape"]) == (size, budget, shape)]
        if of:
            worst = max(of, key=lambda row: row["ratio"])
            found.append(f"{shape} {worst['ratio']:.2f} ({worst['text']})")
    return ", ".join(found)


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
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,.4g}")
            axes.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(1, 0.5)))
            axes.set_title(size.upper())
            axes.set_xlabel("tokens")
        panels[0, 0].set_ylabel(f"perplexity, {FIRST_TEXT}")
        panels[0, -1].legend(frameon=False)
        plots.save(figure, path)
