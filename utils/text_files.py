"""Lists and tables that people make with programs of their own: in which encoding, and with rows of nothing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a list or table to read, its line ends as they are: UTF-16 where the file says so, as Excel's "Unicode text"
    and PowerShell write, else UTF-8, in which other bytes become surrogates, as in names of files.

    Raises ValueError for UTF-16 that is cut or damaged.
    """
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in _BYTE_ORDER_MARKS else "utf-8-sig"
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as text:
        try:
            yield text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be read as UTF-16, which its first bytes say it is: {error}") from None


def is_empty_row(cells: Sequence[str]) -> bool:
    """Whether a row of a table has nothing in it, as the `;;` that Excel saves behind the last row of a table."""
    return not "".join(cells).strip()


def looks_binary(line: str) -> bool:
    """Whether the first line of a file has control characters, which no list or table has."""
    return any(letter < " " and letter not in "\t\r\n" for letter in line)
