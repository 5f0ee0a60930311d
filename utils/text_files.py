"""Lists and tables that people make with programs of their own: in which encoding, and with rows of nothing."""

import csv
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from utils.regular_files import open_file_or_pipe

# Digits: more do not fit into 64 bits, and Python refuses thousands of them.
_LONGEST_NUMBER = 18
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a list or table to read, its line ends as they are: UTF-16 where the file says so, as Excel's "Unicode text"
    and PowerShell write, else UTF-8, in which other bytes become surrogates, as in names of files. A pipe may be one.

    Raises ValueError for UTF-16 that is cut or damaged, OSError for what is neither a file nor a pipe that has an end.
    """
    file = open_file_or_pipe(path)
    encoding = "utf-16" if file.read(2) in _BYTE_ORDER_MARKS else "utf-8-sig"
    file.seek(0)
    with TextIOWrapper(file, encoding=encoding, errors="surrogateescape", newline="") as text:
        try:
            yield text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be read as UTF-16, which its first bytes say it is: {error}") from None


def is_whole_number(text: str) -> bool:
    """Whether `int` takes the text for a number from 0 that fits into 64 bits, blanks not allowed."""
    return text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER


def read_whole_numbers(path: Path) -> NDArray[np.int64]:
    """The lines of a text file of whole numbers with white space between, int64 [lines, columns]; of size 0 if there
    are none. Raises ValueError, naming row and column, for anything else and for lines of unequal length.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a file without data
        warnings.simplefilter("error", DeprecationWarning)  # NumPy 2.0 takes 2.5 for 2, and only warns
        return np.loadtxt(path, dtype=np.int64, ndmin=2, comments=None)


def read_rows(
    lines: Iterable[str], path: Path, error: type[ValueError], delimiter: str = ",", first_line: int = 1
) -> Iterator[tuple[int, list[str]]]:
    """The rows of the CSV `path`, each with the line in which it begins: a cell may have line ends in it.

    `first_line`: the number of the first of `lines`. Raises `error`, with path and line, for quotes that are not
    closed, which would swallow the rows behind them, or have something behind.
    """
    rows, begun = csv.reader(lines, delimiter=delimiter, strict=True), first_line
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as wrong:
            remark = 'is a quote (") not closed, or does something follow it?'
            raise error(f"{path}, line {begun}: {wrong}: {remark}") from None
        yield begun, row
        begun = first_line + rows.line_num


def is_empty_row(cells: Sequence[str]) -> bool:
    """Whether a row of a table has nothing in it, as the `;;` that Excel saves behind the last row of a table."""
    return not "".join(cells).strip()
