"""What a set can be packed from: records, folders of identities, and the lists that name image files.

A list is a text file, told apart by what is in it:

- face2rec's `.lst`: `aligned  path  label [x1 y1 x2 y2 [landmarks x1..x5, then y1..y5]]`, tab-separated
  (insightface's `face_preprocess.parse_lst_line`); the box is not used, nor are the landmarks of an aligned face (1);
  one that is not aligned (0) needs them, unless faces are going to be found;
- im2rec's `.lst`: `index  label  path`, tab-separated (mxnet's `tools/im2rec.py`);
- CSV with a header, separated by commas, semicolons or tabs: `path` and `label` (or `name`), for landmarks also
  `x1,y1,x2,y2,x3,y3,x4,y4,x5,y5`; a label `7.0` is 7, as pandas writes whole numbers of a column with gaps.

Paths are relative to a folder that the caller names.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from data.face_sets import IDENTITY_NUMBERS, FaceSet, FaceSetError, identity_order, open_face_set
from data.images import ImageError
from data.images_fingerprint import files_digest
from utils.progress import progress_bar
from utils.regular_files import UNREADABLE, read_regular_file
from utils.text_files import is_empty_row, open_text, read_rows
from utils.texts import Texts

LANDMARK_COLUMNS = [f"{axis}{point}" for point in range(1, 6) for axis in "xy"]
FACE2REC_COLUMNS = (3, 7, 17)
_SHOWN = 10 << 20  # bytes of a list from which on reading it shows its progress
_LINES_AT_ONCE = 1 << 14
_NO_LANDMARKS = [math.nan] * 10
_ALIGNED = {None: 0, True: 1, False: 2}


class ListLine(NamedTuple):
    """One image of a list. `landmarks`: x1, y1 .. x5, y5 in pixels, or empty; `aligned`: where the list says it."""

    line: int
    path: str
    identity: str
    landmarks: Sequence[float] = ()
    aligned: bool | None = None


class ListedFaceSet:
    """The images that a list names, identities in the order of `identity_order`, images in the order of the list.

    `detected` says that faces without landmarks are going to be found. Raises FaceSetError, with the number of the
    line, for a list that is not as it should be.
    """

    def __init__(self, path: Path | str, image_root: Path | str | None = None, detected: bool = False) -> None:
        self.path = Path(path)
        #: What the paths of the list are relative to.
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        self._default_root = image_root is None
        # Lists have millions of lines: no object a line.
        codes, lines, landmarks = array("q"), array("q"), array("f")
        names: dict[str, int] = {}
        self._paths, self._aligned = Texts(), bytearray()
        with (
            open_text(self.path) as file,
            progress_bar(size := self.path.stat().st_size, "B", f"lines of {self.path}", disable=size < _SHOWN) as bar,
        ):
            for row in _read_lines(file, self.path):
                if row.aligned is False and not row.landmarks and not detected:
                    raise FaceSetError(
                        f"{self.path}, line {row.line}: the face is not aligned (0) and has no landmarks to do it by: "
                        "add them, find them with --detector, or write 1 if it shall be taken as it is"
                    )
                if row.landmarks and not landmarks:
                    landmarks.extend(_NO_LANDMARKS * len(codes))
                if row.landmarks or landmarks:
                    landmarks.extend(row.landmarks or _NO_LANDMARKS)
                codes.append(names.setdefault(row.identity, len(names)))
                lines.append(row.line)
                if not len(lines) % _LINES_AT_ONCE:
                    bar.update(file.buffer.tell() - bar.n)
                self._aligned.append(_ALIGNED[row.aligned])
                self._paths.append(row.path)
            bar.update(size - bar.n)
        if not codes:
            raise FaceSetError(f"{self.path} names no images")
        #: The number of each image's line in the list, int64 [images], growing.
        self.lines = np.array(lines)
        self._landmarks = np.array(landmarks).reshape(-1, 5, 2)
        texts = list(names)
        order = identity_order(texts)
        self.identities = [texts[code] for code in order]
        self.labels = np.argsort(order)[np.array(codes)]

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, i: int) -> Path:
        """The file of image `i`."""
        return Path(self.image_root, self.relative_file(i))

    def relative_file(self, i: int) -> str:
        """The path of image `i` as the list has it."""
        return self._paths[i]

    def landmarks(self, i: int) -> np.ndarray | None:
        """What to align image `i` by: float32 [5, 2], (x, y) in pixels; None when the list has no landmarks of it."""
        if not len(self._landmarks) or np.isnan(self._landmarks[i, 0, 0]):
            return None
        return self._landmarks[i]

    def is_aligned(self, i: int) -> bool:
        """Whether the list says that image `i` is aligned already, as only face2rec's can."""
        return self._aligned[i] == _ALIGNED[True]

    def is_unaligned(self, i: int) -> bool:
        """Whether image `i` has to be aligned: the list has its landmarks, or says outright that it is not."""
        return self._aligned[i] == _ALIGNED[False] or self.landmarks(i) is not None

    def encoded(self, i: int) -> bytes:
        try:
            return read_regular_file(self.file(i))
        except OSError as error:
            if error.errno in UNREADABLE:
                raise ImageError(f"{self.describe(i)}: {error.strerror}") from None
            relative = self._default_root and not Path(self.relative_file(i)).is_absolute()
            advice = ": paths are relative to the list's folder, or to --image-root" if relative else ""
            raise FaceSetError(f"{self.describe(i)}: {error.strerror or error}{advice}") from None

    def describe(self, i: int) -> str:
        return f"{self.path}, line {self.lines[i]}: {self.file(i)}"

    def part(self, positions: np.ndarray) -> "ListedFaceSet":
        part = copy(self)
        part.lines, part.labels, part.identities = self.lines[positions], self.labels[positions], []
        part._paths = self._paths.part(positions)
        part._aligned = bytearray(self._aligned[i] for i in positions.tolist())
        part._landmarks = self._landmarks[positions] if len(self._landmarks) else self._landmarks
        return part

    def fingerprint(self) -> str:
        """See data/images_fingerprint.py. The bytes are those of the files: what a list says of alignment is no part.

        Raises FaceSetError for a file that is not there.
        """
        images = range(len(self))
        try:
            return files_digest(self, map(self.file, images), [self.relative_file(i) for i in images])
        except OSError as error:
            raise FaceSetError(f"{self.path}: {error.filename}: {error.strerror or error}") from None


