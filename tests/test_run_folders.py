"""The folder of a run: what may be started, started again or gone on with, and whether it is still the same run."""

import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

import train as training
from config import Config
from data.face_sets import FaceSet, open_face_set
from data.prepare_data import prepare
from saved_steps import take_notes_away
from tiny_runs import configure
from train import Trainer, TrainingError, main, train
from utils import program
from utils.checkpoints import BEST, CONFIG
from utils.ranks import Ranks, UnlikeRanksError
from utils.settings import as_flags, flatten
from utils.training.metrics import METRICS, read_metrics
from utils.training.run_folders import CHECKPOINTS, run_folder, saved_settings
from utils.training.same_run import require_same_settings, set_facts, set_notes
from utils.training.saved_checkpoints import checkpoint_folders


@pytest.fixture(scope="module")
def folders(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_set` as folders of images."""
    folder = tmp_path_factory.mktemp("folders") / "set"
    prepare(tiny_set / "train.rec", folder, 0)
    return folder


@pytest.fixture(scope="module")
def begun(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on them."""
    return train(configure(folders, tmp_path_factory.mktemp("begun"), train__epochs=1))


@pytest.mark.parametrize(("restarts", "resume", "warned"), [("3", "", True), ("3", "auto", False), ("0", "", False)])
def test_restarts_that_would_begin_anew_are_warned_of(
    restarts: str,
    resume: str,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """torchrun --max-restarts without --resume auto: a new run under another name, after days, or none at all."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert run_folder(configure(tmp_path, tmp_path, train__resume=resume)) == tmp_path / "a"
    assert ["--resume auto --name NAME" in str(one.message) for one in recwarn] == [True] * warned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fewer", r"has 24 images, .*a began with 48"),
        ("moved", r"does not have as many images of each identity as .*a began with"),
    ],
)
def test_a_run_does_not_go_on_with_other_images(
    folders: Path, begun: Path, tmp_path: Path, change: str, message: str
) -> None:
    """The same identities with other images are another order of faces, and perhaps no step left: refused, where the
    run said "done" before without training anything."""
    changed = tmp_path / "set"
    shutil.copytree(folders, changed)
    images = sorted(changed.glob("*/*"))
    if change == "fewer":
        for image in images[::2]:
            image.unlink()
    else:
        images[0].rename(images[-1].parent / f"more-{images[0].name}")
    with pytest.raises(TrainingError, match=message):
        train(configure(changed, begun.parent, train__resume=str(begun), train__epochs=2))


def test_checkpoints_without_notes_of_the_images_go_on(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were written before there were such notes."""
    with monkeypatch.context() as older:
        older.setattr(training, "set_notes", lambda faces: {"identities": set_notes(faces)["identities"]})
        run = train(configure(folders, tmp_path, train__epochs=1))
    train(configure(folders, tmp_path, train__resume=str(run), train__epochs=2))
    assert read_metrics(run)[-1]["step"] == 12


def test_the_note_of_the_images_is_that_of_any_machine() -> None:
    """Whatever the integers and the byte order of the labels: a run may move."""
    labels = [np.array([0, 1, 1, 300], dtype) for dtype in ("<i8", ">i8", "<i4")]
    notes = [set_notes(cast(FaceSet, SimpleNamespace(labels=each, identities=["a", "b"]))) for each in labels]
    sums = {"labels": zlib.crc32(struct.pack("<4q", 0, 1, 1, 300)), "identities": zlib.crc32(b"a\nb")}
    assert notes == [{"images": 4, **sums}] * 3


def test_an_image_that_cannot_be_read_is_no_reason_for_processes_to_end(folders: Path, tmp_path: Path) -> None:
    """It is left out and counted, as where one process trains; a machine that alone lacks it is still known by that."""
    changed = tmp_path / "set"
    shutil.copytree(folders, changed)
    whole = set_facts(open_face_set(changed), [])
    image = next(changed.glob("*/*"))
    image.unlink()
    image.symlink_to("nowhere")
    assert set_facts(open_face_set(changed), []) != whole


def test_a_run_with_nothing_left_says_so(folders: Path, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Going on with a finished run ends well, but not without a word."""
    train(configure(folders, begun.parent, train__resume=str(begun), train__epochs=1))
    assert "nothing is left to train: 6 steps are all (train.epochs)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__wandb": "faces"}, r"train\.wandb: it needs one more package"),
        ({"train__micro_batch": "2", "train__batch_size": 3}, "some pass has a single one"),
    ],
)
def test_a_run_that_cannot_be_leaves_no_folder(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], message: str
) -> None:
    """Settings at fault are found before anything is written, so that the mended command just works."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=message):
        train(configure(tiny_set, tmp_path, **settings))
    assert list(tmp_path.iterdir()) == []


def test_runs_of_the_same_second_have_folders_of_their_own(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several started at once, each on a card, say: one had to wait for the other, and ended or went on with it. One
    that cannot begin leaves nothing."""
    clock = SimpleNamespace(now=lambda: datetime(2026, 1, 2, 3, 4, 5))
    monkeypatch.setattr("utils.training.run_folders.datetime", clock)
    config = configure(tiny_set, tmp_path, train__name="")
    names = [run_folder(config).name for _ in range(3)]
    assert names == ["20260102-030405-demo", "20260102-030405-demo-2", "20260102-030405-demo-3"]
    with pytest.raises(ValueError, match=r"train\.batch_size is 64"):
        train(configure(tiny_set, tmp_path / "fails", train__name="", train__batch_size=64))
    assert list((tmp_path / "fails").iterdir()) == []


def test_of_two_runs_of_one_name_the_second_is_refused(tiny_set: Path, tmp_path: Path) -> None:
    """Started at once with other settings, it waited for the folder and then went on with what the first had made."""
    run = tmp_path / "a"
    late = Trainer(configure(tiny_set, tmp_path, train__epochs=2, train__lr=0.5), run, torch.device("cpu"), Ranks())
    train(configure(tiny_set, tmp_path, train__epochs=1))
    before = (run / METRICS).read_bytes(), (run / CONFIG).read_bytes()
    with pytest.raises(TrainingError, match=rf"{run} was made by another process meanwhile: .* --resume {run}"):
        late.train()
    assert ((run / METRICS).read_bytes(), (run / CONFIG).read_bytes()) == before


@pytest.mark.parametrize(
    ("unlike", "sees", "said"),
    [
        (
            {"train.lr": 7.0},
            "no run is there",
            "train.resume: a run is there on process 0 .*, no run is there on process 1",
        ),
        ({"train.lr": 7.0}, "a run is there", "train.lr: 0.05 on process 0 .*, 7.0 on process 1"),
        (
            {"the program": "another"},
            "a run is there",
            r"the program: \d+ \.py files .* on process 0 .*, another on process 1",
        ),
        ({"torch": "1.0"}, "a run is there", "torch: .* on process 0 .*, 1.0 on process 1"),
    ],
)
def test_machines_that_are_not_alike_are_told_in_what(
    unlike: dict[str, object], sees: str, said: str, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not see the run to go on with has the settings of config.py instead: that is what has to be said,
    and not the first that differs. Machines with two versions of the program would train something between the two."""
    (tmp_path / "a" / CHECKPOINTS / "step-000000006").mkdir(parents=True)
    config = configure(tiny_set, tmp_path, train__resume=str(tmp_path / "a"))
    ranks = Ranks()
    ranks.size = 2
    monkeypatch.setattr(ranks, "together", lambda function: function())

    def texts(mine: str) -> list[str]:
        facts = json.loads(mine)[1]
        return [mine, json.dumps(["other", facts | unlike if "torch" in facts else {"train.resume": sees}])]

    monkeypatch.setattr(ranks, "texts", texts)
    with pytest.raises(UnlikeRanksError, match=said):
        require_same_settings(config, ranks)


def test_the_program_is_known_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them but config.py, whose settings may be a machine's own."""
    monkeypatch.setattr(program, "__file__", str(tmp_path / "utils" / "program.py"))
    for name in ("train.py", "config.py", "models/heads/dense.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1\n")
    before = program.program_facts()
    (tmp_path / "config.py").write_text("a = 2\n")
    assert program.program_facts() == before
    (tmp_path / "models/heads/dense.py").write_text("a = 2\n")
    after = program.program_facts()
    assert after["the program"] != before["the program"]
    assert after["torch"] == before["torch"]


def test_a_run_without_a_checkpoint_starts_again(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ended in its first epoch: `--resume` says how to start it again, which works, with nothing of the first try in
    its record; once it has a checkpoint, the same command is refused, and says how to go on."""
    config = configure(tiny_set, tmp_path, train__verify_at_start=True)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "log_metrics", lambda self: (_ for _ in ()).throw(TrainingError("made up")))
        with pytest.raises(TrainingError, match="made up"):
            train(config)
    run = tmp_path / "a"
    assert (run / "config.json").exists()
    with pytest.raises(TrainingError, match=rf"{run} has no checkpoints to go on from; start it again with --name a"):
        run_folder(configure(tiny_set, tmp_path, train__resume=str(run)))
    train(config)
    assert f"run: {run}, which has no checkpoint yet: from the start" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(run) if "verify/tiny" in line] == [0, 6, 12]
    with pytest.raises(TrainingError, match=rf"{run} exists: .* go on with --resume {run}, or remove it"):
        train(config)


@pytest.mark.parametrize("content", ["nothing", "other things", "damaged checkpoints", BEST])
def test_other_folders_are_left_alone(tiny_set: Path, tmp_path: Path, content: str) -> None:
    """What is not a run, or has something that could be gone on with, is not written over."""
    run = tmp_path / "a"
    places = {
        "nothing": run, "other things": run / "photos", "damaged checkpoints": run / CHECKPOINTS / "damaged-step-1",
        BEST: run / BEST,
    }  # fmt: skip
    places[content].mkdir(parents=True)
    with pytest.raises(TrainingError, match="exists: name another with --name"):
        train(configure(tiny_set, tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda checkpoint: (checkpoint / "manifest.json").write_text("{}"), take_notes_away]
)
def test_resuming_damaged_checkpoints_only(
    damage: Callable[[Path], object], begun: Path, folders: Path, tmp_path: Path
) -> None:
    """They are named one by one; the run does not start from its beginning in their place."""
    run = tmp_path / "damaged"
    shutil.copytree(begun, run)
    for checkpoint in checkpoint_folders(run / CHECKPOINTS):
        damage(checkpoint)
    for _ in range(2):
        with pytest.raises(TrainingError, match="has no whole checkpoint to go on from"):
            train(configure(folders, tmp_path, train__resume=str(run), train__epochs=2))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{}", b"[" * 100_000, b'{"train": ', b"{}", None])
def test_resuming_without_its_settings(begun: Path, tmp_path: Path, content: bytes | None) -> None:
    """A run whose config.json is damaged or gone does not go on with the settings of config.py: it takes those of its
    newest whole checkpoint, and says so. Without one it says which file is wrong."""
    run = tmp_path / "a"
    shutil.copytree(begun, run)
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_bytes(content)
    wanted = {"train.resume": str(run), "common.runs": str(tmp_path), "train.name": ""}
    shutil.copytree(run / CHECKPOINTS / "step-000000006", newer := run / CHECKPOINTS / "step-000000007")
    (newer / "manifest.json").write_text("{}")
    shutil.copytree(run / CHECKPOINTS / "step-000000006", newest := run / CHECKPOINTS / "step-000000008")
    take_notes_away(newest)
    with pytest.warns(UserWarning, match=r"a/config\.json .*: its settings are those of .*step-000000006$"):
        found = saved_settings(wanted)
    assert found == {**saved_settings({**wanted, "train.resume": str(begun)}), "train.resume": str(run)}
    (run / CHECKPOINTS / "step-000000006" / "manifest.json").unlink()
    with pytest.raises(TrainingError, match=r"a/config\.json .*, and no whole checkpoint has them"):
        saved_settings(wanted)


def test_a_run_where_its_files_could_not_be_read(tiny_set: Path, tmp_path: Path) -> None:
    """safetensors refuses paths that are no UTF-8: better before the training than when its checkpoints are needed."""
    runs = tmp_path / os.fsdecode(b"runs\xe9")
    with pytest.raises(TrainingError, match="is no UTF-8"):
        train(configure(tiny_set, runs))
    assert not runs.exists()


@pytest.mark.parametrize(("restarts", "told"), [(None, True), ("0", True), ("2", False)])
def test_a_restart_does_not_tell_the_settings_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    restarts: str | None,
    told: bool,
) -> None:
    """torchrun starts the command again after a failure: what failed shall not drown in a hundred lines, each time."""
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    with pytest.raises(SystemExit, match="does not exist"):
        main(["--data.root", str(tmp_path / "nowhere"), "--runs", str(tmp_path)])
    assert ("train.batch_size" in capsys.readouterr().out) == told


def test_the_command_says_what_to_do(tiny_set: Path, tmp_path: Path) -> None:
    """One line, no traceback."""
    config: Config = configure(tiny_set, tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(SystemExit, match=r"^train: .*a exists: name another with --name, or remove it$"):
        main(as_flags(flatten(config)))
