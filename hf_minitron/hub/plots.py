"""Pictures of a run for the card and the README, readable on light and dark pages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from hf_minitron.shape import Shape

BEFORE, AFTER, INK = "#9aa5b1", "#3b82f6", "#6b7280"  # grey and blue that stand out on white and on black


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


def _style():
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    return matplotlib.rc_context({**colors, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False})


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150, transparent=True, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
