"""Runs that are stopped, saved and gone on with: to the bit, and only as the same run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import dropout

from config import Config
from data.augment import Chances
from data.face_set_writer import write_face_set
from data.prepare_data import prepare
from models.backbones.demonet import DemoNet
from tiny_faces import tiny_face
from tiny_runs import checkpoints, configure, same, weights
from train import Trainer, TrainingError, train
from utils.checkpoints import BEST, CheckpointError
from utils.evaluation import verification
from utils.settings import as_flags, build, flatten, from_json
from utils.training import step as training_step
from utils.training.metrics import METRICS, read_metrics
from utils.training.saved_checkpoints import WHOLE, Saved, step_of

ROOT = Path(__file__).resolve().parents[1]
AUGMENTED = {f"data__augment_{name}": 0.5 for name in Chances._fields}


@pytest.mark.parametrize("kind", ["plain", "augmented", "dropout"])
def test_resume_is_exact_in_the_middle_of_an_epoch(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Stopped after 8 of 12 steps (the second of epoch 2) and resumed: the same weights as without the stop."""
    augmented = AUGMENTED if kind == "augmented" else {}
    if kind == "dropout":
        forward = DemoNet.forward
        monkeypatch.setattr(DemoNet, "forward", lambda self, x: dropout(forward(self, x), 0.2, self.training))
    whole = train(configure(tiny_set, tmp_path, train__name="whole", **augmented))

    saved = Trainer.save

    def save_then_stop(trainer: Trainer, wait: bool) -> None:
        saved(trainer, wait)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(configure(tiny_set, tmp_path, train__name="cut", train__checkpoint_every=8, **augmented))
    cut = tmp_path / "cut"
    settings = from_json((cut / "config.json").read_text())
    assert train(build(Config, {**settings, "train.resume": str(cut)})) == cut
    assert same(weights(whole), weights(cut))
    assert same(weights(whole, BEST), weights(cut, BEST))
    losses = [[(line["step"], line["train/loss"]) for line in read_metrics(run) if "train/loss" in line]
              for run in (whole, cut)]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)], ids=lambda value: value
)
def test_a_signal_saves_and_says_how_to_go_on(tiny_set: Path, tmp_path: Path, number: int, status: int) -> None:
    """The promise to whoever stops a run, by hand or as a scheduler does, the whole job at once: nothing lost, the
    command to resume on the screen, an exit status that tells why, and it works."""
    config = configure(tiny_set, tmp_path, train__epochs=5000, common__workers=1)
    flags = as_flags(flatten(config))
    command = [sys.executable, ROOT / "train.py"]
    process = subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and "train/loss" in metrics.read_text()):
        assert time.monotonic() < deadline, "training did not start"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert f"go on with: python train.py --resume {tmp_path / 'a'}" in errors
    assert "Traceback" not in errors
    if number != signal.SIGINT:
        return

    step = int(errors.split("saved at step ")[1].split()[0].replace(",", ""))
    epochs = step // 6 + 1
    resumed = subprocess.run(
        [*command, "--resume", tmp_path / "a", "--epochs", str(epochs)], capture_output=True, text=True, check=True
    )
    assert f"from step {step:,}" in resumed.stdout
    assert read_metrics(tmp_path / "a")[-1]["step"] == 6 * epochs


def test_an_interrupt_during_verification_is_saved_too(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the sets are tested, at a step that has no checkpoint of its own, still loses nothing."""
    real = verification.verify

    def interrupted(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(verification, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped and saved at step 2 of 12"):
        train(configure(tiny_set, tmp_path, train__verify_every=2))
    assert checkpoints(tmp_path / "a")


def test_a_diverged_run_is_not_saved_when_it_is_stopped(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two lines of the log, after the loss became NaN: nothing of it reaches a checkpoint."""
    real, calls = training_step.clip_grad_norm_, iter(range(100))

    def interrupt_the_third(*arguments: object) -> object:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training_step, "clip_grad_norm_", interrupt_the_third)
    # KeyboardInterrupt, the wrong end, is caught here too: loose, it would end the whole test run.
    with pytest.raises((TrainingError, KeyboardInterrupt), match="the loss became nan at step"):
        train(configure(tiny_set, tmp_path, train__lr=1e30, train__gradient_clip=1e30, train__log_every=100))
    assert not checkpoints(tmp_path / "a")


