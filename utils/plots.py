"""Charts of what the tests and the training measured, each written as one PNG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.figures import INK, new_figure, save, with_any_names
from utils.texts import encodable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow, which is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_STYLES = ("-", "--", ":", "-.")

# Bars across the range of scores in a histogram, at most and at least.
_BARS = (20, 160)

Values = TypeVar("Values")


@with_any_names
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
    for name, (far, tar), line in _lines(points):
        axes.plot(far, tar, label=_label(name), linewidth=1.8, **line)
    axes.set_xscale("log")
    axes.set_xlim(min(0.1, *(far[0] for far, _ in drawn)), 1.0)
    lowest = min(float(tar[0]) for _, tar in drawn)
    axes.set_ylim(max(0.0, lowest - 0.05 * (1 - lowest) - 0.002), 1.0 + 0.02 * (1 - lowest) + 0.001)
    axes.grid(True, which="minor", axis="x", color="#f0f0f0", linewidth=0.5)
    _legend(axes, loc="lower right")
    save(figure, path)


@with_any_names
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
            label = _label(f"{name} ({counts.sum():,} pairs)")
            axes.stairs(density, joined, fill=True, color=colour, alpha=0.3)
            axes.stairs(density, joined, color=colour, linewidth=1.4, label=label)
        axes.set_xlim(min([joined[0], *marks.values()]), max([joined[-1], *marks.values()]))
        axes.set_ylabel("density")
    linear.set_ylim(0, 1.25 * linear.dataLim.ymax)  # room for the names of the thresholds
    _legend(linear, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2)
    logarithmic.set_yscale("log")
    logarithmic.set_xlabel("score")
    _mark_thresholds(linear, logarithmic, marks)
    save(figure, path)


@with_any_names
def draw_curves(
    path: str | Path,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    xlabel: str,
    ylabel: str,
    title: str,
    highest: float = np.inf,
) -> None:
    """Lines over whole numbers, such as the steps of a training: loss, accuracy, learning rate.

    curves: for each name the steps and the values, of equal length. Short ones have their points marked by dots.
    highest: what values can be at most; the axis does not go on beyond.

    Raises ValueError if there is no curve.
    """
    from matplotlib.ticker import MaxNLocator

    if not curves:
        raise ValueError("there is no curve to draw")
    figure, axes = _axes(title, xlabel, ylabel)
    for name, (steps, values), line in _lines(curves):
        marker = "o" if np.size(steps) <= 40 else ""
        axes.plot(steps, values, label=_label(name), linewidth=1.8, marker=marker, markersize=4, **line)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.margins(x=0.02)
    lower, upper = axes.get_ylim()
    axes.set_ylim(top=min(upper, highest + 0.02 * (upper - lower)))  # room for the line
    _legend(axes, loc="best")
    save(figure, path)


def histogram_outline(
    values: NDArray[np.number], edges: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.integer]]:
    """The outline of the bars that count `values` between `edges`, as a curve for `draw_curves`.

    With fewer than 20 bars it would have dots at their corners.
    """
    bars, _ = np.histogram(values, edges)
    return edges.repeat(2), np.concatenate(([0], bars.repeat(2), [0]))


@with_any_names
def draw_det(path: str | Path, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str) -> None:
    """Detection error trade-offs: false reject rate over false accept rate, both axes logarithmic.

    curves: for each name the false accept rates and the false reject rates, of equal length, 0..1. Points where either
        is 0 have no place on the axes and are left out; a curve without any other is named in the legend all the same.

    Raises ValueError if there is no curve, or none with a point where both rates are above 0.
    """
    points = {}
    for name, (far, frr) in curves.items():
        x, tar = _sorted_points(far, 1 - np.asarray(frr, np.float64))
        points[name] = x[tar < 1], 1 - tar[tar < 1]
    drawn = [point for point in points.values() if len(point[0])]
    if not drawn:
        raise ValueError("no curve has a point with FAR and FRR above 0")
    figure, axes = _axes(title, "false accept rate (FAR)", "false reject rate (FRR)")
    axes.set(xscale="log", yscale="log", ylim=(0.1, 1.0))
    for name, (far, frr), line in _lines(points):
        label = _label(name if len(far) else f"{name} (no errors to show)")
        marker = "o" if len(far) == 1 else ""
        axes.plot(far, frr, label=label, linewidth=1.8, drawstyle="steps-pre", marker=marker, markersize=4, **line)
    axes.set_xlim(min(0.1, 0.8 * min(float(far[0]) for far, _ in drawn)), 1.0)
    axes.set_ylim(min(0.1, 0.8 * min(float(frr.min()) for _, frr in drawn)), 1.0)
    axes.grid(True, which="minor", color="#f0f0f0", linewidth=0.5)
    _legend(axes, loc="best")
    save(figure, path)


@with_any_names
def draw_rejection(path: str | Path, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str) -> None:
    """Errors that are left when the pairs of the lowest quality are rejected, in percent.

    curves: for each name the share of pairs rejected and the false reject rate of the rest, of equal length, 0..1.

    Raises ValueError if there is no curve.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    figure, axes = _axes(title, "pairs rejected for low quality, %", "false rejects among the rest, %")
    for name, (rejected, error), line in _lines(curves):
        x, y = 100 * np.asarray(rejected, np.float64), 100 * np.asarray(error, np.float64)
        axes.plot(x, y, label=_label(name), linewidth=1.8, marker="o", markersize=4, **line)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    _legend(axes, loc="best")
    save(figure, path)


