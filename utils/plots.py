"""Pictures of what the tests and the training measured, each written as one PNG.

Drawing goes through matplotlib's object interface and its Agg renderer, so it needs no display and leaves alone
whatever figures and settings a caller has. matplotlib is imported when the first picture is drawn: a program that draws
none does not wait for it. A picture is written under a temporary name and then renamed: no reader sees half of one.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.images import encode_png
from utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

# Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow, which is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK = "#333333"
_DPI = 120

# Bars across the range of scores in a histogram, at most and at least.
_BARS = (20, 160)

# Pixels between the faces of a contact sheet, and between them and the texts.
_GAP = 4

# Names of people are in any writing. These fonts, where the system has them, have the letters that matplotlib's lacks.
_OTHER_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",
    "Malgun Gothic", "Apple SD Gothic Neo",
)  # fmt: skip

P = ParamSpec("P")


@cache
def _other_fonts() -> list[str]:
    from matplotlib import font_manager

    known = set(font_manager.get_font_names())
    return [name for name in _OTHER_FONTS if name in known]


def _with_any_names(draw: Callable[P, None]) -> Callable[P, None]:
    """`draw`, with the fonts that there are; letters that none of them has are boxes, and not a warning each."""

    @wraps(draw)
    def drawing(*arguments: P.args, **options: P.kwargs) -> None:
        import matplotlib

        families = [*matplotlib.rcParams["font.family"], *_other_fonts()]
        with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            draw(*arguments, **options)

    return drawing


@_with_any_names
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
    _legend(axes, loc="lower right")
    _save(figure, path)


@_with_any_names
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
    _legend(linear, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2)
    logarithmic.set_yscale("log")
    logarithmic.set_xlabel("score")
    _mark_thresholds(linear, logarithmic, marks)
    _save(figure, path)


@_with_any_names
def draw_curves(
    path: str | Path,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    xlabel: str,
    ylabel: str,
    title: str,
    highest: float = np.inf,
) -> None:
    """Lines over the steps of a training: loss, accuracy, learning rate.

    curves: for each name the steps and the values, of equal length. A curve of one point is drawn as a dot.
    highest: what values can be at most; the axis does not go on beyond.

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
    lower, upper = axes.get_ylim()
    axes.set_ylim(top=min(upper, highest + 0.02 * (upper - lower)))  # room for the line
    _legend(axes, loc="best")
    _save(figure, path)


@_with_any_names
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
    sheet = tile(images, columns)
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

    if title:
        _text(figure, _GAP / width, 1 - _GAP / height, title, fontsize=11, va="top")
    pitch = (sheet.shape[0] - _GAP) / rows
    for row, label in enumerate(row_labels or []):
        middle = sheet.shape[0] - _GAP / 2 - (row + 0.5) * pitch
        _text(figure, _GAP / width, middle / height, label, fontsize=9, va="center_baseline")
    _save(figure, path, [(sheet, height - sheet.shape[0], left)])


@_with_any_names
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
    for (name, (far, frr)), colour in zip(points.items(), _cycle(len(points)), strict=True):
        label = name if len(far) else f"{name} (no errors to show)"
        axes.plot(far, frr, label=label, color=colour, linewidth=1.8, drawstyle="steps-pre")
    axes.set_xlim(min(0.1, 0.8 * min(float(far[0]) for far, _ in drawn)), 1.0)
    axes.set_ylim(min(0.1, 0.8 * min(float(frr.min()) for _, frr in drawn)), 1.0)
    axes.grid(True, which="minor", color="#f0f0f0", linewidth=0.5)
    _legend(axes, loc="best")
    _save(figure, path)


