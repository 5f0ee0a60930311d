"""The packages that the product asks for."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_oldest_packages_are_those_that_are_allowed() -> None:
    """`make oldest` runs with what requirements.txt calls the oldest: neither can be changed alone."""
    allowed = dict(re.findall(r"^([a-z-]+)>=([0-9.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    pinned = dict(
        re.findall(
            r"^([a-z-]+)==([0-9.]+?)(?:\.\*)?$", (ROOT / "tests/requirements-oldest.txt").read_text(), re.MULTILINE
        )
    )
    assert len(allowed) == 9
    assert pinned == allowed
