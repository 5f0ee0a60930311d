"""What prepare_data leaves in a folder."""

import csv
from pathlib import Path

from data.prepare_data import JOURNAL, TABLE


def tree(output: Path) -> dict[str, bytes]:
    """{relative path: bytes} of all images below `output`."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name not in (JOURNAL, TABLE)
    }


def drop_lines(journal: Path, *dropped: int) -> None:
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for number, line in enumerate(lines) if number not in dropped))


def table(output: Path) -> list[tuple[str, ...]]:
    """The rows of prepared.csv, without the header."""
    header, *rows = csv.reader((output / TABLE).read_text().splitlines())
    assert header == ["key", "label", "identity", "file"]
    return [tuple(row) for row in rows]
