"""What tests share: where the real faces are, and the tiny sets that several of them use."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def face_data() -> Path:
    """The folder of real faces and weights (`FACE_DATA`); without it the test is skipped, in CI it fails."""
    folder = Path(os.environ.get("FACE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        message = f"FACE_DATA: {folder} does not exist, so nothing is tested on real faces"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
