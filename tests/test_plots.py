"""Pictures: nothing overlaps or is cut off, whatever the number of layers and losses; all is visible on white and on black."""

import re

import matplotlib
import pytest
from matplotlib import image
from matplotlib import pyplot as plt

from hf_minitron.hub import plots
from hf_minitron.hub.card import loss_parts
from hf_minitron.shape import Shape

BIG = Shape({"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8, "head_dim": 128, "vocab": 128256})
LOSSES = ["forward_kl", "cross_entropy", "hidden_states", "attention_outputs", "embedding_states"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, kept open."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        plt.close(figure)


def boxes(figure):
    """Return the boxes of all texts that are shown, in pixels."""
    figure.canvas.draw()  # saving had another resolution
    renderer, texts = figure.canvas.get_renderer(), figure.findobj(matplotlib.text.Text)
    shown = [text for text in texts if text.get_visible() and text.get_text()]
    inside = {id(text) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in unseen(axis)}
    own = matplotlib.text.Text.get_window_extent  # without the line from an annotation to its point
    return [(text.get_text(), own(text, renderer)) for text in shown if id(text) not in inside]


def unseen(axis):
    """Return the labels of ticks outside an axis's view, which are not drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)]


def overlapping(figure):
    found = boxes(figure)
    pairs = [(a, b) for i, a in enumerate(found) for b in found[:i]]
    return [(a[0], b[0]) for a, b in pairs if a[1].shrunk(0.9, 0.7).overlaps(b[1].shrunk(0.9, 0.7))]


def log(parts, evaluated=False, steps=40, tokens=94_000_000_000):
    history = []
    for step in range(1, steps + 1):
        values = {part: 10.0**-place * (1 + 9 / step) for place, part in enumerate(parts)}
        history.append({"step": step, "loss": sum(values.values()), **values})
        history += [{"step": step, "eval_loss": 2.0}] if evaluated and step % 10 == 0 else []
    return {"tokens": tokens, "steps": steps, "losses": dict.fromkeys(parts, 1.0), "history": history}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("evaluated", [False, True])
def test_losses(tmp_path, drawn, count, evaluated):
    found = log(LOSSES[:count], evaluated)
    plots.plot_loss(found, tmp_path / "loss.png")
    (figure,) = drawn
    assert not overlapping(figure)
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    assert len(lines) == 1 + evaluated + len(loss_parts(found))
    assert len(figure.axes) == (1 if count == 1 else 2)
    assert len({line.get_color() for line in lines[1 + evaluated :]}) == len(loss_parts(found))
    assert lines[0].get_ydata()[-1] == found["history"][-1 - evaluated]["loss"]
    assert lines[0].get_xdata()[-1] == pytest.approx(94)
    assert figure.axes[-1].get_xlabel() == "billion tokens"


@pytest.mark.parametrize(("steps", "tokens"), [(1, 500), (2, 92160)])
def test_a_short_training_is_drawn_too(tmp_path, drawn, steps, tokens):
    plots.plot_loss(log(LOSSES[:2], steps=steps, tokens=tokens), tmp_path / "loss.png")
    assert not overlapping(drawn[0])
    assert len(drawn[0].axes[0].get_lines()[0].get_xdata()) == steps


@pytest.mark.parametrize(("first", "last"), [(1.2, 0.8), (0.95, 0.87), (12, 4), (0.04, 0.02), (900, 0.3),
                                               (3e4, 2e4), (4e-6, 1e-6)])  # fmt: skip
def test_losses_are_decimals(tmp_path, drawn, first, last):
    found = log(LOSSES[:2])
    for entry in found["history"]:
        entry |= dict.fromkeys(LOSSES[:2], last + (first - last) / entry["step"])
    plots.plot_loss(found, tmp_path / "loss.png")
    labels = [text for text, _ in boxes(drawn[0])]
    assert any(text in labels for text in ("1", "10", "0.9", "0.03", "100", "30,000", "0.000001"))
    assert not [text for text in labels if re.search(r"\de[+-]?\d", text)]
    assert not overlapping(drawn[0])


@pytest.mark.parametrize("layers", [3, 36, 48, 64, 80])
def test_heat_maps(tmp_path, drawn, layers):
    sizes = {"heads": [64, 16, 8] * 40, "kv_heads": [8, 4, 1] * 40, "ffn": [28672, 0, 8192] * 40}
    plots.plot_kept(BIG, {axis: row[:layers] for axis, row in sizes.items()}, tmp_path / "kept.png")
    assert not overlapping(drawn[0])
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert texts == ([str(size) for row in sizes.values() for size in row[:layers]] if layers <= 64 else [])


def test_bars_and_their_labels(tmp_path, drawn):
    plots.plot_shapes(BIG, BIG.cut_to({"ffn": 14336}), tmp_path / "shapes.png")
    plots.plot_shapes(BIG, BIG, tmp_path / "mean.png", {"ffn": [0, 28672, 14336], "heads": [64, 64, 64]})
    alike, mean = drawn
    assert not overlapping(alike)
    assert not overlapping(mean)
    assert "28672 → 14336" in [text.get_text() for text in alike.axes[0].texts]
    assert "28672 → 0 to 28672" in [text.get_text() for text in mean.axes[0].texts]
    assert [bar.get_width() for bar in mean.axes[0].patches][1::2] == [1, 1, 1, 0.5, 1, 1]  # from head_dim up


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_forest_of_differences(tmp_path, drawn, count):
    """Of any number of metrics, in percent of the baseline's value; the colour is the verdict's."""
    verdicts = ["worse", "not distinguishable", "better"]
    names = [f"a_task_with_a_{'very_' * (n % 5)}long_name_{n} acc ↑" for n in range(count)]
    found = {name: (verdicts[n % 3], -50.0, -60.0, -40.0 + 2 * n) for n, name in enumerate(names)}
    plots.plot_differences(found, tmp_path / "differences.png")
    (figure,) = drawn
    assert not overlapping(figure)
    points = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in points] == [-50.0] * count
    assert len({line.get_color() for line in points}) == min(count, 3)
    shown = [re.sub(r"\s", "", text.get_text()) for text in figure.axes[0].get_yticklabels()]
    assert shown == [name.replace(" ", "") for name in names[::-1]]
    assert image.imread(tmp_path / "differences.png").shape[1] < 1200, "long names do not make the rest small"


@pytest.mark.parametrize(("first", "last"), [(1.5, 0.7), (9, 8.9), (0.5, -0.5), (-1, -2), (0, 0)])
def test_a_loss_is_shown_from_zero_and_whole(tmp_path, drawn, first, last):
    found = log(LOSSES[:1])
    for entry in found["history"]:
        entry["loss"] = last + (first - last) / entry["step"]
    plots.plot_loss(found, tmp_path / "loss.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert high - max(0, first) > 0.05 * (high - low), "the line is not cut off at its beginning"
    assert low == 0 if last >= 0 else found["history"][-1]["loss"] - low > 0.05 * (high - low)


@pytest.mark.parametrize("most", [40, 900, 1_500, 25_000, 1_500_000])
def test_large_differences_have_room(tmp_path, drawn, most):
    found = {"a acc": ("better", most, most / 2, 2 * most), "b acc": ("worse", -30, -40, -20)}
    plots.plot_differences(found, tmp_path / "differences.png")
    assert not overlapping(drawn[0])
    assert f"{most:+,.0f} %" in [text for text, _ in boxes(drawn[0])]


@pytest.mark.parametrize("metric", ["bits per byte", "perplexity"])
@pytest.mark.parametrize(("count", "apart"), [(1, 1), (2, 1), (12, 1 / 50), (12, 1e-4), (30, 1e-4), (60, 1e-3)])
def test_models_by_size_and_quality(tmp_path, drawn, count, apart, metric):
    """Each is named for itself, those on one dot too, and no name covers a name, a dot or what stands below the axes."""
    values = {f"model {n}": 2.5 - n * apart for n in range(count)}
    ends = [(y - 0.1, y + 0.1) if n % 3 else () for n, y in enumerate(values.values())]
    points = {name: (1e8 * (1 + n % 2), y, *ends[n]) for n, (name, y) in enumerate(values.items())}
    plots.plot_sizes(points, tmp_path / "models.png", metric, marked="model 0")
    (figure,) = drawn
    assert not overlapping(figure)
    named = {text.get_text(): text for text in figure.axes[0].texts}
    assert {name: text.xy for name, text in named.items()} == {name: (size / 1e6, y) for name, (size, y, *_) in points.items()}
    assert sorted(named, key=lambda name: named[name].xyann[1]) == [f"model {n}" for n in range(count)][::-1]
    assert [name for name, text in named.items() if text.get_weight() == "bold"] == ["model 0"]
    edge = figure.axes[0].get_window_extent()
    names = [box for text, box in boxes(figure) if text in named]
    assert all(box.x0 > edge.x1 for box in names), "and none a dot"
    assert all(box.y1 > edge.y0 for box in names), "nor the scale"
    lines = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "-"]
    assert [list(line.get_ydata()) for line in lines] == [list(ends) for _, _, *ends in points.values()]


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(color)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize("color", [plots.INK, plots.AFTER, *plots.LINES])
def test_colors_stand_out(page, color):
    low, high = sorted((luminance(page), luminance(color)))
    assert (high + 0.05) / (low + 0.05) >= (4 if color == plots.INK else 3)  # WCAG 2.1, 1.4.11: 3 for graphics


def test_pages_shine_through(tmp_path):
    plots.plot_loss(log(LOSSES), tmp_path / "loss.png")
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[2] == 4
    assert (pixels[..., 3] == 0).mean() > 0.8
    assert (pixels[[0, -1]][..., 3] == 0).all()
    assert (pixels[:, [0, -1]][..., 3] == 0).all()  # a margin: nothing is cut off
