"""Packing that is killed, or runs out of disk: the next run goes on to the same bytes."""

import json
import random
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from data.fitting import Fit
from data.images import encode_png
from packed_photos import FIT, SIZE, SKIP, content, pack_all, photos, spoil


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four people of four images."""
    return photos(tmp_path / "faces", 4, 4)


def killed(source: Path, fit: Fit, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `tests/killed_packing.py` says of `runs`, and `errors`, what they all wrote to stderr."""
    task = json.dumps({"source": str(source), "fit": asdict(fit), "runs": runs})
    program = [sys.executable, ROOT / "tests" / "killed_packing.py", task]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [{"errors": done.stderr, **json.loads(line)} for line in done.stdout.splitlines()]


def test_killed_at_every_file_operation(tmp_path: Path, folder: Path) -> None:
    """Wherever a run is killed, in the journal's writing too, the next one finishes the set, the same byte for byte.

    Or the set was finished: then the next one says so and tidies up. Nothing else is ever left.
    """
    spoil(folder)
    pack_all(folder, tmp_path / "whole", SKIP)
    expected = content(tmp_path / "whole")
    (tmp_path / "count").mkdir()
    operations = killed(folder, SKIP, [{"output": str(tmp_path / "count" / "set")}])[0]["operations"]
    assert operations > 40
    places = {kill_at: tmp_path / str(kill_at) / "set" for kill_at in range(1, operations + 1)}
    runs: list[dict[str, Any]] = []
    for kill_at, place in places.items():
        place.parent.mkdir()
        runs += [{"output": str(place), "kill_at": kill_at}, {"output": str(place)}]
    outcomes = killed(folder, SKIP, runs)
    finished = 0
    for place, first, second in zip(places.values(), outcomes[::2], outcomes[1::2], strict=True):
        assert first["status"] == -signal.SIGKILL
        assert second["status"] == int("set" in first["left"]), second["errors"]
        finished += "set" in first["left"]
        if first["operations"] > operations * 2 / 3 and "set" not in first["left"]:
            assert second["taken_over"] > 0, "it went on, and did not begin anew"
        assert second["left"] == ["set"]
        assert content(place) == expected, f"killed at operation {first['operations']}"
    assert 0 < finished < operations / 4


def test_killed_again_and_again(tmp_path: Path) -> None:
    """A set of a few hundred images, killed at random operations until it is done, is that of one run."""
    folder = photos(tmp_path / "faces", 30, 9)
    pack_all(folder, tmp_path / "whole")
    rng = random.Random(0)
    (tmp_path / "out").mkdir()
    runs = [{"output": str(tmp_path / "out" / "set"), "kill_at": rng.randrange(10, 70)} for _ in range(30)]
    outcomes = killed(folder, FIT, runs)
    assert [outcome["status"] for outcome in outcomes].index(0) > 4, "killed often, and done in the end"
    assert content(tmp_path / "out" / "set") == content(tmp_path / "whole")


def test_full_disk(tmp_path: Path, folder: Path) -> None:
    """The error names the file that could not grow; with more room the same command goes on to the same bytes."""
    pack_all(folder, tmp_path / "whole")
    largest = (tmp_path / "whole" / "train.rec").stat().st_size * 3 // 4
    (tmp_path / "out").mkdir()
    output = str(tmp_path / "out" / "set")
    full, resumed = killed(folder, FIT, [{"output": output, "largest_file": largest}, {"output": output}])
    assert full["left"] == [".set.partial"]
    assert f"[Errno 27] File too large: '{tmp_path}/out/.set.partial/set/train.rec'" in full["errors"]
    assert resumed["taken_over"] > 0
    assert content(tmp_path / "out" / "set") == content(tmp_path / "whole")


# Packs, and kills itself so many images (the second argument) behind the first save that has the images of the first.
PACK = """
import itertools, os, signal, sys
from types import SimpleNamespace
from data import resumable_set
from data.pack_set import main
resumable_set.SECONDS_BETWEEN_SAVES = 10
resumable_set.time = SimpleNamespace(monotonic=itertools.count().__next__)  # a second an image
saved_from, left = int(sys.argv[1]), int(sys.argv[2])
save, add = resumable_set.ResumableSet._save, resumable_set.ResumableSet.add
saved = 0
def save_and_tell(out):
    global saved
    save(out)
    saved = out.standing.taken
def add_or_die(out, image):
    global left
    add(out, image)
    if saved_from and saved >= saved_from:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
resumable_set.ResumableSet._save, resumable_set.ResumableSet.add = save_and_tell, add_or_die
main(sys.argv[3:])
"""


@pytest.mark.long
def test_twenty_kills_with_workers(tmp_path: Path) -> None:
    """The program as users run it, with processes that resize and skip, killed twenty times at random images."""
    rng = np.random.default_rng(0)
    for person in range(100):
        (tmp_path / "faces" / f"{person}").mkdir(parents=True)
        for shot in range(60):
            side = int(rng.integers(30, 36))
            image = encode_png(rng.integers(0, 256, (side, side, 3), np.uint8))
            (tmp_path / "faces" / f"{person}" / f"{shot}.png").write_bytes(image if side > 30 else b"no image")
    fit = replace(SKIP, other_sizes="resize")
    pack_all(tmp_path / "faces", tmp_path / "whole", fit)
    flags = ["--source", str(tmp_path / "faces"), "--output", str(tmp_path / "set"), "--image-size", str(SIZE)]
    options = [*flags, "--other-sizes", "resize", "--bad-images", "skip", "--workers", "2"]

    def run(saved_from: int, more: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", PACK, str(saved_from), str(more), *options]
        # Its output ends when the last of its processes does.
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)

    journal = tmp_path / ".set.partial" / ".journal.json"
    taken = [0]
    for _ in range(20):
        assert run(taken[-1] + int(rng.integers(1, 250)), int(rng.integers(20))).returncode == -signal.SIGKILL
        taken.append(images_taken(journal))
    assert taken == sorted(set(taken)), "every run got further"
    done = run(0, 0)
    assert "taken over from an interrupted run" in done.stdout
    assert content(tmp_path / "set") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def images_taken(journal: Path) -> int:
    return json.loads(journal.read_text())["state"]["taken"] if journal.exists() else 0
