"""Loading where images are broken, files shrink, and workers die."""

import errno
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.images import ImageError, encode_png
from data.loading import DecodedFaces, EpochBatches, sequential_loader, training_loader
from data.orders import exact_order
from loading_sets import SIZE, large_set, picture, write_set
from utils.processes import WorkerError

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"\xff\xd8\xff\xe0 no picture", r"its 15 bytes are no image"),
        (encode_png(np.zeros((SIZE, SIZE + 1, 3), np.uint8)), r"is 17x16 pixels, expected 16x16: .*data\.image_size"),
    ],
    ids=["broken", "wrong size"],
)
def test_unusable_images_are_named(tmp_path: Path, workers: int, image: bytes, message: str) -> None:
    """Through a worker process too, the error says which record of which file, and where."""
    records = write_set(tmp_path, {9: image})
    loader = sequential_loader(DecodedFaces(records, records.labels, SIZE), 5, workers, CPU)
    where = rf"train\.rec, record 9 at byte {records._offsets[8]}:? "
    with pytest.raises(ImageError, match=where + message):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tolerant_loader_labels_broken_images(tmp_path: Path, workers: int) -> None:
    """In training a broken image is a row of zeros that no loss counts, with a message that names it."""
    records = write_set(tmp_path, {9: b"no picture", 12: encode_png(np.zeros((4, 4, 3), np.uint8))})
    faces = DecodedFaces(records, records.labels, SIZE, tolerant=True)
    batches = list(sequential_loader(faces, 10, workers, CPU))
    labels = torch.cat([batch.labels for batch in batches])
    assert np.flatnonzero(labels == -1).tolist() == [8, 11]
    assert not batches[0].faces[8].any()
    assert ["record 9 at" in message for message in batches[0].broken] == [True]
    assert ["record 12 at" in message for message in batches[1].broken] == [True]
    assert batches[2].broken == []
    assert faces.labels[8] == 9 % 5, "the set's own labels must stay"


def test_other_sizes_are_scaled_when_asked(tmp_path: Path) -> None:
    """`resize` takes images of any size; what has the right size already is not touched."""
    large = np.full((2 * SIZE, 2 * SIZE, 3), (200, 30, 90), np.uint8)
    records = write_set(tmp_path, {9: encode_png(large)})
    faces, _, _ = DecodedFaces(records, records.labels, SIZE, resize=True).__getitems__([8, 9])
    assert (faces[0] == torch.tensor([200, 30, 90])).all()
    assert np.array_equal(faces[1], picture(10))


@pytest.fixture
def quick_looks_at_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are looked at every 0.3 seconds, not 5."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.3)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path, quick_looks_at_workers: None) -> None:
    """A mapped file that cannot be read kills the worker (SIGBUS): the error says so, with record, offset, reason."""
    faces = large_set(tmp_path)
    size = faces.path.stat().st_size
    decoded = DecodedFaces(faces, faces.labels, SIZE, tolerant=True)
    batches = EpochBatches(partial(exact_order, len(faces), 0), len(faces), 4)
    before = signal.getsignal(signal.SIGCHLD)
    loaded = iter(training_loader(decoded, batches, 1, CPU))
    next(loaded)
    assert signal.getsignal(signal.SIGCHLD) == before  # a step is not interrupted by torch's handler
    os.truncate(faces.path, 4096)
    where = rf"{faces.path}, record \d+ at byte \d+: the file has 4,096 bytes, {size:,} when it was opened"
    with pytest.raises(WorkerError, match=f"a worker process died of a bus error.*; {where}"):
        list(loaded)


def test_a_worker_that_dies_between_epochs_is_named(tmp_path: Path, quick_looks_at_workers: None) -> None:
    """Killed for memory while the main process verifies, say: the next epoch, too, says what happened."""
    records = write_set(tmp_path, {})
    batches = EpochBatches(partial(exact_order, len(records), 0), len(records), 4)
    loader = training_loader(DecodedFaces(records, records.labels, SIZE), batches, 1, CPU)
    others = set(multiprocessing.active_children())
    list(loader)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    worker.join()
    with pytest.raises(WorkerError, match=r"a worker process died \(out of memory\?\); try fewer with --workers"):
        list(loader)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch, which stops half-way
def test_a_loader_whose_workers_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for their locks it says so."""
    records = write_set(tmp_path, {})
    loader = sequential_loader(DecodedFaces(records, records.labels, SIZE), 5, 1, CPU)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    with pytest.raises(WorkerError, match=r"cannot be started \(No space left on device on /dev/shm\)"):
        list(loader)


def test_a_program_ends_with_a_loader_alive(tmp_path: Path) -> None:
    """Workers leave a scheduler's SIGTERM to the main process, but go when that one ends."""
    write_set(tmp_path, {})
    program = f"""
import os, signal, time, torch
from data.face_sets import open_face_set
from data.loading import DecodedFaces, EpochBatches, training_loader
from data.orders import create_order
faces = open_face_set({str(tmp_path)!r})
batches = EpochBatches(create_order("exact", faces.labels, 0), len(faces), 2)
loader = training_loader(DecodedFaces(faces, faces.labels, {SIZE}), batches, 1, torch.device("cpu"))
iterator = iter(loader)
next(iterator)
child = int(open(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read().split()[0])
os.system(f"kill -TERM {{child}}")
time.sleep(0.2)
print(len([next(iterator) for _ in range(8)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