def open_source(path: Path | str, image_root: Path | str | None = None, detected: bool = False) -> FaceSet:
    """Open anything that can be packed or unpacked: the sets of `open_face_set`, and lists.

    `image_root` is what the paths of a list are relative to, without it the folder of the list; `detected` is as in
    ListedFaceSet. Raises FaceSetError for anything else.
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".rec":
        return ListedFaceSet(path, image_root, detected)
    return open_face_set(path)


def stamp(path: Path) -> str:
    """Size and time of a file; another content is taken to have another one."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _read_lines(file: TextIO, path: Path) -> Iterator[ListLine]:
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    if "\0" in first:
        pairs = ": pairs of images are tested by all_pair_test.py, not packed" if path.suffix == ".bin" else ""
        raise FaceSetError(f"{path} is no list, for it is no text{pairs}")
    separator = csv_separator(first, "path")
    if not separator and "\t" in first:
        parse = _parse_face2rec if _is_face2rec(first, path) else _parse_im2rec
        for number, line in enumerate(file, 1):
            if line.strip():
                yield parse(number, line.rstrip("\r\n").split("\t"), path)
    else:
        yield from _read_csv(file, path, separator or ",")


def csv_separator(header: str, column: str) -> str:
    """What stands between the columns of `header`, of which one is called `column`: a comma, a semicolon, as Excel
    writes in half of the world, or a tab; nothing where there is no such column."""
    for separator in ",;\t":
        if column in [name.strip().strip('"').lower() for name in header.split(separator)]:
            return separator
    return ""


