"""The pictures: valid PNGs with the right content, written atomically, nothing global touched."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from utils import plots
from utils.face_sheets import draw_contact_sheet, draw_pair_sheet
from utils.plots import (
    draw_bars,
    draw_curves,
    draw_det,
    draw_marked_scores,
    draw_rejection,
    draw_roc,
    draw_score_histogram,
)

FAR = np.geomspace(1e-6, 1, 50)


def roc(path: Path) -> None:
    draw_roc(path, {"a": (FAR, FAR**0.01), "b": (np.append(0.0, FAR), np.append(0.0, FAR**0.02))}, "title")


def histogram(path: Path) -> None:
    edges = np.linspace(-1, 1, 4097)
    middle = (edges[1:] + edges[:-1]) / 2
    impostor = (1e6 * np.exp(-((middle / 0.1) ** 2))).astype(np.int64)
    genuine = (1e3 * np.exp(-(((middle - 0.6) / 0.1) ** 2))).astype(np.int64)
    draw_score_histogram(path, genuine, impostor, edges, "title", {"FAR 1e-3": 0.3, "outside": 0.99})


def curves(path: Path) -> None:
    draw_curves(path, {"loss": (range(100), np.linspace(9, 1, 100)), "once": ([50], [4.0])}, "step", "loss", "title")


def test_an_axis_ends_where_values_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accuracy that stays what it is has no axis up to 105 %."""
    tops = []
    monkeypatch.setattr(plots, "save", lambda figure, path: tops.append(figure.axes[0].get_ylim()[1]))
    curve = {"lfw": ([0, 9], [100.0, 100.0])}
    draw_curves(tmp_path / "a.png", curve, "step", "accuracy, %", "run", highest=100.0)
    draw_curves(tmp_path / "a.png", curve, "step", "loss", "run")
    draw_curves(tmp_path / "a.png", {"lfw": ([0, 9], [90.0, 95.0])}, "step", "accuracy, %", "run", highest=100.0)
    assert 100 < tops[0] < 100.5
    assert tops[1] > 102
    assert tops[2] < 96


def test_many_curves_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a look of its own, a name whatever it begins with, and none lies under the names of many."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    names = [f"_set {number}" for number in range(11)]
    draw_curves(tmp_path / "a.png", {name: (range(50), range(50)) for name in names}, "step", "accuracy", "run")
    draw_curves(tmp_path / "a.png", {"_one": ([0, 1], [1, 2])}, "step", "accuracy", "run")
    (many,), (one,) = (figure.axes for figure in figures)
    assert len({(line.get_color(), line.get_linestyle()) for line in many.get_lines()}) == 11
    assert [text.get_text() for text in many.get_legend().get_texts()] == names
    assert [text.get_text() for text in one.get_legend().get_texts()] == ["_one"]
    many.figure.canvas.draw()
    assert many.get_legend().get_window_extent().x0 >= many.get_window_extent().x1


def test_bars_of_nothing_have_an_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody is accepted, the axis is not a millionth of a percent long."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    draw_bars(tmp_path / "a.png", ["a"], {"model": [0.0]}, None, "title", "TAR, %")
    assert figures[0].axes[0].get_xlim() == (0.0, 1.0)


def contact_sheet(path: Path) -> None:
    draw_contact_sheet(path, faces(5), 3, "title", ["one", "two"])


def det(path: Path) -> None:
    draw_det(path, {"a": (FAR, 0.01 / FAR**0.2), "b": (FAR, 0.02 / FAR**0.2), "none": (FAR, 0 * FAR)}, "title")


def rejection(path: Path) -> None:
    shares = np.linspace(0, 0.3, 16)
    draw_rejection(path, {"a": (shares, 0.05 - 0.1 * shares), "b": (shares, np.full(16, np.nan))}, "title")


def bars(path: Path) -> None:
    values = {"a": [99.0, np.nan], "b": [98.0, 97.0]}
    draw_bars(path, ["one", "two"], values, {"a": [(98.5, 99.5), (np.nan, np.nan)]}, "title", "TAR, %")


def long_bars(path: Path) -> None:
    draw_bars(
        path, ["a group of people with a long name (1,234 genuine pairs)"], {"a": [99.0]}, None, "title", "TAR, %"
    )


def marked(path: Path) -> None:
    draw_marked_scores(path, np.linspace(0.1, 0.5, 1000), 0.8, "identities", "cosine")


def pair_sheet(path: Path) -> None:
    draw_pair_sheet(path, pairs(5), [("cosine 0.5", "Žluťoučký_kůň_0001.jpg")] * 5, 2, "title")


def pairs(count: int) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    images = list(faces(2 * count, 112, 112))
    return list(zip(images[0::2], images[1::2], strict=True))


def faces(count: int, height: int = 20, width: int = 16) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, size=(count, height, width, 3), dtype=np.uint8)


def read_rgb(path: Path) -> NDArray[np.uint8]:
    image = cv2.imread(str(path))
    assert image is not None
    return np.asarray(image[..., ::-1])


def many_curves(path: Path) -> None:
    draw_roc(path, {f"set {number}": (FAR, FAR**0.01) for number in range(40)}, "title")


def long_curve(path: Path) -> None:
    draw_curves(path, {150 * "n": ([1, 2], [3, 4])}, "step", "accuracy", "title")


def many_bars(path: Path) -> None:
    draw_bars(path, ["one", "two"], {f"model in a folder {number}": [99.0, 98.0] for number in range(6)}, None, "", "")


DRAWERS = [
    roc, histogram, curves, contact_sheet, det, rejection, bars, long_bars, marked, pair_sheet, many_curves, long_curve,
    many_bars,
]  # fmt: skip

#: The name of a folder whose bytes are no UTF-8, and no formula though it has dollars.
ODD = "Andr\udce9 $x_{$"


@pytest.mark.parametrize(("draw", "shape"), [(roc, (600, 960, 3)), (histogram, (768, 960, 3)), (curves, (600, 960, 3))])
def test_charts_are_pngs_of_the_stated_size(
    draw: Callable[[Path], None], shape: tuple[int, int, int], tmp_path: Path
) -> None:
    """Protects that a chart is a decodable PNG of its size with both series' colours in it, and the only file left."""
    path = tmp_path / "chart.png"
    draw(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = read_rgb(path)
    assert image.shape == shape
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (image == colour).all(axis=2).sum() > 10
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("draw", DRAWERS)
def test_an_existing_picture_is_replaced_and_string_paths_work(draw: Callable[[str], None], tmp_path: Path) -> None:
    """Protects redrawing the same picture after each epoch."""
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    draw(str(path))
    assert read_rgb(path).size > 0


@pytest.mark.parametrize("draw", DRAWERS)
def test_no_text_is_cut_off(draw: Callable[[Path], None], tmp_path: Path) -> None:
    """Protects labels, however wide or many, from running out of the picture or ending a training or a test that has
    them, and charts from wide margins around them."""
    draw(tmp_path / "picture.png")
    drawn = (read_rgb(tmp_path / "picture.png") < 255).any(axis=2)
    for side in (drawn, drawn[::-1], drawn.T, drawn.T[::-1]):
        margin = int(side.any(axis=1).argmax())
        assert margin >= 1, "something runs out of the picture"
        assert margin <= 40 or draw in (contact_sheet, pair_sheet)


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: draw_roc(path, {ODD: (FAR, FAR**0.01)}, ODD),
        lambda path: draw_score_histogram(path, *np.ones((2, 4), np.int64), np.linspace(-1, 1, 5), ODD),
        lambda path: draw_bars(path, [ODD], {ODD: [99.0], "b": [98.0]}, None, ODD, "TAR, %"),
        lambda path: draw_contact_sheet(path, faces(2), 2, ODD, [ODD]),
        lambda path: draw_pair_sheet(path, pairs(1), [[ODD, 9 * ODD]], 1, ODD),
    ],
)
def test_odd_names_are_drawn(draw: Callable[[Path], None], tmp_path: Path) -> None:
    """Protects pictures of people and sets whose names matplotlib cannot draw, or takes for formulas."""
    draw(tmp_path / "picture.png")
    assert (read_rgb(tmp_path / "picture.png") < 255).any()


def test_names_in_any_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no font has the letters, there is not a warning for each; where one of the system has them, it is used."""
    for fonts in ([], ["DejaVu Sans Mono"]):  # only the latter has U+2335
        monkeypatch.setattr("utils.figures._other_fonts", lambda fonts=fonts: fonts)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_contact_sheet(tmp_path / f"{len(fonts)}.png", faces(2), 2, "王小明", ["\u2335\u2336\u2337"])
    boxes, letters = read_rgb(tmp_path / "0.png"), read_rgb(tmp_path / "1.png")
    assert boxes.shape != letters.shape or (boxes != letters).any()


def test_few_scores_near_the_threshold_are_seen(tmp_path: Path) -> None:
    """Protects the one of ten thousand that a merge's threshold is about: on a linear scale it has no height."""
    scores = np.append(np.full(10_000, 0.1), 0.5)
    draw_marked_scores(tmp_path / "scores.png", scores, 0.45, "identities", "cosine")
    pixels = read_rgb(tmp_path / "scores.png").astype(int)
    blue = pixels[..., 2] - pixels[..., 0] > 80
    assert blue[:, pixels.shape[1] // 2 :].sum() > 100


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Protects the folder from litter when the picture cannot take its place (here that of a folder)."""
    path = tmp_path / "picture.png"
    path.mkdir()
    with pytest.raises(OSError, match=r"picture\.png"):
        curves(path)
    assert list(tmp_path.iterdir()) == [path]


def test_contact_sheet_keeps_every_pixel(tmp_path: Path) -> None:
    """Protects the contact sheet from resampling, swapped colours and a wrong order of the faces."""
    images = faces(5)
    draw_contact_sheet(tmp_path / "sheet.png", images, 3)
    sheet = read_rgb(tmp_path / "sheet.png")
    assert sheet.shape == (2 * 24 + 4, 3 * 20 + 4, 3)
    for index, image in enumerate(images):
        top, left = 4 + 24 * (index // 3), 4 + 20 * (index % 3)
        np.testing.assert_array_equal(sheet[top : top + 20, left : left + 16], image)
    assert (sheet[28:48, 44:60] == 255).all()  # the sixth place stays empty


def test_contact_sheet_texts_do_not_cover_or_shift_faces(tmp_path: Path) -> None:
    """Protects the faces beside labels and under a title longer than the grid, none of which may be cut off."""
    images = list(faces(4))
    title = "a title that is far longer than two small faces"
    draw_contact_sheet(tmp_path / "sheet.png", images, 2, title, ["Žluťoučký kůň", "$b$"])
    sheet = read_rgb(tmp_path / "sheet.png")
    grid = sheet[-52:]
    lefts = [left for left in range(grid.shape[1] - 15) if (grid[4:24, left : left + 16] == images[0]).all()]
    assert len(lefts) == 1
    left = lefts[0]
    np.testing.assert_array_equal(grid[28:48, left + 20 : left + 36], images[3])
    assert (grid[:24, :left] < 128).any(), "no label left of the first row"
    assert (sheet[:-52] < 128).any(), "no title above the grid"
    for border in (sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]):
        assert (border == 255).all(), "a text runs out of the picture"


def test_one_partial_row_is_as_wide_as_its_images(tmp_path: Path) -> None:
    """Protects small sheets from a wide empty margin."""
    draw_contact_sheet(tmp_path / "sheet.png", faces(2), 10)
    assert read_rgb(tmp_path / "sheet.png").shape == (28, 44, 3)


@pytest.mark.parametrize(
    ("images", "columns", "labels", "message"),
    [
        (faces(2), 0, None, "columns must be at least 1"),
        (faces(0), 2, None, "no image"),
        ([faces(1)[0], faces(1, height=21)[0]], 2, None, "of one size.*image 1 is uint8"),
        (faces(2).astype(np.float32), 2, None, "image 0 is float32"),
        (faces(2)[..., 0], 2, None, "must be uint8"),
        (faces(3), 2, ["one"], "1 labels for 2 rows"),
    ],
)
def test_contact_sheet_refuses_what_it_cannot_tile(
    images: NDArray[np.uint8], columns: int, labels: list[str] | None, message: str, tmp_path: Path
) -> None:
    """Protects callers from a sheet with missing, wrapped-around or mislabelled faces."""
    with pytest.raises(ValueError, match=message):
        draw_contact_sheet(tmp_path / "sheet.png", images, columns, row_labels=labels)


def test_charts_refuse_empty_data(tmp_path: Path) -> None:
    """Protects against blank pictures, and against counts that do not belong to the edges."""
    path, counts, edges = tmp_path / "chart.png", np.ones(4, dtype=np.int64), np.linspace(0, 1, 5)
    with pytest.raises(ValueError, match="no curve"):
        draw_roc(path, {"all at zero": ([0.0, 0.0], [0.1, 0.2])}, "title")
    with pytest.raises(ValueError, match="no curve"):
        draw_curves(path, {}, "x", "y", "title")
    with pytest.raises(ValueError, match="genuine and impostor"):
        draw_score_histogram(path, counts * 0, counts, edges, "title")
    with pytest.raises(ValueError, match="do not fit"):
        draw_score_histogram(path, counts, counts, edges[1:], "title")
    assert not path.exists()


def test_histogram_keeps_all_scores_when_it_joins_bins(tmp_path: Path) -> None:
    """Protects the few genuine scores beside a million impostors: their curve is as high as the impostors'."""
    path = tmp_path / "histogram.png"
    histogram(path)
    upper = read_rgb(path)[:430]
    heights = [
        np.flatnonzero((upper == colour).all(axis=2).sum(axis=1) > 3)[10:].min()
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00))
    ]
    assert abs(heights[0] - heights[1]) < 20


