"""Files that are either whole or not there: written under a temporary name, synced, then renamed."""

import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A hidden name in the same folder, so that the final rename stays within one file system."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path`, synced, when the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it appears, complete and synced, only when the block ends without error."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8 to `path`, all or nothing."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_csv_atomic(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV with a header line to `path`, all or nothing; names that are no UTF-8 keep their bytes."""
    with (
        atomic_write(path) as file,
        io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="") as text,
    ):
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def require_free(folder: Path | str) -> None:
    """Raise FileExistsError when `folder` is there and not empty: nothing that is there is ever replaced."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: name another output, or remove it first")


@contextmanager
def atomic_folder(folder: Path | str) -> Iterator[Path]:
    """Yield an empty working folder that becomes `folder` when the block ends without error.

    Raises FileExistsError when `folder` exists and is not empty.
    """
    folder = Path(folder).resolve()
    require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    working = temporary_name(folder)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    try:
        yield working
        sync_folder(working)
        working.replace(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(working, ignore_errors=True)
