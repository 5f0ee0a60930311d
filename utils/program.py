"""Which program this is, so that machines which were not given the same one can tell."""

import zlib
from pathlib import Path

import torch

# config.py is left out: its settings are compared one by one, and may differ where they are of a machine.
_SOURCES = ("*.py", "data/*.py", "dataset_merge/*.py", "models/**/*.py", "utils/**/*.py")


def program_facts() -> dict[str, str]:
    """The version of torch, and a checksum of the program's sources."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for pattern in _SOURCES for path in root.glob(pattern) if path.name != "config.py")
    checksum = 0
    for path in files:
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return {
        "torch": torch.__version__.split("+")[0],
        "the program": f"{len(files)} .py files (checksum {checksum:08x})",
    }
