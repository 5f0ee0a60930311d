"""The comparison of recipes for small sets: who is left out, what is equal, and that nothing is trained twice."""

import csv
import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import small_sets
from config import CommonConfig, Config, TrainConfig
from data.face_set_writer import write_face_set
from tests.tiny_faces import tiny_face
from utils.checkpoints import CONFIG
from utils.settings import to_json
from utils.training.metrics import METRICS, read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets, `known` with names like numbers and `other` without a list of names; `lfw`; `overlap.csv`."""
    folder = tmp_path_factory.mktemp("small")
    for number, name in enumerate(("known", "other")):
        with write_face_set(folder / name, 32) as out:
            for identity in range(4):
                out.add_identity(tiny_face(10 * number + identity, shot) for shot in range(8 - identity))
    names = "".join(f"{label},00{10 * label}\n" for label in range(4))
    (folder / "known" / "identities.csv").write_text(f"label,name\n{names}")
    (folder / "overlap.csv").write_text("set,identity,lfw_name,cosine\nknown,20,A,0.7\nother,1,B,0.6\n")
    lines = []
    for person in range(10):
        people = folder / "lfw" / "images" / f"P{person}"
        people.mkdir(parents=True)
        for shot in (1, 2):
            (people / f"P{person}_{shot:04d}.png").write_bytes(tiny_face(100 + person, shot))
        lines += [f"P{person}\t1\t2", f"P{person}\t1\tP{(person + 1) % 10}\t2"]
    (folder / "lfw" / "pairs.txt").write_text("\n".join(["10\t1", *lines]) + "\n")
    return folder


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    """Two recipes, one of which leaves out identities of few images."""
    return [
        *("--output", str(output), "--train", f"{folder}/known,{folder}/other", "--overlap", f"{folder}/overlap.csv"),
        *("--lfw", f"{folder}/lfw", "--network", "demo", "--image-size", "32", "--device", "cpu", "--workers", "0"),
        *("--recipes", "", "--epochs", "3", "--jobs", "2", "--variant", "all: --batch-size 8 --loss.scale 16"),
        *("--variant", "many of each: --batch-size 8 --loss.scale 8 --data.min-images 7 --ema 0.5", *more),
    ]


def test_people_of_lfw_are_found(folder: Path, tmp_path: Path) -> None:
    """By names where a set has a list of them, with or without leading zeros, else by labels; a typing error must not
    leave a person of the test in the training set."""
    table = folder / "overlap.csv"
    assert small_sets.overlapping(table, folder / "known") == {"2"}
    assert small_sets.overlapping(table, folder / "other") == {"1"}
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("set,identity\nknown,2\n")
    with pytest.raises(ValueError, match=r"wrong\.csv: .*known has no identity '2'"):
        small_sets.overlapping(wrong, folder / "known")


def test_recipes_are_compared_on_equal_terms(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the people of LFW, with as many images for each recipe, verified at the end; a second call trains
    nothing, of an older version's run either, and results of other settings are not taken for those asked for."""
    output = tmp_path / "out"
    small_sets.main(arguments(folder, output, "--seeds", "1"))
    packed = [csv.DictReader((output / "sets" / name / "packed.csv").open()) for name in ("known", "other")]
    assert [[row["identity"] for row in rows] for rows in packed] == [["0", "1", "3"], ["0", "2", "3"]]
    rows = [line.split(" | ") for line in (output / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| recipe", "| all", "| many of each"]
    accuracies = [float(row[1]) for row in rows[1:]]
    for name, tag, accuracy in zip(("all", "many_of_each"), ("verify", "verify_average"), accuracies, strict=True):
        noted = [line[f"{tag}/lfw"] for line in read_metrics(output / "runs" / f"{name}-0") if f"{tag}/lfw" in line]
        assert [100 * value for value in noted] == [pytest.approx(accuracy)]
    assert rows[2][3] == f"{accuracies[1] - accuracies[0]:.2f}"
    # 8 + 7 + 5 and 8 + 6 + 5 images, three times; of the two with 8 and the one with 7 (23), five times.
    assert [row[4] for row in rows[1:]] == [f"{3 * (39 // 8 * 8)}", f"{5 * (23 // 8 * 8)}"]
    assert "loss.scale 8.0" in rows[2][6]
    assert "train.epochs 5" in rows[2][6]
    assert "loss.name" not in rows[1][6]
    assert "train.seed" not in rows[1][6]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    made_with = output / "runs" / "all-0" / "config.json"
    settings = json.loads(made_with.read_text())
    del settings["loss"]["margin_warmup_epochs"]  # as if made before there was such a setting
    made_with.write_text(json.dumps(settings))
    capsys.readouterr()
    small_sets.main(arguments(folder, output, "--seeds", "1"))
    assert "\n".join(" | ".join(row) for row in rows[1:]) in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"all-0 has train\.epochs 3, now it is 2: take another --output"):
        small_sets.main(arguments(folder, output, "--seeds", "1", "--epochs", "2"))


def test_a_run_that_fails_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last words are shown, the others have their turn, there is a table, and the program ends with an error. What
    each run said is in a file of its own, also where recipes are called by numbers.
    """
    (tmp_path / "train.py").write_text("import sys; sys.exit('train: cannot' if 'all-0' in ' '.join(sys.argv) else 0)")
    monkeypatch.setattr(small_sets, "ROOT", tmp_path)
    rates = ["--variant", "lr 0.1: --train.lr 0.1", "--variant", "lr 0.2: --train.lr 0.2"]
    with pytest.raises(SystemExit, match="1 runs failed"):
        small_sets.main(arguments(folder, tmp_path / "out", "--seeds", "2", *rates))
    printed = capsys.readouterr().out
    assert printed.count(" failed: ") == 1
    assert "all-0 failed: train: cannot" in printed
    assert printed.count("| many of each |  |  |") == 1
    assert len(list((tmp_path / "out" / "runs").glob("*.txt"))) == 8


@pytest.mark.parametrize("flag", ["--scal 3", "--loss.margin x"])
def test_a_wrong_flag_is_found_before_anything_is_trained(folder: Path, tmp_path: Path, flag: str) -> None:
    """A grid of an hour must not end with a typing error of its last variant."""
    with pytest.raises(SystemExit) as stopped:
        small_sets.main(arguments(folder, tmp_path, "--variant", f"wrong: {flag}"))
    assert stopped.value.code == 2
    assert not (tmp_path / "runs").exists()


def test_sets_of_one_name(folder: Path, tmp_path: Path) -> None:
    """The second would be taken for the first, which is packed already, and that one be trained on twice."""
    with pytest.raises(SystemExit, match="two sets have the same name"):
        small_sets.main(arguments(folder, tmp_path, "--train", f"{folder}/known,{folder}/lfw/../known"))


@pytest.mark.parametrize("variant", ["no flags", ": --lr 1", "a/b: --lr 1", "published: --lr 1"])
def test_names_of_variants(variant: str) -> None:
    """A name becomes a folder and a row: it has to be one, and one only."""
    with pytest.raises(ValueError, match="--variant"):
        small_sets.read_recipes("published", [variant])
    assert small_sets.read_recipes("published", ["a: --lr 1"]) == {
        "published": ["--preset", "ms1mv3_r18", "--train.batch-size", "128"],
        "a": ["--lr", "1"],
    }


def a_run(runs: Path, steps: int) -> small_sets.Run:
    config = Config(train=TrainConfig(name="a-0", ema=0.5), common=CommonConfig(runs=str(runs)))
    return small_sets.Run("a", config, [], steps)


def test_a_result_is_that_of_the_last_step(tmp_path: Path) -> None:
    """Of the moving average where there is one, and none before the end: nothing is chosen by the result."""
    run = a_run(tmp_path, 10)
    run.folder.mkdir()
    (run.folder / CONFIG).write_text(to_json(run.config))
    lines = [
        {"step": 5, "verify_average/lfw": 0.7, "train/images_per_s": 3.0},
        {"step": 10, "verify_average/lfw": 0.9, "verify/lfw": 0.8},
    ]
    (run.folder / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert small_sets.result(run) == small_sets.Result(0.9, 3.0)
    assert small_sets.result(a_run(tmp_path, 20)) is None


def test_what_the_table_says() -> None:
    """The error of the mean, not of a run; of a recipe what makes it another than the first."""
    assert small_sets.spread([0.9, 0.92, 0.94]) == "92.00 +- 1.15"
    first = Config(train=TrainConfig(epochs=5, lr=0.1, seed=0))
    others = [replace(first, train=replace(first.train, **more)) for more in ({"lr": 0.2, "seed": 1}, {"epochs": 6})]
    assert small_sets.differing(dict(zip("abc", [first, *others], strict=True))) == {
        "a": {"train.epochs": 5, "train.lr": 0.1},
        "b": {"train.lr": 0.2},
        "c": {"train.epochs": 6},
    }


def test_runs_end_with_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to end, so that they save their state; left alone they would go on and the same command start others."""
    (tmp_path / "train.py").write_text("import time; time.sleep(60)")
    started: list[subprocess.Popen] = []
    start = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> subprocess.Popen:
        started.append(start(*arguments, **options))
        return started[-1]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(small_sets, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small_sets.train_all([a_run(tmp_path, 10)], 1, lambda: None)
    assert [process.returncode for process in started] == [-signal.SIGTERM]