@_with_any_names
def draw_rejection(path: str | Path, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str) -> None:
    """Errors that are left when the pairs of the lowest quality are rejected, in percent.

    curves: for each name the share of pairs rejected and the false reject rate of the rest, of equal length, 0..1.

    Raises ValueError if there is no curve.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    figure, axes = _axes(title, "pairs rejected for low quality, %", "false rejects among the rest, %")
    for (name, (rejected, error)), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
        x, y = 100 * np.asarray(rejected, np.float64), 100 * np.asarray(error, np.float64)
        axes.plot(x, y, label=name, color=colour, linewidth=1.8, marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    _legend(axes, loc="best")
    _save(figure, path)


@_with_any_names
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
    figure = _chart_figure(8, 1.4 + 0.22 * len(rows) * (len(series) + 0.6))
    axes = figure.add_subplot()
    _style(axes)
    height = 0.8 / len(series)
    for position, ((name, numbers), colour) in enumerate(zip(series.items(), _cycle(len(series)), strict=True)):
        places = np.arange(len(rows)) - 0.4 + (position + 0.5) * height
        axes.barh(places, numbers, height=0.9 * height, color=colour, alpha=0.75, label=name)
        if name in bounds:
            low, high = bounds[name].T
            error = np.stack([numbers - low, high - numbers]).clip(0)
            axes.errorbar(numbers, places, xerr=error, fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
    axes.set_yticks(np.arange(len(rows)), [_shown(row) for row in rows], parse_math=False)
    axes.invert_yaxis()
    shown = np.concatenate([*series.values(), *(interval.ravel() for interval in bounds.values())])
    shown = shown[np.isfinite(shown)]
    if shown.size:
        margin = max(0.05 * float(np.ptp(shown)), 0.002 * float(np.abs(shown).max()), 1e-6)
        axes.set_xlim(max(0.0, float(shown.min()) - 4 * margin), float(shown.max()) + margin)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"{xlabel} (the axis does not begin at 0)" if axes.get_xlim()[0] > 0 else xlabel)
    _title(axes, title, pad=26 if len(series) > 1 else None)
    if len(series) > 1:
        _legend(axes, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=len(series))
    _save(figure, path)


@_with_any_names
def draw_marked_scores(path: str | Path, scores: NDArray[np.floating], mark: float, name: str, label: str) -> None:
    """How often scores [N], N >= 1, are how high, on a logarithmic scale, so that the few near a threshold are seen.

    mark: the threshold, drawn as a line, which may lie outside of the scores. name: what there is a score of. label:
        what the scores are.
    """
    figure, axes = _axes("", label, name)
    low, high = min(float(scores.min()), mark), max(float(scores.max()), mark)
    axes.hist(scores, bins=np.linspace(low - 0.01, high + 0.01, 100).tolist(), color=_COLOURS[0], alpha=0.6)
    axes.axvline(mark, color=_INK, linewidth=1, linestyle="--")
    axes.annotate(f"t = {mark:g}", (mark, 0.97), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top")
    axes.set_yscale("log")
    _save(figure, path)


@_with_any_names
def draw_pair_sheet(
    path: str | Path,
    pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    captions: Sequence[Sequence[str]],
    columns: int,
    title: str,
) -> None:
    """Pairs of faces, row by row from the top left, each pixel as it is, with lines of text under each pair.

    pairs: two uint8 [S, S, 3] RGB each, all of one size. captions: the lines of each pair, as many for all; what is
        too long for the pair is cut off in the middle.

    Raises ValueError if there is no pair, sizes differ or captions do not fit.
    """
    if not pairs or len(captions) != len(pairs) or len({len(lines) for lines in captions}) != 1:
        raise ValueError(f"{len(pairs)} pairs need captions of as many lines each, got {len(captions)} captions")
    cells = [tile(list(pair), 2) for pair in pairs]
    if len({cell.shape for cell in cells}) != 1:
        raise ValueError("the pairs are not of one size")
    figure = _blank_figure()
    cell_height, cell_width = cells[0].shape[:2]
    line_height = _text_size(figure, ["Ag"], fontsize=8)[1]
    pitch = cell_height + line_height * len(captions[0]) + _GAP
    across, down = min(columns, len(pairs)), -(-len(pairs) // columns)
    title_width, title_height = _text_size(figure, [title], fontsize=11)
    width = max(across * (cell_width + 2 * _GAP), title_width + 2 * _GAP)
    height = title_height + 2 * _GAP + down * pitch
    places = [
        (title_height + 2 * _GAP + number // columns * pitch, number % columns * (cell_width + 2 * _GAP))
        for number in range(len(pairs))
    ]
    figure.set_size_inches(width / _DPI, height / _DPI)
    _text(figure, _GAP / width, 1 - _GAP / height, title, fontsize=11, va="top")
    for lines, (top, left) in zip(captions, places, strict=True):
        for number, line in enumerate(lines):
            x, y = left + _GAP, top + cell_height + number * line_height
            text = _fitting(figure, line, cell_width - _GAP)
            _text(figure, x / width, 1 - y / height, text, fontsize=8, va="top")
    _save(figure, path, [(cell, top, left) for cell, (top, left) in zip(cells, places, strict=True)])


def _fitting(figure: Figure, text: str, width: int) -> str:
    """The text, or as much of its two ends as is no wider than `width` pixels in the captions' size."""

    def wide(shown: str) -> bool:
        return _text_size(figure, [shown], fontsize=8)[0] - _GAP > width

    def ends(kept: int) -> str:
        return f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"

    if not wide(text):
        return text
    return ends(max(2, bisect_left(range(len(text)), True, key=lambda kept: wide(ends(kept))) - 1))


