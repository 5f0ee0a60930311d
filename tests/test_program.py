"""What machines compare to know that they run the same program."""

from pathlib import Path

import pytest

from utils.program import program_facts


@pytest.mark.parametrize(
    ("changed", "noticed"),
    [("train.py", True), ("models/heads/dense.py", True), ("utils/training/step.py", True), ("config.py", False),
     ("tests/test_step.py", False)],
)  # fmt: skip
def test_another_program_is_noticed(tmp_path: Path, changed: str, noticed: bool) -> None:
    """Its sources at any depth; but settings are compared one by one, and tests do not run."""
    for name in ("train.py", "config.py", "data/faces.py", "models/heads/dense.py", "utils/training/step.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("value = 1\n")
    before = program_facts(tmp_path)
    path = tmp_path / changed
    path.parent.mkdir(exist_ok=True)
    path.write_text("value = 2\n")
    assert (program_facts(tmp_path) != before) == noticed


def test_the_program_itself_is_found() -> None:
    """Not an empty folder, which would be like any other."""
    assert int(program_facts()["the program"].split()[0]) > 100
