"""Lists of pairs of images: LFW's `pairs.txt`, or a CSV `path1,path2,same`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.face_sets import IMAGE_ENDINGS
from data.set_sources import csv_separator
from utils.regular_files import read_regular_file
from utils.text_files import is_empty_row, is_whole_number, open_text, read_rows

#: The header of a list that is a CSV.
COLUMNS = ("path1", "path2", "same")
_FLAGS = {"1": True, "true": True, "0": False, "false": False}


class PairsError(ValueError):
    """A list of pairs is not as it should be; the message names file and line."""


class Pair(NamedTuple):
    """Two image files, whether they show one person, and the line that says so."""

    files: tuple[Path, Path]
    same: bool
    line: int


class PairFiles:
    """The distinct image files of some pairs, as EncodedImages; `index`, int64 [pairs, 2], says which are whose."""

    def __init__(self, pairs: Sequence[Pair], source: Path) -> None:
        self._source = source
        self._files: list[Path] = []
        self._lines: list[int] = []
        position: dict[Path, int] = {}
        for pair in pairs:
            for file in pair.files:
                if position.setdefault(file, len(position)) == len(self._files):
                    self._files.append(file)
                    self._lines.append(pair.line)
        self.index = np.array([[position[file] for file in pair.files] for pair in pairs])

    def __len__(self) -> int:
        return len(self._files)

    def file(self, i: int) -> Path:
        """The file of image `i`."""
        return self._files[i]

    def encoded(self, i: int) -> bytes:
        try:
            return read_regular_file(self._files[i])
        except (OSError, ValueError) as error:  # a ValueError for a name with a zero byte
            raise PairsError(f"{self.describe(i)}: {getattr(error, 'strerror', None) or error}") from None

    def describe(self, i: int) -> str:
        return f"{self._source}, line {self._lines[i]}: {self._files[i]}"

    def part(self, positions: np.ndarray) -> "PairFiles":
        part = PairFiles((), self._source)
        part._files = [self._files[i] for i in positions.tolist()]
        part._lines = [self._lines[i] for i in positions.tolist()]
        return part


def read_pairs(path: Path | str, images: Path | str) -> list[Pair]:
    """The pairs of the list `path`, of images in the folder `images`, in order.

    Raises PairsError for a line that is no pair and for a number of pairs that is not the announced one.
    """
    path, images = Path(path), Path(images)
    with open_text(path) as file:
        lines = list(file)
    first = next((line for line in lines if line.strip()), "")
    separator = csv_separator(first, COLUMNS[0]) or ("," if "," in first and "\t" not in first else "")
    if separator:
        pairs = list(_csv_pairs(lines, path, images, separator))
    else:
        pairs = _lfw_pairs(lines, path, images)
    if not pairs:
        raise PairsError(f"{path} has no pairs")
    return pairs


def _lfw_pairs(lines: Sequence[str], path: Path, images: Path) -> list[Pair]:
    rows = [
        (number, [field.strip() for field in (line.split("\t") if "\t" in line else line.split())])
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    announced = None
    if rows and len(rows[0][1]) <= 2 and all(map(is_whole_number, rows[0][1])):
        announced = _announced([int(field) for field in rows.pop(0)[1]])
    pairs = [_lfw_pair(number, fields, path, images) for number, fields in rows]
    if announced not in (None, len(pairs)):
        raise PairsError(f"{path}: its first line announces {announced} pairs, found {len(pairs)}: copy it again")
    return pairs


def _announced(counts: Sequence[int]) -> int:
    """`10 300`: ten folds of 300 pairs of each kind; `1100`: one."""
    return 2 * counts[-1] * (counts[0] if len(counts) == 2 else 1)


def _lfw_pair(number: int, fields: Sequence[str], path: Path, images: Path) -> Pair:
    if len(fields) not in (3, 4):
        raise PairsError(f"{path}, line {number}: {len(fields)} columns, expected 'name i j' or 'name1 i name2 j'")
    first, second = (fields[0], fields[1]), (fields[-2] if len(fields) == 4 else fields[0], fields[-1])
    files = [_image_file(images, name, _number(image, path, number)) for name, image in (first, second)]
    return Pair((files[0], files[1]), len(fields) == 3, number)


def _number(text: str, path: Path, line: int) -> int:
    if not is_whole_number(text):
        raise PairsError(
            f"{path}, line {line}: {text[:100]!r} is no number of an image, as in 'name i j' or 'name1 i name2 j': "
            f"paths go into a CSV with the header {','.join(COLUMNS)}"
        )
    return int(text)


def _image_file(images: Path, name: str, number: int) -> Path:
    """Image `number` of a person, whatever its ending; the .jpg when there is none, for the message."""
    jpeg = images / name / f"{name}_{number:04d}.jpg"
    if jpeg.exists():
        return jpeg
    endings = sorted(IMAGE_ENDINGS)
    others = (jpeg.with_name(jpeg.stem + ending) for ending in (*endings, *map(str.upper, endings)))
    return next((file for file in others if file.exists()), jpeg)


def _listed(images: Path, text: str) -> Path:
    """The file that a cell names; blanks at its ends belong to the name where there is such a file."""
    exact = images / text
    return exact if text != text.strip() and exact.is_file() else images / text.strip()


def _csv_pairs(lines: Sequence[str], path: Path, images: Path, separator: str) -> Iterator[Pair]:
    rows = read_rows(lines, path, PairsError, separator)
    header = [name.strip().lower() for name in next(rows)[1]]
    if header != list(COLUMNS):
        raise PairsError(f"{path}: its header is {','.join(header)!r}, expected {','.join(COLUMNS)}")
    for line, row in rows:
        if is_empty_row(row):
            continue
        where = f"{path}, line {line}"
        if len(row) != 3:
            raise PairsError(f"{where}: {len(row)} columns, expected 3 (path1,path2,same)")
        first, second, flag = row
        same = _FLAGS.get(flag.strip().lower())
        if same is None:
            raise PairsError(f"{where}: {flag!r} does not say whether it is one person, 1 or 0")
        yield Pair((_listed(images, first), _listed(images, second)), same, line)
