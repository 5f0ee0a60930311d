"""What tests share: where the real faces are, and the tiny sets that several of them use."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from config import Config
from data.face_set_writer import write_face_set
from data.verification_bin import write_bin
from tiny_faces import tiny_face
from train import train
from utils.settings import build

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


@pytest.fixture(scope="session")
def kept_embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what real nets give for all of LFW, which takes minutes: the tests of a run share it."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The size of each file and folder, by inode, when it was last synced, in the order of their first syncs."""
    sizes: dict[int, int] = {}
    real_sync = os.fsync

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        sizes[status.st_ino] = status.st_size
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return sizes


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on a busy machine: waiting for a second thread takes many times longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set of 6 identities with 8 faces of 32x32 each, and `tiny.bin`, 20 pairs of other people."""
    folder = tmp_path_factory.mktemp("sets") / "tiny"
    with write_face_set(folder, 32) as out:
        for identity in range(6):
            out.add_identity(tiny_face(identity, shot) for shot in range(8))
        images, same = [], []
        for pair in range(20):
            person, other = 100 + pair % 5, 100 + (pair + pair % 2) % 5
            images += [tiny_face(person, 2 * pair), tiny_face(other, 2 * pair + 1)]
            same.append(person == other)
        write_bin(out.folder / "tiny.bin", images, same)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training run on `tiny_set`, whose model tells people apart by their patterns."""
    config = build(
        Config,
        {
            "common.device": "cpu",
            "common.workers": 0,
            "common.runs": str(tmp_path_factory.mktemp("runs")),
            "data.root": (str(tiny_set),),
            "data.image_size": 32,
            "model.network": "demo",
            "model.embedding_size": 16,
            "loss.scale": 8.0,
            "loss.margin": 0.2,
            "train.name": "tiny",
            "train.batch_size": 16,
            "train.epochs": 8,
            "train.lr": 0.05,
        },
    )
    torch.set_num_threads(1)  # made before `one_thread` has its turn
    return train(config)


@pytest.fixture(scope="session")
def tested_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with the results of a test in it, as all_pair_test.py leaves them."""
    folder = tmp_path_factory.mktemp("tested") / "tiny"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("checkpoints", "test"))
    points = [
        {"far": 0.01, "tar": 0.75, "threshold": 0.3, "supported": True},
        {"far": 1e-6, "tar": 0.5, "threshold": 0.6, "supported": False},
    ]
    sets = {
        "tiny": {"protocol": "10 folds", "pairs": 20, "accuracy": 0.9125, "std": 0.01},
        "own": {"protocol": "all pairs", "images": 9, "eer": 0.125, "auc": 0.5, "points": points},
    }
    (folder / "test").mkdir()
    (folder / "test" / "results.json").write_text(json.dumps({"mirror": True, "sets": sets}))
    return folder
