"""Batches of decoded faces: uint8 until they are on the device, in an order that seed, epoch and position decide."""

import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data.face_sets import EncodedImages
from data.images import ImageError, decode_rgb
from data.recordio import RecordError


class Batch(NamedTuple):
    """`faces`: uint8 [B, size, size, 3], RGB; `labels`: int64 [B]; `broken`: what is wrong with faces labelled -1."""

    faces: Tensor
    labels: Tensor
    broken: list[str]


class DecodedFaces(Dataset):
    """Faces decoded a batch at a time.

    `resize`: scale faces of another size to size x size instead of raising ImageError. `tolerant`: give broken faces
    the label -1, which no loss counts, and zeros for pixels, instead of raising.
    """

    def __init__(
        self, images: EncodedImages, labels: np.ndarray, size: int, resize: bool = False, tolerant: bool = False
    ) -> None:
        self.images = images
        self.labels = torch.from_numpy(np.ascontiguousarray(labels, np.int64))
        self.size, self.resize, self.tolerant = size, resize, tolerant

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Raises ImageError or RecordError, naming the image, for a face that is broken or of the wrong size."""
        faces = _empty_batch((len(positions), self.size, self.size, 3))
        rows = faces.numpy()
        labels = self.labels[torch.as_tensor(positions)]
        broken = []
        for row, i in enumerate(positions):
            try:
                rows[row] = self._decode(i)
            except (ImageError, RecordError, OSError) as error:
                if not self.tolerant:
                    raise
                rows[row], labels[row] = 0, -1
                broken.append(str(error))
        return Batch(faces, labels, broken)

    def _decode(self, i: int) -> np.ndarray:
        image = decode_rgb(self.images.encoded(i), _Where(self.images, i))
        if image.shape[:2] == (self.size, self.size):
            return image
        if self.resize:
            return cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        raise ImageError(
            f"{self.images.describe(i)} is {image.shape[1]}x{image.shape[0]} pixels, expected {self.size}x{self.size}: "
            "align the set, set data.image_size, or let data.resize scale its images"
        )


class _Where:
    """The text that names an image, made only when it is printed."""

    def __init__(self, images: EncodedImages, i: int) -> None:
        self._images, self._i = images, i

    def __str__(self) -> str:
        return self._images.describe(self._i)


def _empty_batch(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor; in a worker process in shared memory, where the main process reads it uncopied."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class EpochBatches(Sampler[list[int]]):
    """Batches of positions for one epoch after another.

    `order` gives an epoch's positions (see data/orders.py), whatever the number of workers, and an epoch can be entered
    at any batch. The last, incomplete batch is dropped: every step sees `batch_size` faces.
    """

    def __init__(self, order: Callable[[int], np.ndarray], images: int, batch_size: int) -> None:
        self.order, self.images, self.batch_size = order, images, batch_size
        self.epoch = self.first = 0

    def start_at(self, epoch: int, batch: int) -> None:
        """The next iteration goes through `epoch` from its batch number `batch` on."""
        self.epoch, self.first = epoch, batch

    @property
    def batches(self) -> int:
        """Batches in a whole epoch."""
        return self.images // self.batch_size

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        for batch in range(self.first, self.batches):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


def training_loader(faces: DecodedFaces, batches: EpochBatches, workers: int, device: torch.device) -> DataLoader:
    """Batches in the order of `batches`; set its epoch before each pass."""
    return _loader(faces, batches, workers, device, keep_workers=workers > 0)


def sequential_loader(faces: DecodedFaces, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """All faces once, in order, the last batch as large as it is."""
    starts = range(0, len(faces), batch_size)
    batches = [range(start, min(start + batch_size, len(faces))) for start in starts]
    return _loader(faces, batches, workers, device, keep_workers=False)


def _loader(faces: DecodedFaces, batches: object, workers: int, device: torch.device, keep_workers: bool) -> DataLoader:
    return DataLoader(
        faces,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        pin_memory=device.type == "cuda",
        persistent_workers=keep_workers,
        # Python 3.14 would start every worker anew and pickle the index to it; forked ones share it.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_set_up_worker,
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _set_up_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to heed


def flips(seed: int, epoch: int, batch: int, batch_size: int) -> Tensor:
    """Which faces of a batch are mirrored: bool [batch_size], decided by the arguments alone."""
    generator = np.random.default_rng([seed, epoch, batch, 1])
    return torch.from_numpy(generator.random(batch_size) < 0.5)


def to_network_input(faces: Tensor, mirror: Tensor | bool = False) -> Tensor:
    """uint8 [B, H, W, 3] RGB on any device to float32 [B, 3, H, W] in [-1, 1], channels last in memory.

    `mirror`: bool [B], which faces to mirror left to right, or one bool for all.
    """
    if isinstance(mirror, Tensor):
        faces = torch.where(mirror[:, None, None, None], faces.flip(2), faces)
    elif mirror:
        faces = faces.flip(2)
    return faces.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
