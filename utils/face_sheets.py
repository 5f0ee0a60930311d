"""Sheets of faces to look at, each written as one PNG: grids with a text for each row, pairs with captions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.figures import GAP, draw_text, new_figure, resize, save, text_size, with_any_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@with_any_names
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

    figure = new_figure()
    title_width, title_height = text_size(figure, [title] if title else [], fontsize=11)
    labels_width, _ = text_size(figure, row_labels or [], fontsize=9)
    left = labels_width + GAP if row_labels else 0
    width = max(left + sheet.shape[1], title_width + 2 * GAP)
    height = title_height + GAP + sheet.shape[0] if title else sheet.shape[0]
    resize(figure, width, height)

    if title:
        draw_text(figure, GAP / width, 1 - GAP / height, title, fontsize=11, va="top")
    pitch = (sheet.shape[0] - GAP) / rows
    for row, label in enumerate(row_labels or []):
        middle = sheet.shape[0] - GAP / 2 - (row + 0.5) * pitch
        draw_text(figure, GAP / width, middle / height, label, fontsize=9, va="center_baseline")
    save(figure, path, [(sheet, height - sheet.shape[0], left)])


def in_square(face: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A face, uint8 [H, W, 3], in the middle of a white square of `side` pixels, made larger or smaller to fit."""
    square = np.full((side, side, 3), 255, np.uint8)
    height, width = (max(1, round(side * length / max(face.shape[:2]))) for length in face.shape[:2])
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = cv2.resize(face, (width, height), interpolation=cv2.INTER_AREA)
    return square


@with_any_names
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
    figure = new_figure()
    cell_height, cell_width = cells[0].shape[:2]
    line_height = text_size(figure, ["Ag"], fontsize=8)[1]
    pitch = cell_height + line_height * len(captions[0]) + GAP
    across, down = min(columns, len(pairs)), -(-len(pairs) // columns)
    title_width, title_height = text_size(figure, [title], fontsize=11)
    width = max(across * (cell_width + 2 * GAP), title_width + 2 * GAP)
    height = title_height + 2 * GAP + down * pitch
    places = [
        (title_height + 2 * GAP + number // columns * pitch, number % columns * (cell_width + 2 * GAP))
        for number in range(len(pairs))
    ]
    resize(figure, width, height)
    draw_text(figure, GAP / width, 1 - GAP / height, title, fontsize=11, va="top")
    for lines, (top, left) in zip(captions, places, strict=True):
        for number, line in enumerate(lines):
            x, y = left + GAP, top + cell_height + number * line_height
            text = _fitting(figure, line, cell_width - GAP)
            draw_text(figure, x / width, 1 - y / height, text, fontsize=8, va="top")
    save(figure, path, [(cell, top, left) for cell, (top, left) in zip(cells, places, strict=True)])


def tile(images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """The images in one white array, `GAP` pixels between and around them."""
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
    height, width = shape[0] + GAP, shape[1] + GAP
    across = min(columns, len(images))
    sheet = np.full((-(-len(images) // columns) * height + GAP, across * width + GAP, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * height + GAP, (index % columns) * width + GAP
        sheet[top : top + shape[0], left : left + shape[1]] = image
    return sheet


def _fitting(figure: Figure, text: str, width: int) -> str:
    """The text, or as much of its two ends as is no wider than `width` pixels in the captions' size."""

    def wide(shown: str) -> bool:
        return text_size(figure, [shown], fontsize=8)[0] - GAP > width

    def ends(kept: int) -> str:
        return f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"

    if not wide(text):
        return text
    return ends(max(2, bisect_left(range(len(text)), True, key=lambda kept: wide(ends(kept))) - 1))