def _is_face2rec(first: str, path: Path) -> bool:
    """Whether the list is face2rec's: its label is the third field, im2rec's the second, where paths have letters."""
    fields = first.split("\t")
    is_number = [not math.isnan(_number(field)) for field in fields[:3]]
    if is_number[0] and len(fields) >= 3 and is_number[1] != is_number[2]:
        return is_number[2]
    raise FaceSetError(
        f"{path}: its first line {first.strip()[:100]!r} is neither face2rec's 'aligned path label ...' "
        "nor im2rec's 'index label path', tab-separated"
    )


def _parse_face2rec(number: int, fields: list[str], path: Path) -> ListLine:
    where = f"{path}, line {number}"
    if len(fields) not in FACE2REC_COLUMNS:
        raise FaceSetError(
            f"{where}: {len(fields)} columns, expected 3 (aligned path label), 7 (and a box) or 17 (and five landmarks)"
        )
    aligned = fields[0].strip()
    if aligned not in ("0", "1"):
        raise FaceSetError(f"{where}: the first column says whether the face is aligned, 0 or 1, found {fields[0]!r}")
    points = _numbers(fields[7:], where)
    landmarks = [points[k] for point in range(5) for k in (point, point + 5)] if points and aligned == "0" else []
    return ListLine(number, _path(fields[1], where), _label(fields[2], where), landmarks, aligned == "1")


def _parse_im2rec(number: int, fields: list[str], path: Path) -> ListLine:
    where = f"{path}, line {number}"
    if len(fields) != 3:
        raise FaceSetError(f"{where}: {len(fields)} columns, expected 3 (index label path)")
    return ListLine(number, _path(fields[2], where), _label(fields[1], where))


def _read_csv(file: TextIO, path: Path, separator: str) -> Iterator[ListLine]:
    rows = read_rows(file, path, FaceSetError, separator)
    header = [name.strip().lower() for name in next(rows, (1, []))[1]]
    columns = _csv_columns(header, path)
    for line, row in rows:
        if is_empty_row(row):
            continue
        where = f"{path}, line {line}"
        if len(row) != len(header):
            raise FaceSetError(f"{where}: {len(row)} columns, expected {len(header)} as in the header")
        image, identity, *landmarks = (row[column] for column in columns)
        if not identity.strip():
            raise FaceSetError(f"{where}: its label is empty")
        points = _numbers(landmarks, where) if any(text.strip() for text in landmarks) else ()
        yield ListLine(line, _path(image, where), _whole(identity.strip()), points)


def _csv_columns(header: list[str], path: Path) -> list[int]:
    """Positions of path, label and, where the header has them, the ten landmarks."""
    label = "name" if "name" in header and "label" not in header else "label"
    wanted = ["path", label, *(LANDMARK_COLUMNS if set(LANDMARK_COLUMNS) & set(header) else [])]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise FaceSetError(
            f"{path}: its header {','.join(header)[:200]!r} lacks {', '.join(missing)}; expected a .rec file, a "
            "tab-separated .lst, or a CSV with the header path,label and, for landmarks, also "
            + ",".join(LANDMARK_COLUMNS)
        )
    return [header.index(name) for name in wanted]


def _path(text: str, where: str) -> str:
    if not text.strip():
        raise FaceSetError(f"{where}: its path is empty")
    if "\0" in text:
        raise FaceSetError(f"{where}: {text!r} is no path")
    return text.strip()


def _label(text: str, where: str) -> str:
    """The identity number of a list as text; im2rec writes `7.000000` for 7."""
    value = _number(text)
    if not (0 <= value < IDENTITY_NUMBERS and value.is_integer()):
        raise FaceSetError(f"{where}: label {text!r} is no identity number: expected a whole number from 0")
    return str(int(value))


def _whole(label: str) -> str:
    """The label of a CSV, `7` for `7.0`."""
    number, point, zeros = label.partition(".")
    return number if point and number.isascii() and number.isdigit() and not zeros.strip("0") else label


def _numbers(texts: Iterable[str], where: str) -> list[float]:
    values = []
    for text in texts:
        value = _number(text)
        if not math.isfinite(value):  # NumPy takes five times as long, and lists have millions of lines
            raise FaceSetError(f"{where}: {text!r} is no coordinate of a landmark")
        values.append(value)
    return values


def _number(text: str) -> float:
    """The number that a field is; NaN for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan
