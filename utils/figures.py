"""What charts and sheets of faces have in common: the figure, its fonts and texts, and the PNG that it becomes.

Drawing goes through matplotlib's object interface and its Agg renderer, so it needs no display and leaves alone
whatever figures and settings a caller has. matplotlib is imported when the first picture is drawn: a program that draws
none does not wait for it. A picture is written under a temporary name and then renamed: no reader sees half of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from data.images import encode_png
from utils.files import atomic_write
from utils.texts import encodable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

DPI = 120
INK = "#333333"
# Pixels around texts, and between the faces of a sheet.
GAP = 4

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


def with_any_names(draw: Callable[P, None]) -> Callable[P, None]:
    """`draw`, with the fonts that there are; letters that none of them has are boxes, and not a warning each."""

    @wraps(draw)
    def drawing(*arguments: P.args, **options: P.kwargs) -> None:
        import matplotlib

        families = [*matplotlib.rcParams["font.family"], *_other_fonts()]
        with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            draw(*arguments, **options)

    return drawing


def new_figure(inches: tuple[float, float] | None = None) -> Figure:
    """An empty figure, as wide and as high as `inches` say."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(inches, DPI)
    FigureCanvasAgg(figure)
    return figure


def resize(figure: Figure, width: float, height: float) -> None:
    """Make the figure as wide and as high as so many pixels."""
    # matplotlib before 3.10 rounds down, and 467 / 120 * 120 may be a little less than 467.
    figure.set_size_inches((width + 0.1) / figure.dpi, (height + 0.1) / figure.dpi)


def draw_text(figure: Figure, x: float, y: float, text: str, fontsize: int, va: Any) -> Text:
    """Put a text into the figure, a name with dollars in it as it is and not as a formula."""
    return figure.text(x, y, encodable(text), fontsize=fontsize, color=INK, va=va, parse_math=False)


def text_size(figure: Figure, texts: Sequence[str], fontsize: int) -> tuple[int, int]:
    """Pixels that the widest and the highest of the texts take with a gap around, (0, 0) when there are none."""
    width = height = 0
    for text in texts:
        drawn = draw_text(figure, 0, 0, text, fontsize=fontsize, va="baseline")
        box = drawn.get_window_extent()
        drawn.remove()
        width, height = max(width, int(np.ceil(box.width))), max(height, int(np.ceil(box.height)))
    return (width + GAP, height + GAP) if texts else (0, 0)


def save(figure: Figure, path: str | Path, images: Sequence[tuple[NDArray[np.uint8], int, int]] = ()) -> None:
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
    resize(figure, width, height)
    figure.subplots_adjust(left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height)
