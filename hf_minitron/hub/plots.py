"""Pictures of a run for the card and the README, readable on light and dark pages."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from scipy.optimize import isotonic_regression

from hf_minitron.hub.card import loss_parts
from hf_minitron.shape import Shape

# Greys, a blue and others that stand out on white and on black.
BEFORE, AFTER, INK = "#9aa5b1", "#3b82f6", "#757b85"
LINES = ("#ea580c", "#16a34a", "#a855f7", "#0891b2", "#ec4899", "#a16207", "#64748b")
UNITS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1, ""))
LINE = 26  # characters of a name; of more, the rest would be small
KEPT = matplotlib.colors.LinearSegmentedColormap.from_list("kept", ["#dbeafe", AFTER, "#1e3a8a"])  # nothing to all of an axis


def plot_loss(log: Mapping[str, Any], path: Path) -> None:
    """Draw the loss against the tokens seen, in training and on held-out text, and below it its parts where there are several.

    Args:
        log (`Mapping`): The training log: `tokens`, `steps`, `losses` and `history`, with at least one `loss`.
        path (`Path`): The PNG file to write.
    """
    history = log["history"]
    per_step = log["tokens"] / log["steps"]
    unit, name = next((n, name) for n, name in UNITS if log["tokens"] >= n)
    parts = loss_parts(log)

    def draw(axes, key: str, label: str, color: str, **style) -> None:
        found = [(entry["step"] * per_step / unit, entry[key]) for entry in history if key in entry]
        if found:
            style = {"marker": "o", "markersize": 4} | style if len(found) == 1 else style  # a line needs two points
            axes.plot(*zip(*found, strict=True), color=color, label=label, linewidth=2, **style)

    with style():
        figure, panels = plt.subplots(1 + bool(parts), 1, figsize=(6, 5 if parts else 3), sharex=True, squeeze=False)
        top, bottom = panels[0, 0], panels[-1, 0]
        draw(top, "loss", "weighted sum" if parts else "training", AFTER)
        draw(top, "eval_loss", "held-out text", LINES[0], linestyle="--")
        top.set_ylabel("loss" if parts else "loss, nats per token")
        low, high = min(0, top.dataLim.y0), max(0, top.dataLim.y1)  # from 0, and of all points the whole
        room = 0.08 * (high - low or 1)
        top.set_ylim(low - room * (low < 0), high + room)
        if parts or any("eval_loss" in entry for entry in history):
            _legend(top)
        for number, part in enumerate(parts):
            draw(bottom, part, part, LINES[number % len(LINES)])
        if parts:
            bottom.set_ylabel("parts, unweighted")
            if all(entry.get(part, 1) > 0 for entry in history for part in parts):
                log_scale(bottom)  # their sizes differ
            _legend(bottom)
        bottom.set_xlabel(f"{name} tokens" if name else "tokens")
        figure.align_ylabels()
        save(figure, path)


def plot_shapes(before: Shape, after: Shape, path: Path, by_layer: Mapping[str, Sequence[int]] | None = None) -> None:
    """Draw the size of every axis before and after, as a share of the size before.

    Args:
        before (`Shape`): The teacher's shape.
        after (`Shape`): The student's shape.
        path (`Path`): The PNG file to write.
        by_layer (`Mapping[str, Sequence[int]]`, *optional*): Axis to its sizes in the layers that stay, where they differ: the
            bar is their mean.
    """
    names = [axis for axis in before.axes if axis != "vocab" or after[axis] != before[axis]]
    with style():
        figure, axes = plt.subplots(figsize=(6, 0.42 * len(names) + 0.4))
        for row, axis in enumerate(reversed(names)):
            sizes = (by_layer or {}).get(axis) or [after[axis]]
            share, span = sum(sizes) / len(sizes) / before[axis], sorted({min(sizes), max(sizes)})
            axes.barh(row, 1, color=BEFORE, height=0.62, alpha=0.45)
            axes.barh(row, share, color=AFTER, height=0.62)
            label = f"{before[axis]} → {' to '.join(map(str, span))}" if share < 1 else f"{before[axis]}"
            axes.text(1.02, row, label, va="center", color=INK)
        axes.set_yticks(range(len(names)), reversed(names))
        axes.set_xlim(0, 1.3)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        save(figure, path)


def plot_differences(comparisons: Mapping[str, tuple[str, float, float, float]], path: Path) -> None:
    """Draw how far a model is from its baseline by several metrics: a forest plot of paired differences with 95 % intervals.

    Args:
        comparisons (`Mapping[str, tuple]`): What each is called, from top to bottom, to its verdict, the difference in percent
            of the baseline's value, and the ends of its interval.
        path (`Path`): The PNG file to write.
    """
    colors = {"better": LINES[1], "not distinguishable": INK, "worse": LINES[0]}
    with style():
        names = [*map(_wrapped, reversed(comparisons))]
        row_height = max(0.42, *(0.19 * (1 + name.count("\n")) for name in names))
        figure, axes = plt.subplots(figsize=(6, row_height * len(comparisons) + 0.8))
        axes.axvline(0, color=BEFORE, linewidth=1)
        for row, (verdict, middle, low, high) in enumerate(reversed(comparisons.values())):
            color = colors[verdict]
            axes.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot(middle, row, "o", color=color, markersize=7)
            axes.annotate(
                f"{middle:+,.0f} %", (middle, row), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9
            )
        for verdict in dict.fromkeys(verdict for verdict, *_ in comparisons.values()):
            axes.plot([], [], "o", color=colors[verdict], label=verdict)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, handletextpad=0.2)
        axes.set_yticks(range(len(comparisons)), names)
        axes.set_ylim(-0.6, len(comparisons) - 0.3)
        axes.margins(x=0.1)
        widest = max(abs(bound) for _, *bounds in comparisons.values() for bound in bounds)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5 if widest < 1000 else 3))  # more would touch each other
        axes.xaxis.set_major_formatter("{x:+,.0f} %")
        axes.set_xlabel("difference from the teacher")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        save(figure, path)


def plot_sizes(points: Mapping[str, tuple[float, ...]], path: Path, metric: str, marked: str) -> None:
    """Draw quality against size of several models, with 95 % intervals.

    Args:
        points (`Mapping[str, tuple]`): Name to a model's parameters, its value and, where known, the ends of its interval.
        path (`Path`): The PNG file to write.
        metric (`str`): What the values are; perplexities get a logarithmic scale.
        marked (`str`): The model that stands out.
    """
    with style():
        figure, axes = plt.subplots(figsize=(6, max(3, 0.29 * len(points) + 0.8)))
        if metric == "perplexity":
            log_scale(axes)
        unit, name = next((unit for unit in UNITS if max(point[0] for point in points.values()) >= unit[0]), UNITS[-1])
        sizes, values = [point[0] / unit for point in points.values()], [point[1] for point in points.values()]
        for x, (_, value, *ends), model in zip(sizes, points.values(), points, strict=True):
            color, order = (AFTER, 4) if model == marked else (BEFORE, 3)
            axes.plot([x] * len(ends), ends, color=color, linewidth=1.5, zorder=order)
            axes.plot(x, value, "o", color=color, markersize=7, zorder=order)
        axes.margins(x=0.15, y=0.1)
        axes.autoscale_view()
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.set_xlabel(f"{name} parameters" if name else "parameters")
        axes.set_ylabel(metric)
        _name(axes, points, sizes, values, marked)
        save(figure, path)


def plot_kept(before: Shape, sizes: Mapping[str, Sequence[int]], path: Path) -> None:
    """Draw what is kept in every layer: a heat map, layers from left to right, one row per axis.

    Args:
        before (`Shape`): The teacher's shape.
        sizes (`Mapping[str, Sequence[int]]`): Axis to its size in each of the teacher's layers, 0 where it is gone.
        path (`Path`): The PNG file to write.
    """
    layers = len(next(iter(sizes.values())))
    shares = [[size / before[axis] for size in row] for axis, row in sizes.items()]
    digits = max(len(str(size)) for row in sizes.values() for size in row)
    upright = layers * digits > 60  # as many characters fit side by side
    height = (0.2 + 0.1 * digits) if upright else 0.4
    with style():
        figure, axes = plt.subplots(figsize=(min(12, max(4, 0.28 * layers)), height * len(sizes) + 0.4))
        image = axes.imshow(shares, cmap=KEPT, vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(sizes.values()) if layers <= 64 else ():
            for x, size in enumerate(row):
                ink = "white" if shares[y][x] > 0.6 else "#1f2937"
                turned = 90 if upright and size > (99 if layers <= 36 else 9) else 0
                axes.text(x, y, size, ha="center", va="center", fontsize=8, color=ink, rotation=turned)
        axes.set_yticks(range(len(sizes)), list(sizes))
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, format=matplotlib.ticker.PercentFormatter(1), ticks=[0, 0.5, 1], pad=0.02)
        bar.set_label("kept")
        bar.outline.set_visible(False)
        save(figure, path)


def _wrapped(name: str) -> str:
    """Break a long name into lines, behind its underscores where there are some."""
    return "\n".join(line.replace("_ ", "_") for line in textwrap.wrap(name.replace("_", "_ "), LINE))


def _name(axes, names: Iterable[str], xs: Sequence[float], ys: Sequence[float], marked: str) -> None:
    """Write the names of points beside the axes, as near to their heights as they do not cover each other, a line to each."""
    names, places = list(names), axes.transAxes.inverted().transform(axes.transData.transform(list(zip(xs, ys, strict=True))))
    order, gap = places[:, 1].argsort(kind="stable"), 16 / (72 * axes.get_window_extent().height / axes.figure.dpi)
    steps = gap * np.arange(len(order))
    heights = np.clip(isotonic_regression(places[order, 1] - steps).x, 0, max(0, 1 - steps[-1])) + steps  # not below the axes
    for number, height in zip(order, heights, strict=True):
        line = {"arrowstyle": "-", "color": BEFORE, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4}
        axes.annotate(names[number], (xs[number], ys[number]), (1.08, height), textcoords="axes fraction", va="center",
                      weight="bold" if names[number] == marked else "normal", arrowprops=line)  # fmt: skip


def _legend(axes) -> None:
    """Put a legend beside the axes, where no line is."""
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1.04), handlelength=1.2)


class Decimals(matplotlib.ticker.LogFormatter):
    """Writes the numbers beside a logarithmic axis as decimals, and of those between powers of ten only as many as fit."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return what stands beside a tick."""
        return decimal(x) if super().__call__(x, pos) else ""


def decimal(x: float, pos: int | None = None) -> str:
    """Write a number that stands beside a tick as a decimal, of any size."""
    return f"{x:,.0f}" if x >= 1000 else np.format_float_positional(x, precision=4, fractional=False, trim="-")


def log_scale(axes) -> None:
    """Make the scale from bottom to top logarithmic, its numbers decimals."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(decimal)
    axes.yaxis.set_minor_formatter(Decimals(minor_thresholds=(1, 0.5)))


def style():
    """Return the context that all pictures are drawn in: inks for light and dark pages, no frame."""
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    return matplotlib.rc_context({**colors, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False})


def save(figure, path: Path) -> None:
    """Write a figure as a PNG file without a background, the same bytes for the same picture, and close it."""
    figure.savefig(path, dpi=150, transparent=True, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
