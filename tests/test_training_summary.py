"""The last table of a run tells what its metrics say."""

import json
from pathlib import Path

from torch import nn

from utils.checkpoints import BEST, Progress, save_backbone
from utils.texts import columns_of
from utils.training.metrics import METRICS, read_metrics
from utils.training.summary import _duration, summarise


def write(folder: Path, *lines: dict[str, float]) -> None:
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_first_last_and_best(tmp_path: Path) -> None:
    """The best is the lowest loss and the highest accuracy, with the first step that has it; time is added up."""

    def noted(step: int, loss: float, rate: float, seconds: float, wait: float) -> dict[str, float]:
        return {
            "step": step,
            "train/loss": loss,
            "train/accuracy": step / 1000,
            "train/images_per_s": rate,
            "train/seconds": seconds,
            "train/data_wait": wait,
        }

    write(
        tmp_path,
        {"step": 0, "verify/lfw": 0.5, "verify_average/lfw": 0.5},
        {"step": 0, "verification/seconds": 3.0},
        noted(100, 20.0, 10.0, 60.0, 0.5),
        noted(200, 5.0, 40.0, 30.0, 0.0),
        {"step": 200, "verify/lfw": 0.9975, "verify_average/lfw": 0.9},
        {"step": 200, "verification/seconds": 7.0},
        noted(300, 6.0, 40.0, 20.0, 0.25),
        {"step": 300, "verify/lfw": 0.99, "verify_average/lfw": 0.9},
    )
    table = [line.split() for line in summarise(tmp_path).splitlines()]
    assert table[0] == ["first", "last", "best"]
    assert table[1] == ["loss", "20.0000", "6.0000", "5.0000", "at", "step", "200"]
    assert table[2][-6:] == ["10.00%", "30.00%", "30.00%", "at", "step", "300"]
    assert table[3] == ["lfw", "50.000%", "99.000%", "99.750%", "at", "step", "200"]
    assert table[4] == ["lfw", "(average)", "50.000%", "90.000%", "90.000%", "at", "step", "200"]
    # 600 + 1,200 + 800 images in 110 s; 10 s verifying and 35 s of waiting in 120 s.
    assert " ".join(table[5]) == "24 images/s; of 2 min 00 s, 8.3% verifying, 29.2% waiting for data"


def test_a_run_that_learned_nothing_better_says_so(tmp_path: Path) -> None:
    """Fine-tuning can make a network worse, and its best is then the one it began with: nobody should take that for
    what was learned. The kept file tells, not the accuracies: those of a resumed run may be of other sets."""
    first, later = {"step": 0, "verify/a": 0.9}, {"step": 8, "verify/a": 0.8}

    def said(*lines: dict[str, float]) -> bool:
        write(tmp_path, *lines)
        return "best.safetensors holds the weights that the run began with" in summarise(tmp_path)

    assert not said(first, later)  # there is no file
    save_backbone(tmp_path / BEST, nn.Linear(1, 1), "{}", Progress(0, 0.9))
    assert said(first, later)
    assert said(first, {"step": 8, "verify_average/a": 0.8})
    assert not said(first)  # stopped before there was anything to compare
    assert not said(first, {"step": 8, "train/loss": 1.0})
    save_backbone(tmp_path / BEST, nn.Linear(1, 1), "{}", Progress(8, 0.8))
    assert not said(first, later)  # it was chosen on other sets
    (tmp_path / BEST).write_bytes(b"cut")
    assert not said(first, later)


def test_a_run_without_verification(tmp_path: Path) -> None:
    """What was never noted has no row; a run that stopped before its first note has an empty table."""
    write(tmp_path, {"step": 2, "train/loss": 3.0})
    assert [line.split()[0] for line in summarise(tmp_path).splitlines()] == ["first", "loss"]
    write(tmp_path)
    assert summarise(tmp_path).split() == ["first", "last", "best"]


def test_times_are_told_in_minutes_or_hours() -> None:
    """As clocks have them."""
    assert [_duration(seconds) for seconds in (59.6, 3599.4, 3660, 90061)] == [
        "1 min 00 s", "59 min 59 s", "1 h 01 min", "25 h 01 min"
    ]  # fmt: skip


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    """And those that a resumed run wrote behind it are not."""
    (tmp_path / METRICS).write_text('{"step": 1}\n{"ste\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_what_is_no_line_of_numbers_is_left_out(tmp_path: Path) -> None:
    """A machine that died leaves zero bytes or anything else in a file: the run goes on without those lines."""
    good = b'{"step": 1, "train/loss": 2.5}\n'
    lines = [bytes(9), b"\xff\xfe", b"3", b"[]", b"null", b'{"a": 1}', b'{"step": "x"}', b'{"step": 2, "a": "b"}']
    lines += [b'{"step": 3, "train/loss": NaN}', b"9" * 5000, b"[" * 100_000]
    (tmp_path / METRICS).write_bytes(good + b"\n".join(lines) + b"\n" + good)
    assert read_metrics(tmp_path) == 2 * [{"step": 1, "train/loss": 2.5}]


def test_a_line_without_all_its_times_is_not_counted(tmp_path: Path) -> None:
    """A changed letter in the name of a number, on a failing disk, ends no run."""
    write(tmp_path, {"step": 1, "train/loss": 2.5, "train/seconds": 3.0, "train/imagez_per_s": 5.0})
    assert "2.5000" in summarise(tmp_path)


def test_columns_stand_in_line(tmp_path: Path) -> None:
    """Whatever the sets are called: letters that are two columns wide, names longer than the first column."""
    write(tmp_path, *({"step": 1, "verify/" + name: 0.5} for name in ("a" * 40, "\u738b\u592b", "lfw")))
    _, *rows = summarise(tmp_path).splitlines()
    assert len({columns_of(row[: row.index("50.000%")]) for row in rows}) == 1