@pytest.mark.parametrize("every", [0, 4])
def test_what_breaks_verification_does_not_cost_the_epoch(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Out of memory while verifying: the steps before are saved, be it a step at which no checkpoint was due."""

    def no_memory(*arguments: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(verification, "verify", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(configure(tiny_set, tmp_path, train__checkpoint_every=every))
    assert step_of(checkpoints(tmp_path / "a")[-1]) == 6


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(tiny_set: Path, tmp_path: Path) -> None:
    """All checkpoints are damaged: --resume auto would write its beginning over the best network and the log."""
    again = configure(tiny_set, tmp_path, train__name="b", train__resume="auto", train__epochs=1)
    run = train(again)
    before = {path.name: path.read_bytes() for path in (run / BEST, run / METRICS)}
    for checkpoint in checkpoints(run):
        (checkpoint / WHOLE).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"b has no whole checkpoint to go on from; to begin anew, .* --name"):
            train(again)
        assert {name: (run / name).read_bytes() for name in before} == before


def test_a_run_can_go_on_in_another_precision(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begun in float32 (no loss scaling) resumes in float16, goes on with the scale that was found, and back."""
    run = train(configure(tiny_set, tmp_path, train__epochs=1))
    half: dict[str, object] = {"train__resume": str(run), "train__precision": "fp16"}
    with monkeypatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=512.0))
        train(configure(tiny_set, tmp_path, train__epochs=2, **half))
    train(configure(tiny_set, tmp_path, train__epochs=3, **half))
    assert Saved(checkpoints(run)[-1]).notes["scaler"]["scale"] == 512
    train(configure(tiny_set, tmp_path, train__epochs=4, train__resume=str(run), train__precision="fp32"))
    assert read_metrics(run)[-1]["step"] == 24


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train__batch_size": 16}, r"train\.batch_size: the run to go on with has 8, which cannot become 16"),
        ({"train__seed": 1}, r"train\.seed"),
        ({"train__optimizer": "adamw"}, r"train\.optimizer"),
        ({"data__order": "balanced"}, r"data\.order"),
        ({"loss__sub_centers": 3}, r"loss\.sub_centers"),
        ({"model__network": "mbf"}, r"model\.network: the run to go on with has demo, which cannot become mbf"),
        ({"model__embedding_size": 32}, r"model\.embedding_size"),
    ],
)
def test_what_a_run_cannot_change_in_its_middle(
    tiny_set: Path, tiny_begun: Path, changed: dict[str, object], message: str
) -> None:
    """Settings that would make another run of it, under the same name, are refused by name."""
    with pytest.raises(TrainingError, match=message):
        train(configure(tiny_set, tiny_begun.parent, train__resume=str(tiny_begun), train__epochs=3, **changed))


@pytest.fixture(scope="module")
def tiny_begun(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch that others try to go on with."""
    return train(configure(tiny_set, tmp_path_factory.mktemp("begun"), train__epochs=1))


def test_a_run_does_not_go_on_with_other_people(tiny_set: Path, tiny_begun: Path, tmp_path: Path) -> None:
    """As many classes, but not the same identities behind them: class centres are not handed to other people."""
    with write_face_set(tmp_path / "renamed", 32) as out:
        for identity in range(6):
            out.add_identity(tiny_face(identity, shot) for shot in range(8))
    prepare(tmp_path / "renamed" / "train.rec", tmp_path / "folders", 0)
    (tmp_path / "folders" / "000003").rename(tmp_path / "folders" / "000007")
    with pytest.raises(TrainingError, match=r"data\.root: .* does not have the identities that .* began with"):
        train(configure(tmp_path / "folders", tmp_path, train__resume=str(tiny_begun), train__epochs=2))


def test_joined_sets_may_move(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on several sets goes on with other spellings of their paths, and one of an older version, whose notes have
    the paths, with the same spelling; the sets in another order are other people, and refused.
    """
    more = tmp_path / "more"
    with write_face_set(more, 32) as out:
        out.add_identity(tiny_face(200, shot) for shot in range(3))
        out.add_identity(tiny_face(201, shot) for shot in range(2))

    def go(epochs: int, roots: tuple[str, ...], resume: str) -> Path:
        few = {"data__root": roots, "data__min_images": 3}
        return train(configure(tiny_set, tmp_path, **few, train__epochs=epochs, train__resume=resume))

    with monkeypatch.context() as older:
        older.setattr("utils.training.same_run.identity_keys", lambda faces: faces.identities)
        run = go(1, (str(tiny_set), str(more)), "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match="does not have the identities"):
        go(2, (str(tiny_set), "more"), str(run))
    go(2, (str(tiny_set), str(more)), str(run))
    go(3, (str(tiny_set), "more"), str(run))
    with pytest.raises(TrainingError, match="does not have the identities"):
        go(4, ("more", str(tiny_set)), str(run))


def test_going_on_does_not_need_the_weights_it_began_with(tiny_set: Path, tmp_path: Path, tiny_begun: Path) -> None:
    """A fine-tuned run resumes after the file of `train.init` is gone: its checkpoint has every weight."""
    start = tmp_path / "start.safetensors"
    shutil.copy(tiny_begun / BEST, start)
    run = train(configure(tiny_set, tmp_path, train__init=str(start), train__epochs=1))
    start.unlink()
    train(configure(tiny_set, tmp_path, train__init=str(start), train__epochs=2, train__resume=str(run)))
    assert read_metrics(run)[-1]["step"] == 12


def test_a_checkpoint_of_another_shape_is_refused(tiny_set: Path, tmp_path: Path) -> None:
    """Resuming with larger pictures, which the last layer has more weights for, names the mismatch instead of training
    nonsense."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("train.rec", "train.idx"):
        (alone / name).write_bytes((tiny_set / name).read_bytes())
    run = train(configure(alone, tmp_path))
    with pytest.raises(CheckpointError, match=r"step-000000012 does not fit the network"):
        train(configure(alone, tmp_path, train__resume=str(run), data__image_size=48, data__resize=True))
