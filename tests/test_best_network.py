"""Which network of a run is its best: by accuracies that can be compared, and never a file that is not there."""

import errno
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from config import Config
from data.verification_bin import read_bin
from tiny_runs import configure
from train import Trainer, train
from utils.checkpoints import BEST
from utils.evaluation.verification import Verifier
from utils.ranks import Ranks
from utils.training.best_network import BestNetwork
from utils.training.metrics import read_metrics
from utils.training.run_folders import TrainingError


def step_of_best(run: Path) -> int:
    with safe_open(run / BEST, "pt") as file:
        return int(file.metadata()["step"])


@pytest.fixture
def own_set(tiny_set: Path, tmp_path: Path) -> Path:
    """The tiny set, in a folder of its own, to which other verification sets can be added."""
    return Path(shutil.copytree(tiny_set, tmp_path / "set"))


def interrupt(trainer: Trainer) -> None:
    """In place of the loading of faces: before the first step, and after what is verified then."""
    raise KeyboardInterrupt


def go_on(own_set: Path, tmp_path: Path, **settings: object) -> Config:
    """The run `a`, for an epoch more than its two."""
    return configure(own_set, tmp_path, train__resume="auto", train__epochs=3, **settings)


def verified(monkeypatch: pytest.MonkeyPatch, *accuracies: float) -> None:
    """Let all sets of each verification have the next of these accuracies."""
    given = iter(accuracies)

    def verify(verifier: Verifier, network: nn.Module, heed: object) -> dict[str, Any]:
        accuracy = next(given) if verifier.sets else 0.0
        return {one.name: SimpleNamespace(accuracy=accuracy, std=0.0) for one in verifier.sets}

    monkeypatch.setattr(Verifier, "__call__", verify)


