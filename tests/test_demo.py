"""`make demo`, small: the drawn sets, and all four jobs on them through their command lines."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import DemoConfig
from data import make_demo_set
from data.face_sets import RecFaceSet
from data.make_demo_set import FIRST_NEW_PERSON, FIRST_TEST_PERSON, draw_people, make_pairs, make_sets
from data.verification_bin import read_bin
from utils import demo
from utils.files import BusyError
from utils.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SMALL = DemoConfig(people=4, shots=3, test_people=3, more_people=4)


def test_the_sets_have_insightfaces_layout_and_repeat(tmp_path: Path) -> None:
    """Same settings, same bytes, whatever the number of processes; training and test people do not overlap."""
    for name, workers in (("a", 0), ("b", 2)):
        make_sets(tmp_path / name / "set", tmp_path / name / "more", SMALL, workers)
    for file in ("set/train.rec", "set/train.idx", "set/property", "set/demo.bin", "more/train.rec"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    faces, more = (RecFaceSet(tmp_path / "a" / name / "train.rec") for name in ("set", "more"))
    assert (len(faces), len(faces.identities)) == (12, 4)
    assert (tmp_path / "a" / "set" / "property").read_text() == "4,112,112"
    people = [row["person"] for row in csv.DictReader((tmp_path / "a" / "more" / "identities.csv").open())]
    assert people == ["0", "1", str(FIRST_NEW_PERSON), str(FIRST_NEW_PERSON + 1)]
    pictures = [{source.encoded(i) for i in range(len(source))} for source in (faces, more)]
    assert not pictures[0] & pictures[1], "the people in both sets must be there in other pictures"
    assert not pictures[0] & set(read_bin(tmp_path / "a" / "set" / "demo.bin").images)
    with pytest.raises(FileExistsError):
        make_sets(tmp_path / "a" / "set", tmp_path / "a" / "more", SMALL, 0)


def test_pairs_are_what_their_flags_say() -> None:
    """Half the pairs are of one person in two pictures, half of two people, in every fold."""
    album = draw_people(range(FIRST_TEST_PERSON, FIRST_TEST_PERSON + 5), range(4), 0, 0, "")
    images, same = make_pairs(album, 0)
    person = {image: number for number, shots in album.items() for image in shots}
    assert len(images) == 2 * len(same) == 200
    for pair, flag in enumerate(same):
        a, b = images[2 * pair : 2 * pair + 2]
        assert a != b
        assert (person[a] == person[b]) == flag
    assert all(fold.mean() == 0.5 for fold in np.array_split(np.array(same), 10))


def test_all_four_jobs(tmp_path: Path) -> None:
    """The demo at its smallest, from another directory: every job runs, and the summary names what is there."""
    sizes = ["--people", "12", "--shots", "12", "--test-people", "6", "--more-people", "6", "--train.epochs", "1"]
    command = [sys.executable, ROOT / "utils" / "demo.py", "--folder", "demo", *sizes]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    demo = tmp_path / "demo"
    assert len(list((demo / "images").glob("*/*.jpg"))) == 144
    report = json.loads((demo / "runs" / "demo" / "test" / "results.json").read_text())
    assert list(report["sets"]) == ["demo", "more"]
    assert len(RecFaceSet(demo / "merged" / "train.rec")) == 144 + 72
    summary = done.stdout[done.stdout.index("The four jobs ran") :]
    for line in summary.splitlines():
        for word in line.replace(",", " ").split():
            if word.startswith("demo/"):
                assert (tmp_path / word).exists(), word
    assert "% untrained" in summary
    assert not (tmp_path / "runs").exists(), "all is in one folder"

    (demo / ".made_by_the_demo").unlink()
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "was not made by the demo" in refused.stderr
    assert (demo / "merged" / "train.rec").exists()


def test_starting_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while the folder is emptied is no end of it, wherever it comes; nor is a folder on another disk."""
    folder = tmp_path / "demo"
    (tmp_path / "disk").mkdir()
    folder.symlink_to(tmp_path / "disk")
    with demo.start_afresh(folder):
        (folder / "set").mkdir()
        for name in ("a", "z"):
            (folder / name).touch()
            (folder / "set" / name).touch()
        with pytest.raises(BusyError, match="demo is being written by another process"), demo.start_afresh(folder):
            raise AssertionError("two demos in one folder")
    remove = os.unlink
    for number in range(5):
        with pytest.MonkeyPatch.context() as patch:
            left = iter(range(number))

            def interrupt(*path: Any, left: Iterator[int] = left, **options: Any) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                remove(*path, **options)

            patch.setattr(os, "unlink", interrupt)
            with suppress(KeyboardInterrupt), demo.start_afresh(folder):
                pass
    with demo.start_afresh(folder):
        assert [path.name for path in folder.iterdir()] == [demo.MARKER]


