"""What tables (CSV) say of the images of a test set: groups to break rates down by, and qualities.

    image,pose                          identity,group
    Ann_Lee/Ann_Lee_0001.jpg,frontal    Ann_Lee,A

A row is of an image or of an identity. A column of numbers with more than `MOST_GROUPS` different values is cut at its
quartiles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.face_sets import FaceSetError
from data.set_sources import csv_separator
from utils.evaluation.test_sets import TestSet, keys_of
from utils.text_files import is_empty_row, open_text, read_rows

MOST_GROUPS = 12


class ColumnsError(ValueError):
    """A CSV of columns is not as it should be; the message names file and line."""


@dataclass(frozen=True, eq=False)
class Columns:
    """What a CSV says of images or identities. key: `image` or `identity`. values: by column, then by key."""

    path: Path
    key: str
    values: dict[str, dict[str, str]]

    def of(self, column: str, keys: Sequence[str]) -> list[str]:
        """What `column` says of each of `keys`, images (by their paths in the set) or identities; "" where nothing.

        An image that the CSV does not name by its path is looked for by its file's name. Raises ColumnsError for a
        column that is not there, and when nothing of it fits the keys.
        """
        if column not in self.values:
            raise ColumnsError(f"{self.path} has no column {column!r}, only {', '.join(self.values)}")
        listed = self.values[column]
        found = [listed.get(key, listed.get(key.rsplit("/", 1)[-1], "")) for key in keys]
        if not any(found):
            raise ColumnsError(f"{self.path}: none of its {self.key} names is in the set, such as {keys[0]!r}")
        return found


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each of N things: names, and `of`, int64 [N] into them, -1 where the CSV says nothing."""

    column: str
    names: tuple[str, ...]
    of: NDArray[np.int64]


def read_columns(path: Path | str) -> Columns:
    """Read a CSV (commas, semicolons or tabs) with a header whose first column is `image` or `identity`.

    Raises ColumnsError, with the line, for another header, a line of another length and a key that comes twice.
    """
    path = Path(path)
    with open_text(path) as file:
        first = file.readline()
        file.seek(0)
        separator = csv_separator(first, "image") or csv_separator(first, "identity") or ","
        rows = read_rows(file, path, ColumnsError, separator)
        header = [name.strip() for name in next(rows, (1, []))[1]]
        if len(header) < 2 or header[0] not in ("image", "identity") or len(set(header)) < len(header):
            raise ColumnsError(
                f"{path}, line 1: {','.join(header)!r}: expected 'image' or 'identity', then one column or more"
            )
        values: dict[str, dict[str, str]] = {name: {} for name in header[1:]}
        for line, row in rows:
            if is_empty_row(row):
                continue
            where = f"{path}, line {line}"
            if len(row) != len(header):
                raise ColumnsError(f"{where}: {len(row)} columns, the header has {len(header)}")
            if row[0].strip() in values[header[1]]:
                raise ColumnsError(f"{where}: {row[0].strip()!r} comes twice")
            for name, value in zip(header[1:], row[1:], strict=True):
                values[name][row[0].strip()] = value.strip()
    return Columns(path, header[0], values)


def group_by(columns: Columns, column: str, keys: Sequence[str]) -> Groups:
    """The group of each of some images or identities by `column`; `keys`: as of `Columns.of`, whose errors it raises.

    Empty values are no group. Raises ColumnsError for more than `MOST_GROUPS` groups that are no numbers, too.
    """
    found = columns.of(column, keys)
    try:
        return groups_of(column, found)
    except ValueError as error:
        raise ColumnsError(f"{columns.path}: {error}") from None


def groups_of(column: str, values: Sequence[str]) -> Groups:
    """Groups from a text for each thing; things with an empty one are in none.

    Raises ValueError for more than `MOST_GROUPS` different texts that are no numbers.
    """
    names = sorted(set(values) - {""})
    if len(names) <= MOST_GROUPS:
        number = {name: place for place, name in enumerate(names)}
        return Groups(column, tuple(names), np.array([number.get(value, -1) for value in values], np.int64))
    try:
        numbers = np.array([float(value) if value else np.nan for value in values])
    except ValueError as error:
        raise ValueError(
            f"column {column!r} has {len(names)} different values, which are no numbers ({error}): "
            f"{MOST_GROUPS} groups are the most"
        ) from None
    cuts = np.unique(np.nanquantile(numbers, [0.25, 0.5, 0.75]))
    place = np.where(np.isnan(numbers), -1, np.searchsorted(cuts, numbers, side="right"))
    bounds = [f"{cut:.4g}" for cut in cuts]
    texts = [f"{low} to {high}" for low, high in pairwise(bounds)]
    return Groups(column, (f"below {bounds[0]}", *texts, f"{bounds[-1]} and above"), place.astype(np.int64))


def qualities_by(columns: Columns, column: str, keys: Sequence[str]) -> NDArray[np.float64]:
    """The numbers of `column`, NaN where it says nothing; `keys`: as of `Columns.of`, whose errors it raises.

    Raises ColumnsError for anything but numbers, too.
    """
    texts = columns.of(column, keys)
    try:
        return np.array([float(text) if text else np.nan for text in texts])
    except ValueError as error:
        raise ColumnsError(f"{columns.path}: column {column!r} is no quality, which is a number: {error}") from None


@dataclass(frozen=True)
class Tables:
    """What tables say of the images, by column: groups, and qualities, a number for each image, NaN where unknown.

    The values of the quality `norm` come from the model.
    """

    groups: Mapping[str, Groups] = field(default_factory=dict)
    qualities: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


def read_tables(test_set: TestSet, breakdown: Sequence[str], quality: Sequence[str]) -> Tables:
    """The columns that the settings `test.breakdown` and `test.quality` name, FILE.csv:COLUMN each, or `norm`.

    Raises ColumnsError, and FaceSetError for columns of templates.
    """
    if test_set.ijb is not None:
        if breakdown or set(quality) - {"norm"}:
            what = "--breakdown" if breakdown else "--quality FILE.csv:COLUMN"
            raise FaceSetError(f"{test_set.path}: {what} is for face sets and pairs of images, not templates")
        return Tables()
    groups: dict[str, Groups] = {}
    for spec in breakdown:
        file, _, column = spec.rpartition(":")
        columns = read_columns(file)
        title = column if column not in groups else f"{column} of {file}"
        groups[title] = group_by(columns, column, keys_of(test_set, columns.key))
    qualities: dict[str, NDArray[np.float64]] = {}
    for spec in quality:
        file, _, column = spec.rpartition(":")
        if not file:  # `norm`
            qualities[column] = np.full(len(test_set.images), np.nan)
            continue
        columns = read_columns(file)
        title = f"{column} of {file}" if column in qualities or column == "norm" else column
        qualities[title] = qualities_by(columns, column, keys_of(test_set, columns.key))
    return Tables(groups, qualities)
