"""The pictures: valid PNGs with the right content, written atomically, nothing global touched."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from utils.plots import draw_contact_sheet, draw_curves, draw_roc, draw_score_histogram

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


def contact_sheet(path: Path) -> None:
    draw_contact_sheet(path, faces(5), 3, "title", ["one", "two"])


def faces(count: int, height: int = 20, width: int = 16) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, size=(count, height, width, 3), dtype=np.uint8)


def read_rgb(path: Path) -> NDArray[np.uint8]:
    image = cv2.imread(str(path))
    assert image is not None
    return np.asarray(image[..., ::-1])


DRAWERS = [roc, histogram, curves, contact_sheet]


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


def test_import_is_light_and_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    """Protects start-up time and callers' own figures: no matplotlib on import, no pyplot ever."""
    program = (
        "import sys, utils.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.draw_curves({str(tmp_path / 'c.png')!r}, {{'a': ([1, 2], [3, 4])}}, 'x', 'y', 't')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)