def test_an_end_from_outside_ends_what_was_started(tmp_path: Path) -> None:
    """SIGTERM, from a scheduler or `timeout`: a training that goes on would write where the next demo begins. A hang-up
    that nohup has it ignore does not end it."""
    (tmp_path / "endless.py").write_text("import time; print('started', flush=True); time.sleep(60)")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom utils import demo\n"
        f"from utils.scripts import readable_errors\ndemo.ROOT = Path({str(tmp_path)!r})\n"
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with readable_errors('demo', ''), demo.ended_by_signals():\n    demo.run(['endless.py'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while process.stdout.readline() != b"started\n":
            pass
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
        assert process.stdout.read() == b"", "the pipe is open as long as the script runs"
        assert process.stderr.read() == b"\ndemo: stopped; run it again to start afresh\n"


@pytest.mark.parametrize("flag", ["--merge.dry-run", "--data.verification=none", "--demo.output=there"])
def test_what_the_demo_sets_itself(tmp_path: Path, flag: str) -> None:
    """Refused before the first job: the last one would find nothing to sum up."""
    name = flag.removeprefix("--").split("=")[0].replace("-", "_")
    with pytest.raises(SystemExit, match=rf"demo: {name}: the demo sets it itself"):
        demo.main(["--folder", str(tmp_path / "demo"), flag])
    assert not (tmp_path / "demo").exists()


def test_an_interrupt_leaves_neither_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command would stop at the one that is there; and it is said that nothing was written."""
    add, calls = make_demo_set.add_people, iter((False, True))

    def interrupt(*arguments: Any) -> None:
        if next(calls):
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(make_demo_set, "add_people", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_sets(tmp_path / "set", tmp_path / "more", SMALL, workers=0)
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(("output", "more"), [("x", "x/more"), ("a/b", "a"), ("q", "./q")])
def test_sets_within_each_other_are_refused(tmp_path: Path, output: str, more: str) -> None:
    """One of them would not be free when it is to appear, after all is drawn."""
    with pytest.raises(ConfigError, match=r"demo\.more: .* are one folder, or one lies in the other"):
        make_sets(tmp_path / output, tmp_path / more, SMALL, workers=0)
    assert not list(tmp_path.iterdir())


def test_scripts_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What two scripts say does not mix, whichever is faster; the one that fails is named, and ends the other, as an
    interrupt does."""
    started: list[subprocess.Popen] = []
    start = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> subprocess.Popen:
        started.append(start(*arguments, **options))
        return started[-1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / "slow.py").write_text("import sys, time; time.sleep(0.5); print('slow', *sys.argv[1:])")
    (tmp_path / "quick.py").write_text("print('quick')")
    (tmp_path / "failing.py").write_text("import sys; print('cannot', file=sys.stderr); raise SystemExit(3)")
    (tmp_path / "endless.py").write_text("import time; time.sleep(60)")
    demo.run(["slow.py", "--to", tmp_path], ["quick.py"])
    slow = f"python slow.py --to {tmp_path}"
    assert capfd.readouterr().out == f"\n$ {slow}\nslow --to {tmp_path}\n\n$ python quick.py\nquick\n"
    with pytest.raises(SystemExit, match=r"failing\.py failed with code 3"):
        demo.run(["failing.py"], ["endless.py"])
    assert started[-1].returncode == -signal.SIGKILL
    with pytest.raises(SystemExit, match=r"failing\.py failed with code 3"):
        demo.run(["quick.py"], ["failing.py"])
    assert capfd.readouterr().out.endswith("\n$ python quick.py\nquick\n\n$ python failing.py\ncannot\n")
    monkeypatch.setattr(shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.run(["quick.py"], ["quick.py"], ["endless.py"])
    assert started[-1].returncode == -signal.SIGKILL
