"""Pictures of a run for the card and the README, readable on light and dark pages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from hf_minitron.shape import Shape

BEFORE, AFTER, INK = "#9aa5b1", "#3b82f6", "#6b7280"  # grey and blue that stand out on white and on black
KEPT = matplotlib.colors.LinearSegmentedColormap.from_list("kept", ["#dbeafe", AFTER, "#1e3a8a"])  # nothing to all of an axis


def plot_loss(log: Mapping[str, Any], path: Path) -> None:
    """Draw the distillation loss against the tokens seen."""
    steps = [entry for entry in log["history"] if "loss" in entry]
    tokens_per_step = log["tokens"] / steps[-1]["step"]
    with _style():
        figure, axes = plt.subplots(figsize=(6, 3))
        axes.plot([s["step"] * tokens_per_step / 1e3 for s in steps], [s["loss"] for s in steps], color=AFTER, linewidth=2)
        axes.set_xlabel("thousand tokens")
        axes.set_ylabel("loss, nats per token")
        axes.set_ylim(bottom=0)
        _save(figure, path)


def plot_shapes(before: Shape, after: Shape, path: Path) -> None:
    """Draw the size of every axis before and after, as a share of the size before."""
    names = [axis for axis in before.axes if axis != "vocab"]
    with _style():
        figure, axes = plt.subplots(figsize=(6, 0.42 * len(names) + 0.4))
        for row, axis in enumerate(reversed(names)):
            share = after[axis] / before[axis]
            axes.barh(row, 1, color=BEFORE, height=0.62, alpha=0.45)
            axes.barh(row, share, color=AFTER, height=0.62)
            label = f"{before[axis]} → {after[axis]}" if share < 1 else f"{before[axis]}"
            axes.text(1.02, row, label, va="center", color=INK)
        axes.set_yticks(range(len(names)), reversed(names))
        axes.set_xlim(0, 1.3)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _save(figure, path)


def plot_candidates(points: Mapping[str, tuple[float, float, float]], path: Path) -> None:
    """Draw quality against size of several students, numbered as they come, the best first.

    Args:
        points (`Mapping[str, tuple]`): Name to its parameters, and its perplexity before and after distillation.
        path (`Path`): The PNG file to write.
    """
    sizes, before, after = ([point[i] / (1e6 if i == 0 else 1) for point in points.values()] for i in range(3))
    with _style():
        figure, axes = plt.subplots(figsize=(6, max(3, 0.26 * len(points) + 0.8)))
        axes.vlines(sizes, after, before, color=BEFORE, linewidth=1, alpha=0.6)
        axes.scatter(sizes, before, color=BEFORE, s=36, label="pruned", zorder=3)
        axes.scatter(sizes, after, color=AFTER, s=150, label="distilled", zorder=3)
        for number, (x, y) in enumerate(zip(sizes, after, strict=True), 1):
            axes.text(x, y, number, ha="center", va="center", color="white", fontsize=9, weight="bold", zorder=4 - number / 1e3)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.4g}")
        axes.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(1, 0.5)))
        axes.margins(x=0.12, y=0.15)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.set_xlabel("million parameters")
        axes.set_ylabel("perplexity")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handletextpad=0.2)
        names = "\n".join(f"{number}  {name}" for number, name in enumerate(points, 1))
        axes.text(1.03, 1, names, transform=axes.transAxes, va="top", linespacing=1.5)
        _save(figure, path)


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
    with _style():
        figure, axes = plt.subplots(figsize=(min(12, max(4, 0.28 * layers)), height * len(sizes) + 0.4))
        image = axes.imshow(shares, cmap=KEPT, vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(sizes.values()) if layers <= 64 else ():
            for x, size in enumerate(row):
                ink = "white" if shares[y][x] > 0.6 else "#1f2937"
                turned = 90 if upright and size > 99 else 0
                axes.text(x, y, size, ha="center", va="center", fontsize=8, color=ink, rotation=turned)
        axes.set_yticks(range(len(sizes)), list(sizes))
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, format=matplotlib.ticker.PercentFormatter(1), ticks=[0, 0.5, 1], pad=0.02)
        bar.set_label("kept")
        bar.outline.set_visible(False)
        _save(figure, path)


def _style():
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    return matplotlib.rc_context({**colors, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False})


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150, transparent=True, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