@with_any_names
def draw_bars(
    path: str | Path,
    rows: Sequence[str],
    values: Mapping[str, ArrayLike],
    intervals: Mapping[str, ArrayLike] | None,
    title: str,
    xlabel: str,
) -> None:
    """Horizontal bars, a group of them for each row, from the top.

    rows: the names of the groups. values: for each series a number a row; NaN leaves its bar out. intervals: for each
        series [rows, 2], low and high, drawn as a line over the bar; NaN leaves it out. The axis begins where the
        differences show, not at 0.

    Raises ValueError without rows or series, or when their numbers do not fit.
    """
    series = {name: np.asarray(numbers, np.float64) for name, numbers in values.items()}
    if not rows or not series or any(numbers.shape != (len(rows),) for numbers in series.values()):
        raise ValueError(f"{len(rows)} rows need as many numbers in each of {len(series)} series")
    bounds = {name: np.asarray(interval, np.float64) for name, interval in (intervals or {}).items()}
    figure = new_figure((8, 1.4 + 0.22 * len(rows) * (len(series) + 0.6)))
    axes = figure.add_subplot()
    _style(axes)
    height = 0.8 / len(series)
    for position, (name, numbers, line) in enumerate(_lines(series)):
        places = np.arange(len(rows)) - 0.4 + (position + 0.5) * height
        axes.barh(places, numbers, height=0.9 * height, color=line["color"], alpha=0.75, label=_label(name))
        if name in bounds:
            low, high = bounds[name].T
            error = np.stack([numbers - low, high - numbers]).clip(0)
            axes.errorbar(numbers, places, xerr=error, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.set_yticks(np.arange(len(rows)), [encodable(row) for row in rows], parse_math=False)
    axes.invert_yaxis()
    shown = np.concatenate([*series.values(), *(interval.ravel() for interval in bounds.values())])
    shown = shown[np.isfinite(shown)]
    if shown.size:
        margin = max(0.05 * float(np.ptp(shown)), 0.002 * float(np.abs(shown).max())) or 1.0  # all are 0
        axes.set_xlim(max(0.0, float(shown.min()) - 4 * margin), float(shown.max()) + margin)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"{xlabel} (the axis does not begin at 0)" if axes.get_xlim()[0] > 0 else xlabel)
    _title(axes, title, pad=26 if len(series) > 1 else None)
    if len(series) > 1:
        _legend(axes, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=len(series))
    save(figure, path)


@with_any_names
def draw_marked_scores(path: str | Path, scores: NDArray[np.floating], mark: float, name: str, label: str) -> None:
    """How often scores [N], N >= 1, are how high, on a logarithmic scale, so that the few near a threshold are seen.

    mark: the threshold, drawn as a line, which may lie outside of the scores. name: what there is a score of. label:
        what the scores are.
    """
    figure, axes = _axes("", label, name)
    low, high = min(float(scores.min()), mark), max(float(scores.max()), mark)
    axes.hist(scores, bins=np.linspace(low - 0.01, high + 0.01, 100).tolist(), color=_COLOURS[0], alpha=0.6)
    axes.axvline(mark, color=INK, linewidth=1, linestyle="--")
    axes.annotate(f"t = {mark:g}", (mark, 0.97), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top")
    axes.set_yscale("log")
    save(figure, path)


def _title(axes: Axes, title: str, pad: float | None = None) -> None:
    axes.set_title(encodable(title), color=INK, loc="left", fontweight="bold", pad=pad, parse_math=False)


def _label(name: str) -> str:
    """The label of a curve called `name`, for `_legend`: matplotlib takes those that begin with `_` for none."""
    return f".{name}"


def _legend(axes: Axes, **place: Any) -> None:
    """The names of what `_label` labelled; of many curves beside the axes, so that they hide none."""
    if "ncols" not in place and len(axes.get_legend_handles_labels()[1]) > len(_COLOURS):
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    for text in axes.legend(frameon=False, **place).get_texts():
        text.set(text=encodable(text.get_text().removeprefix(".")), parse_math=False)


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = new_figure((8, 5))
    axes = figure.add_subplot()
    _style(axes)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _title(axes, title)
    return figure, axes


def _panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two axes, one above the other, sharing the horizontal one."""
    figure = new_figure((8, 6.4))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2), gridspec_kw={"hspace": 0.08})
    for axes in (upper, lower):
        _style(axes)
    figure.align_ylabels()
    _title(upper, title, pad=26)
    return figure, (upper, lower)


def _style(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(color="#999999", labelcolor=INK)


def _lines(series: Mapping[str, Values]) -> Iterator[tuple[str, Values, dict[str, Any]]]:
    """Name, values and look of each series: colour, and where all were used already, another kind of line."""
    looks = ({"color": colour, "linestyle": style} for style in cycle(_STYLES) for colour in _COLOURS)
    for (name, values), look in zip(series.items(), looks, strict=False):
        yield name, values, look


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
    return (np.append(edges[starts], edges[last]), [np.add.reduceat(counts[:last], starts) for counts in histograms])


def _mark_thresholds(upper: Axes, lower: Axes, thresholds: Mapping[str, float]) -> None:
    """A dashed line through both panels for each threshold, its name written along it in the upper one."""
    for name, score in thresholds.items():
        for axes in (upper, lower):
            axes.axvline(score, color=INK, linewidth=1, linestyle=(0, (4, 3)))
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
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