def coloured(path: Path, colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Which pixels of a picture have a colour, bool [H, W]."""
    return np.asarray((read_rgb(path) == colour).all(axis=2))


def test_det_shows_the_better_model_below(tmp_path: Path) -> None:
    """Protects the DET from swapped axes: fewer false rejects lie lower, and a curve without errors stops nothing."""
    det(tmp_path / "det.png")
    better, worse = (
        coloured(tmp_path / "det.png", colour)[:, 100:600] for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0))
    )
    rows = [np.flatnonzero(lines.any(axis=1)).mean() for lines in (better, worse)]
    assert rows[0] > rows[1] + 5
    left, right = (np.flatnonzero(coloured(tmp_path / "det.png", (0, 0x72, 0xB2))[:, columns].any(axis=1)).min()
                   for columns in (slice(100, 200), slice(400, 500)))  # fmt: skip
    assert left < right, "false rejects do not fall with the false accept rate"
    with pytest.raises(ValueError, match="no curve has a point"):
        draw_det(tmp_path / "none.png", {"a": (FAR, 0 * FAR)}, "title")
    assert not (tmp_path / "none.png").exists()


def test_rejection_falls_where_the_errors_do(tmp_path: Path) -> None:
    """Protects the curve's direction, and that a series without numbers (nothing left) draws nothing."""
    rejection(tmp_path / "reject.png")
    blue = coloured(tmp_path / "reject.png", (0, 0x72, 0xB2))
    blue[:, 650:] = False  # the legend
    columns = np.flatnonzero(blue.any(axis=0))
    tops = [np.flatnonzero(blue[:, column]).mean() for column in (columns[2], columns[-3])]
    assert tops[0] < tops[1]
    with pytest.raises(ValueError, match="no curve"):
        draw_rejection(tmp_path / "none.png", {}, "title")


def test_bars_are_as_long_as_their_numbers(tmp_path: Path) -> None:
    """Protects bars from a wrong order of rows or series; a missing number is no bar."""
    path = tmp_path / "bars.png"
    draw_bars(path, ["one", "two", "three"], {"a": [40.0, 80.0, np.nan]}, None, "title", "share, %")
    image = read_rgb(path).astype(int)
    blue = (image[..., 2] - image[..., 0] > 100) & (image[..., 1] > image[..., 0])
    rows = np.flatnonzero(blue.sum(axis=1) > 20)
    lengths = blue[rows].sum(axis=1)
    breaks = np.flatnonzero(np.diff(rows) > 1)
    assert len(breaks) == 1, "two bars, one above the other"
    assert lengths[0] < lengths[-1]
    bars(path)
    for values in ({"a": [1.0]}, {}):
        with pytest.raises(ValueError, match="2 rows need"):
            draw_bars(path, ["one", "two"], values, None, "title", "x")


def test_pair_sheet_keeps_every_pixel_and_its_captions(tmp_path: Path) -> None:
    """Protects the hardest pairs: first and second face side by side, in order, uncovered, with the text below."""
    shown = pairs(5)
    draw_pair_sheet(
        tmp_path / "sheet.png", shown, [("cosine 0.5", "a name too long for two faces" * 5)] * 5, 2, "title"
    )
    sheet = read_rgb(tmp_path / "sheet.png")
    places = []
    for left, right in shown:
        couple = np.concatenate([left, np.full((112, 4, 3), 255, np.uint8), right], axis=1)
        hits = np.argwhere((sheet[:-111, :-227] == couple[0, 0]).all(axis=2))
        found = [(y, x) for y, x in hits if np.array_equal(sheet[y : y + 112, x : x + 228], couple)]
        assert len(found) == 1
        places.append(found[0])
        y, x = found[0]
        assert (sheet[y + 114 : y + 140, x : x + 228] < 128).any(), "no caption"
    assert places == sorted(places)
    assert len({x for _, x in places}) == 2
    for border in (sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]):
        assert (border == 255).all(), "a text runs out of the picture"
    for captions in ([("a",)] * 4, [("a",)] * 4 + [("a", "b")], []):
        with pytest.raises(ValueError, match="captions"):
            draw_pair_sheet(tmp_path / "sheet.png", shown, captions, 2, "title")


def test_import_is_light_and_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    """Protects start-up time and callers' own figures: no matplotlib on import, no pyplot ever."""
    program = (
        "import sys, utils.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.draw_curves({str(tmp_path / 'c.png')!r}, {{'a': ([1, 2], [3, 4])}}, 'x', 'y', 't')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)
