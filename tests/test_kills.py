"""Training that is killed, at any moment, and started again ends where it would have ended."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import CHECKPOINTS
from utils.training.metrics import read_metrics
from utils.training.saved_checkpoints import checkpoint_folders

ROOT = Path(__file__).resolve().parents[1]
#: Small tensors: a second thread would only wait.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(tiny_set: Path, runs: Path, name: str, epochs: int) -> list[str]:
    """A run of 6 steps an epoch that saves after each one, so that many kills fall into writing a checkpoint."""
    flags = {
        "common.device": "cpu", "common.workers": 0, "common.runs": runs, "data.root": tiny_set, "data.image-size": 32,
        "model.network": "demo", "model.embedding-size": 16, "loss.scale": 16.0, "batch-size": 8, "epochs": epochs,
        "lr": 0.05, "log-every": 1, "verify-every": 100, "checkpoint-every": 1, "ema": 0.9, "name": name,
        "resume": "auto", "data.augment-crop": 0.5,
    }  # fmt: skip
    return [sys.executable, str(ROOT / "train.py"), *(f"--{key}={value}" for key, value in flags.items())]


def saved(run: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(run / CHECKPOINTS)]


def train_through_kills(tiny_set: Path, runs: Path, epochs: int, kills: int) -> int:
    """Kill the run with SIGKILL at `kills` random moments after it got on, then let it end; how many did hit it."""
    moments, hits, run = random.Random(0), 0, runs / "killed"
    for _ in range(kills):
        before = saved(run)
        process = subprocess.Popen(
            command(tiny_set, runs, "killed", epochs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        deadline = time.monotonic() + 120
        while saved(run) == before and process.poll() is None:
            assert time.monotonic() < deadline, "it does not get on"
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        hits += process.returncode == -signal.SIGKILL
    train_to_the_end(tiny_set, runs, "killed", epochs)
    return hits


def train_to_the_end(tiny_set: Path, runs: Path, name: str, epochs: int) -> Path:
    """The run's folder."""
    done = subprocess.run(command(tiny_set, runs, name, epochs), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return runs / name


def assert_same_end(run: Path, other: Path) -> None:
    """Every saved tensor and every logged loss, to the bit."""
    ends = [checkpoint_folders(folder / CHECKPOINTS)[-1] for folder in (run, other)]
    for file in ("backbone.safetensors", "whole.safetensors", "rows-00000-of-00001.safetensors"):
        one, two = (load_file(end / file) for end in ends)
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    losses = [{line["step"]: line["train/loss"] for line in read_metrics(folder) if "train/loss" in line}
              for folder in (run, other)]  # fmt: skip
    assert losses[0] == losses[1]
    assert list(losses[0]) == list(range(1, len(losses[0]) + 1))


def test_killed_twice(tiny_set: Path, tmp_path: Path) -> None:
    """Two kills: the same weights, momenta, averages, class centres and losses as without."""
    assert train_through_kills(tiny_set, tmp_path, 8, kills=2) == 2
    assert_same_end(tmp_path / "killed", train_to_the_end(tiny_set, tmp_path, "whole", 8))


@pytest.mark.long
def test_killed_twenty_times(tiny_set: Path, tmp_path: Path) -> None:
    """Twenty kills, some of them in the middle of writing a checkpoint."""
    assert train_through_kills(tiny_set, tmp_path, 80, kills=20) >= 15
    assert_same_end(tmp_path / "killed", train_to_the_end(tiny_set, tmp_path, "whole", 80))