def _shown(text: str) -> str:
    """The text as it can be drawn: names of files may hold bytes that are no characters."""
    return text.encode(errors="replace").decode()


def _text(figure: Figure, x: float, y: float, text: str, fontsize: int, va: Any) -> Text:
    """Put a text into the figure, a name with dollars in it as it is and not as a formula."""
    return figure.text(x, y, _shown(text), fontsize=fontsize, color=_INK, va=va, parse_math=False)


def _title(axes: Axes, title: str, pad: float | None = None) -> None:
    axes.set_title(_shown(title), color=_INK, loc="left", fontweight="bold", pad=pad, parse_math=False)


def _legend(axes: Axes, **place: Any) -> None:
    for text in axes.legend(frameon=False, **place).get_texts():
        text.set(text=_shown(text.get_text()), parse_math=False)


def _save(figure: Figure, path: str | Path, images: Sequence[tuple[NDArray[np.uint8], int, int]] = ()) -> None:
    """Draw the figure, put the `images` (uint8 [H, W, 3], top and left pixel of each) over it, and write it."""
    if figure.axes:
        _make_room(figure)
    # Figure.savefig draws twice, and compresses faces, which figimage resamples, ten times as long as it draws.
    canvas: Any = figure.canvas
    canvas.draw()
    pixels = np.array(np.asarray(canvas.buffer_rgba())[..., :3])
    for image, top, left in images:
        pixels[top : top + image.shape[0], left : left + image.shape[1]] = image
    with atomic_write(path) as file:
        file.write(encode_png(pixels))


def _make_room(figure: Figure) -> None:
    """Move the edges of the axes, which are above one another, so that the texts around them fit into the figure; where
    these would take more than half of it, as long names or many do, the figure grows instead.
    """
    canvas: Any = figure.canvas
    renderer = canvas.get_renderer()
    inner = [axes.get_window_extent(renderer) for axes in figure.axes]
    outer: list[Any] = [axes.get_tightbbox(renderer, for_layout_only=True) for axes in figure.axes]
    pad = 0.1 * figure.dpi
    left = max(axes.x0 - texts.x0 for axes, texts in zip(inner, outer, strict=True)) + pad
    right = max(texts.x1 - axes.x1 for axes, texts in zip(inner, outer, strict=True)) + pad
    bottom, top = inner[-1].y0 - outer[-1].y0 + pad, outer[0].y1 - inner[0].y1 + pad
    width, height = figure.bbox.size
    if left + right > width / 2:
        width = left + inner[0].width + right
    if bottom + top > height / 2:
        height = bottom + inner[0].y1 - inner[-1].y0 + top
    figure.set_size_inches(width / figure.dpi, height / figure.dpi)
    figure.subplots_adjust(left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height)


def _blank_figure() -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _chart_figure(width: float, height: float) -> Figure:
    """A figure of that many inches."""
    figure = _blank_figure()
    figure.set_size_inches(width, height)
    return figure


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = _chart_figure(8, 5)
    axes = figure.add_subplot()
    _style(axes)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _title(axes, title)
    return figure, axes


def _panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two axes, one above the other, sharing the horizontal one."""
    figure = _chart_figure(8, 6.4)
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
    return (np.append(edges[starts], edges[last]), [np.add.reduceat(counts[:last], starts) for counts in histograms])


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


def tile(images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
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
        drawn = _text(figure, 0, 0, text, fontsize=fontsize, va="baseline")
        box = drawn.get_window_extent()
        drawn.remove()
        width, height = max(width, int(np.ceil(box.width))), max(height, int(np.ceil(box.height)))
    return (width + _GAP, height + _GAP) if texts else (0, 0)