def test_another_set_begins_the_choice_anew(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A harder set that is put beside the first lowers the mean, and no network would have been the best any more."""
    verified(monkeypatch, 0.98, 0.97, 0.5, 0.6)  # the third: step 12 again, which was saved before it
    run = train(configure(own_set, tmp_path))
    before = (run / BEST).read_bytes()
    shutil.copy(own_set / "tiny.bin", own_set / "harder.bin")
    capsys.readouterr()
    train(go_on(own_set, tmp_path))
    assert step_of_best(run) == 18
    assert (run / "best-until-step-12.safetensors").read_bytes() == before
    told = capsys.readouterr().out
    assert re.search(
        r"best\.safetensors was chosen on tiny \(.*, now it is harder .*, tiny \(.*kept as best-until", told
    )


@pytest.mark.parametrize("then", ["the same sets", "the first set again"])
def test_killed_before_the_next_checkpoint(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """The network of before is kept, not the first of the new sets under its name; and whoever takes the new set away
    again is not told that the best is."""
    verified(monkeypatch, 0.98, 0.97, 0.5, 0.6, 0.7, 0.8)
    run = train(configure(own_set, tmp_path))
    before = (run / BEST).read_bytes()
    shutil.copy(own_set / "tiny.bin", own_set / "harder.bin")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "load_faces", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(go_on(own_set, tmp_path))
    assert step_of_best(run) == 12
    if then == "the first set again":
        (own_set / "harder.bin").unlink()
    train(go_on(own_set, tmp_path))
    assert (run / "best-until-step-12.safetensors").read_bytes() == before
    assert step_of_best(run) == 18


def test_a_full_disk_stops_no_resumed_run(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copy of the best of before is the only thing that lacks."""
    verified(monkeypatch, 0.98, 0.97, 0.5, 0.6)
    run = train(configure(own_set, tmp_path))
    shutil.copy(own_set / "tiny.bin", own_set / "harder.bin")

    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    train(go_on(own_set, tmp_path))
    assert step_of_best(run) == 18
    assert "that of before could not be kept ([Errno 28] No space left on device)" in capsys.readouterr().out


def test_the_same_sets_go_on(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is copied, nothing said, and a worse network does not replace a better one."""
    verified(monkeypatch, 0.98, 0.97, 0.5, 0.6)  # the third: step 12 again, which was saved before it
    run = train(configure(own_set, tmp_path))
    train(go_on(own_set, tmp_path))
    assert step_of_best(run) == 6
    assert "was chosen on" not in capsys.readouterr().out
    assert not list(run.glob("best-until*"))


def test_a_run_that_is_verified_no_more_keeps_what_it_has(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracies in its record, the last too, which is made again only where there is something to verify on; and
    its best network, under another name."""
    verified(monkeypatch, 0.98, 0.97)
    run = train(configure(own_set, tmp_path))
    before = (run / BEST).read_bytes()
    train(go_on(own_set, tmp_path, data__verification=("none",)))
    found = [(line["step"], line["verify/tiny"]) for line in read_metrics(run) if "verify/tiny" in line]
    assert found == [(6, 0.98), (12, 0.97)]
    assert (run / "best-until-step-12.safetensors").read_bytes() == before
    assert step_of_best(run) == 18


def test_a_best_that_is_gone_is_made_anew(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ended with the name of a file that was not there."""
    verified(monkeypatch, 0.98, 0.97, 0.5, 0.6)  # the third: step 12 again, which was saved before it
    run = train(configure(own_set, tmp_path))
    (run / BEST).unlink()
    train(go_on(own_set, tmp_path))
    assert step_of_best(run) == 18
    assert f"{run / BEST} is gone: the next network that is verified becomes the best" in capsys.readouterr().out


def test_a_checkpoint_of_an_older_version_is_trusted(own_set: Path, tmp_path: Path) -> None:
    """It does not say on what its accuracy was measured."""
    (tmp_path / BEST).touch()
    best = BestNetwork(tmp_path, [read_bin(own_set / "tiny.bin")], 32, True, Ranks(), pytest.fail)
    best.restore({"best_accuracy": 0.75}, 3)
    assert best.accuracy == 0.75


@pytest.mark.parametrize("change", ["name", "images", "flags", "size", "mirror"])
def test_what_accuracies_depend_on(own_set: Path, tmp_path: Path, change: str) -> None:
    """Whatever makes them other numbers for the same network."""
    pairs, size, mirror = read_bin(own_set / "tiny.bin"), 32, True
    said: list[str] = []
    (tmp_path / BEST).write_bytes(b"best")
    notes = {**BestNetwork(tmp_path, [pairs], size, mirror, Ranks(), said.append).notes(), "best_accuracy": 0.75}
    if change == "name":
        pairs = replace(pairs, name="other")
    elif change == "images":
        pairs = replace(pairs, images=pairs.images[::-1])
    elif change == "flags":
        pairs = replace(pairs, same=~pairs.same)
    size, mirror = (48 if change == "size" else size), (mirror and change != "mirror")
    other = BestNetwork(tmp_path, [pairs], size, mirror, Ranks(), said.append)
    other.restore(notes, 3)
    assert other.accuracy == 0
    assert len(said) == 1
    (tmp_path / BEST).write_bytes(b"the best on these")
    assert other.restore(notes, 3), "the notes of before again, of a run that went back to them"
    assert (tmp_path / "best-until-step-3.safetensors").read_bytes() == b"best"


def test_weights_that_are_no_numbers_are_not_kept(tmp_path: Path) -> None:
    """Not of the network, and not of its running statistics."""
    network = nn.BatchNorm1d(3)
    best = BestNetwork(tmp_path, [], 32, True, Ranks(), pytest.fail)
    best.keep(network, 0.5, 1, "{}")
    assert best.accuracy == 0.5
    with torch.no_grad():
        network.running_var[1] = torch.inf  # type: ignore[index]
    with pytest.raises(TrainingError, match="step 2: weights of the network are no numbers"):
        best.keep(network, 0.75, 2, "{}")
    assert (best.accuracy, step_of_best(tmp_path)) == (0.5, 1)
