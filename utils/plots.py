"""Pictures of what the tests and the training measured, each written as one PNG.

Drawing goes through matplotlib's object interface and its Agg renderer, so it needs no display and leaves alone
whatever figures and settings a caller has. matplotlib is imported when the first picture is drawn: a program that draws
none does not wait for it. A picture is written under a temporary name and then renamed: no reader sees half of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow, which is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK = "#333333"
_DPI = 120

# Bars across the range of scores in a histogram, at most and at least.
_BARS = (20, 160)

# Pixels between the faces of a contact sheet, and between them and the texts.
_GAP = 4


def draw_roc(path: str | Path, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str) -> None:
    """Receiver operating characteristics with a logarithmic FAR axis.

    curves: for each name the false accept rates and the true accept rates, of equal length, 0..1. Points at FAR 0 have
        no place on the axis and are left out.

    Raises ValueError if there is no curve, or none with a point of FAR above 0.
    """
    points = {name: _sorted_points(far, tar) for name, (far, tar) in curves.items()}
    drawn = [point for point in points.values() if len(point[0])]
    if not drawn:
        raise ValueError("no curve has a point with a FAR above 0")

    figure, axes = _axes(title, "false accept rate (FAR)", "true accept rate (TAR)")
    for (name, (far, tar)), colour in zip(points.items(), _cycle(len(points)), strict=True):
        axes.plot(far, tar, label=name, color=colour, linewidth=1.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.1, *(far[0] for far, _ in drawn)), 1.0)
    lowest = min(float(tar[0]) for _, tar in drawn)
    axes.set_ylim(max(0.0, lowest - 0.05 * (1 - lowest) - 0.002), 1.0 + 0.02 * (1 - lowest) + 0.001)
    axes.grid(True, which="minor", axis="x", color="#f0f0f0", linewidth=0.5)
    axes.legend(loc="lower right", frameon=False)
    _save(figure, path)


def draw_score_histogram(
    path: str | Path,
    genuine_counts: NDArray[np.integer],
    impostor_counts: NDArray[np.integer],
    edges: ArrayLike,
    title: str,
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """The distributions of genuine and impostor scores, each normalised to itself, as densities.

    genuine_counts, impostor_counts: [B] scores in each bin. edges: [B + 1], rising, the bins' edges.
    thresholds: scores to mark with a vertical line each, by name.

    The upper panel has a linear scale; the lower one a logarithmic scale, which shows the tails that decide the rates.
    Fine bins are joined, to as many as the picture can show.

    Raises ValueError if the numbers of counts and edges do not fit or there are no scores of one kind.
    """
    genuine, impostor = np.asarray(genuine_counts), np.asarray(impostor_counts)
    fine_edges = np.asarray(edges, dtype=np.float64)
    if genuine.ndim != 1 or genuine.shape != impostor.shape or fine_edges.shape != (len(genuine) + 1,):
        raise ValueError(f"{genuine.shape} and {impostor.shape} counts do not fit {fine_edges.shape} edges")
    if not genuine.any() or not impostor.any():
        raise ValueError("a histogram needs genuine and impostor scores")

    joined, (genuine, impostor) = _join_bins(fine_edges, [genuine, impostor])
    figure, (linear, logarithmic) = _panels(title)
    marks = thresholds or {}
    for axes in (linear, logarithmic):
        for counts, name, colour in ((impostor, "impostor", _COLOURS[1]), (genuine, "genuine", _COLOURS[0])):
            density = counts / counts.sum() / np.diff(joined)
            label = f"{name} ({counts.sum():,} pairs)"
            axes.stairs(density, joined, fill=True, color=colour, alpha=0.3)
            axes.stairs(density, joined, color=colour, linewidth=1.4, label=label)
        axes.set_xlim(min([joined[0], *marks.values()]), max([joined[-1], *marks.values()]))
        axes.set_ylabel("density")
    linear.set_ylim(0, 1.25 * linear.dataLim.ymax)  # room for the names of the thresholds
    linear.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2, frameon=False)
    logarithmic.set_yscale("log")
    logarithmic.set_xlabel("score")
    _mark_thresholds(linear, logarithmic, marks)
    _save(figure, path)


def draw_curves(
    path: str | Path, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], xlabel: str, ylabel: str, title: str
) -> None:
    """Lines over the steps of a training: loss, accuracy, learning rate.

    curves: for each name the steps and the values, of equal length. A curve of one point is drawn as a dot.

    Raises ValueError if there is no curve.
    """
    from matplotlib.ticker import MaxNLocator

    if not curves:
        raise ValueError("there is no curve to draw")
    figure, axes = _axes(title, xlabel, ylabel)
    for (name, (steps, values)), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
        few = np.size(steps) <= 40
        axes.plot(steps, values, label=name, color=colour, linewidth=1.8, marker="o" if few else "", markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.margins(x=0.02)
    axes.legend(loc="best", frameon=False)
    _save(figure, path)


def draw_contact_sheet(
    path: str | Path,
    images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    columns: int,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
) -> None:
    """A grid of images, row by row from the top left, each pixel as it is.

    images: uint8 [N, H, W, 3] RGB, or a list of N images of one size. columns: images in a row, at least 1.
    title: a line above the grid. row_labels: a text left of each row.

    Raises ValueError if there is no image, the images are not of one size in uint8 RGB, columns is below 1, or the
    number of labels is not the number of rows.
    """
    sheet = _tile(images, columns)
    rows = -(-len(images) // columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} labels for {rows} rows")

    figure = _blank_figure()
    title_width, title_height = _text_size(figure, [title] if title else [], fontsize=11)
    labels_width, _ = _text_size(figure, row_labels or [], fontsize=9)
    left = labels_width + _GAP if row_labels else 0
    width = max(left + sheet.shape[1], title_width + 2 * _GAP)
    height = title_height + _GAP + sheet.shape[0] if title else sheet.shape[0]
    figure.set_size_inches(width / _DPI, height / _DPI)

    figure.figimage(sheet, xo=left, yo=0, origin="upper")
    if title:
        figure.text(_GAP / width, 1 - _GAP / height, title, fontsize=11, color=_INK, va="top", parse_math=False)
    pitch = (sheet.shape[0] - _GAP) / rows
    for row, label in enumerate(row_labels or []):
        middle = sheet.shape[0] - _GAP / 2 - (row + 0.5) * pitch
        figure.text(
            _GAP / width, middle / height, label, fontsize=9, color=_INK, va="center_baseline", parse_math=False
        )
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _blank_figure() -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _chart_figure(width: float, height: float) -> Figure:
    """A figure of that many inches that makes room for the texts around its axes."""
    figure = _blank_figure()
    figure.set_size_inches(width, height)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    return figure


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = _chart_figure(8, 5)
    axes = figure.add_subplot()
    _style(axes)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, color=_INK, loc="left", fontweight="bold")
    return figure, axes


def _panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two axes, one above the other, sharing the horizontal one."""
    figure = _chart_figure(8, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes in (upper, lower):
        _style(axes)
    figure.align_ylabels()
    upper.set_title(title, color=_INK, loc="left", fontweight="bold", pad=26)
    return figure, (upper, lower)


def _style(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(color="#999999", labelcolor=_INK)


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _sorted_points(far: ArrayLike, tar: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points of a curve that a logarithmic axis can show, by rising FAR."""
    x, y = np.asarray(far, dtype=np.float64), np.asarray(tar, dtype=np.float64)
    order = np.lexsort((y, x))
    order = order[x[order] > 0]
    return x[order], y[order]


def _join_bins(
    edges: NDArray[np.float64], histograms: Sequence[NDArray[np.integer]]
) -> tuple[NDArray[np.float64], list[NDArray[np.integer]]]:
    """The populated range of histograms over the same edges, neighbouring bins added up.

    The fewer scores there are of either kind, the wider the joined bins, or chance would make a comb of them.
    """
    populated = np.flatnonzero(np.sum(histograms, axis=0))
    first, last = int(populated[0]), int(populated[-1]) + 1
    bars = int(np.clip(3 * np.sqrt(min(counts.sum() for counts in histograms)), *_BARS))
    starts = np.arange(first, last, -(-(last - first) // bars))
    return (
        np.append(edges[starts], edges[last]),
        [np.add.reduceat(counts[:last], starts) for counts in histograms],
    )


def _mark_thresholds(upper: Axes, lower: Axes, thresholds: Mapping[str, float]) -> None:
    """A dashed line through both panels for each threshold, its name written along it in the upper one."""
    for name, score in thresholds.items():
        for axes in (upper, lower):
            axes.axvline(score, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        upper.annotate(
            name,
            xy=(score, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=9,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )


def _tile(images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """The images in one white array, `_GAP` pixels between and around them."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    if len(images) == 0:
        raise ValueError("there is no image to draw")
    shape = np.shape(images[0])
    for index, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape != shape:
            raise ValueError(
                f"images must be uint8 [H, W, 3] of one size: the first has shape {shape}, "
                f"image {index} is {image.dtype} {image.shape}"
            )
    height, width = shape[0] + _GAP, shape[1] + _GAP
    across = min(columns, len(images))
    sheet = np.full((-(-len(images) // columns) * height + _GAP, across * width + _GAP, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * height + _GAP, (index % columns) * width + _GAP
        sheet[top : top + shape[0], left : left + shape[1]] = image
    return sheet


def _text_size(figure: Figure, texts: Sequence[str], fontsize: int) -> tuple[int, int]:
    """Pixels that the widest and the highest of the texts take with a gap around, (0, 0) when there are none."""
    width = height = 0
    for text in texts:
        drawn = figure.text(0, 0, text, fontsize=fontsize, parse_math=False)
        box = drawn.get_window_extent()
        drawn.remove()
        width, height = max(width, int(np.ceil(box.width))), max(height, int(np.ceil(box.height)))
    return (width + _GAP, height + _GAP) if texts else (0, 0)
