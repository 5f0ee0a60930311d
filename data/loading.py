"""Batches of decoded faces: uint8 until they are on the device, in an order that seed, epoch and position decide."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data.batch_memory import BatchMemory, batch_memory
from data.face_sets import EncodedImages, image_views
from data.images import ImageError, decode_face, decode_plain_jpegs
from data.jpeg_decoding import EncodedBatch, decode_jpegs, device_decoder, join_encoded
from data.orders import Order
from data.read_ahead import expect_random_reads, read_soon
from data.recordio import RecordError
from data.worker_loader import PREFETCH, Repeatable, WorkerLoader, forks
from utils.settings import require

_STREAM = 1  # of random numbers; augment.py has 2, models/losses/elasticface.py 3


class Batch(NamedTuple):
    """`faces`: uint8 [B, size, size, 3], RGB; `labels`: int64 [B]; `broken`: what is wrong with faces labelled -1."""

    faces: Tensor
    labels: Tensor
    broken: list[str]


class DecodedFaces(Dataset):
    """Faces decoded a batch at a time.

    `resize`: scale square faces of another size to size x size instead of raising ImageError. `tolerant`: give broken
    faces the label -1, which no loss counts, and zeros for pixels, instead of raising.
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
        faces = _empty((len(positions), self.size, self.size, 3))
        return Batch(faces, *self.decode_into(faces.numpy(), positions))

    def decode_into(self, rows: np.ndarray, positions: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Fill `rows`, uint8 [B, size, size, 3]; the labels and what is broken, as in a Batch."""
        index = np.asarray(positions, np.int64)
        labels = torch.from_numpy(self.labels.numpy()[index])
        broken = []
        for row in decode_plain_jpegs(image_views(self.images, index), rows):
            i = positions[row]
            try:
                rows[row] = decode_face(self.images.encoded(i), self.size, self.resize, _Where(self.images, i))
            except (ImageError, RecordError, OSError) as error:
                if not self.tolerant:
                    raise
                rows[row], labels[row] = 0, -1
                broken.append(str(error))
        return labels, broken


class _Where:
    """The text that names an image, made only when it is printed."""

    def __init__(self, images: EncodedImages, i: int) -> None:
        self._images, self._i = images, i

    def __str__(self) -> str:
        return self._images.describe(self._i)


def _empty(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor; in a worker process in shared memory, where the main process reads it uncopied."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _EncodedFaces(Dataset):
    """The same faces as they are stored, for a decoder in the main process."""

    def __init__(self, faces: DecodedFaces) -> None:
        self._faces = faces

    def __getitems__(self, positions: Sequence[int]) -> EncodedBatch:
        images, unreadable = [], {}
        for row, i in enumerate(positions):
            try:
                images.append(self._faces.images.encoded(i))
            except (RecordError, OSError) as error:
                if not self._faces.tolerant:
                    raise
                images.append(b"")
                unreadable[row] = str(error)
        return join_encoded(images, positions, self._faces.size, unreadable, _empty)


class EpochBatches(Sampler[list[int]]):
    """Batches of positions for one epoch after another.

    `order` gives an epoch's positions (see data/orders.py), whatever the number of workers, and an epoch can be entered
    at any batch. The last, incomplete batch is dropped: every step sees `batch_size` faces. Of `ranks` processes that
    share the steps, the one called `rank` gets its equal part of every batch, in the order that one process would see:
    a run can go on with another number of ranks at any batch.
    """

    def __init__(
        self, order: Callable[[int], np.ndarray], images: int, batch_size: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """Raises ConfigError unless `ranks` divides `batch_size`."""
        self.order, self.images, self.batch_size = order, images, batch_size
        self.part = part_of_batch(batch_size, rank, ranks)
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
            yield order[batch * self.batch_size :][self.part].tolist()


def part_of_batch(batch_size: int, rank: int, ranks: int) -> slice:
    """The rows of a batch that are those of `rank`, from 0. Raises ConfigError unless all `ranks` get equally many,
    ValueError for a rank that there is not.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is none of {ranks} ranks")
    require(batch_size % ranks == 0, "train.batch_size", f"must be a multiple of the {ranks} ranks, got {batch_size}")
    rows = batch_size // ranks
    return slice(rank * rows, (rank + 1) * rows)


def training_loader(
    faces: DecodedFaces,
    batches: EpochBatches,
    workers: int,
    device: torch.device,
    decode: Literal["cpu", "gpu"] = "cpu",
) -> Iterable[Batch]:
    """Batches in the order of `batches`; set its epoch before each pass.

    The faces are on the CPU; with `decode` "gpu" they are on `device`, decoded there (see data/jpeg_decoding.py).
    Raises ConfigError when that cannot be. For a CUDA device the workers decode into pinned memory, from which
    `data.prefetch.on_device` copies: who copies without blocking keeps a batch until that is done.
    """
    positions = _reading_ahead(batches, faces.images)
    if decode == "gpu":
        device_decoder(device)  # an error now, not after the workers started
        encoded = _EncodedFaces(faces)
        loader = WorkerLoader(encoded, faces.images, positions, workers, pin=False, keep_workers=workers > 0)
        return Repeatable(_decoded_on_arrival, loader, faces, device)
    rows = batches.part.stop - batches.part.start
    return _decoding_loader(faces, positions, rows, workers, device, for_training=True)


def sequential_loader(
    faces: DecodedFaces,
    batch_size: int,
    workers: int,
    device: torch.device,
    positions: Sequence[int] | np.ndarray | None = None,
) -> Iterable[Batch]:
    """All faces once, or those at `positions`, in order, the last batch as large as it is."""
    batches = Repeatable(_consecutive, range(len(faces)) if positions is None else positions, batch_size)
    return _decoding_loader(faces, batches, batch_size, workers, device, for_training=False)


def _consecutive(positions: Sequence[int] | np.ndarray, batch_size: int) -> Iterator[list[int]]:
    for start in range(0, len(positions), batch_size):
        yield np.asarray(positions[start : start + batch_size]).tolist()


def _decoding_loader(
    faces: DecodedFaces,
    batches: Iterable[Sequence[int]],
    batch_size: int,
    workers: int,
    device: torch.device,
    for_training: bool,
) -> Iterable[Batch]:
    """`for_training`: workers stay from epoch to epoch, and batches come in the very memory that they fill, pinned.
    Otherwise torch copies them to pinned memory, which it does not use again before its copies are done.
    """
    cuda, keep_workers = device.type == "cuda", for_training and workers > 0
    if not (workers and forks()):
        return WorkerLoader(faces, faces.images, batches, workers, cuda, keep_workers)
    # Those that the workers are at, one that is in use, the one before, and one to spare.
    memory = BatchMemory(workers * PREFETCH + 3, (batch_size, faces.size, faces.size, 3))
    dataset, to_jobs = _FacesInMemory(faces, memory), partial(_with_slots, memory)
    pin_by_torch = cuda and not for_training
    loader = WorkerLoader(dataset, faces.images, batches, workers, pin_by_torch, keep_workers, to_jobs)
    return Repeatable(_from_pinned, loader, memory) if cuda and for_training else loader


def _from_pinned(loader: DataLoader, memory: BatchMemory) -> Iterator[Batch]:
    """The batches of `loader`, whose memory is pinned when its workers have been forked."""
    batches = iter(loader)
    memory.pin()
    return batches


class _Job(NamedTuple):
    """Positions of a batch, and the slot that its faces go to; None: memory of their own."""

    positions: Sequence[int]
    slot: int | None


def _with_slots(memory: BatchMemory, batches: Iterable[Sequence[int]]) -> Iterator[_Job]:
    """Batches of positions as jobs. A slot is lost when its batch raises, and then there is one less."""
    for positions in batches:
        yield _Job(positions, memory.lend())


class _FacesInMemory(Dataset):
    """Does jobs, in worker processes."""

    def __init__(self, faces: DecodedFaces, memory: BatchMemory) -> None:
        self._faces, self._memory = faces, memory

    def __getitems__(self, job: _Job) -> "Batch | _Delivery":
        if job.slot is None:
            return self._faces.__getitems__(job.positions)
        rows = self._memory.place(job.slot, len(job.positions))
        labels, broken = self._faces.decode_into(rows, job.positions)
        return _Delivery(self._memory.number, job.slot, labels, broken)


class _Delivery:
    """A batch on its way to the main process: pickled in the worker, it is a Batch when unpickled there."""

    def __init__(self, memory: int, slot: int, labels: Tensor, broken: list[str]) -> None:
        self._content = memory, slot, labels.numpy(), broken

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple]:
        return _received, self._content


def _received(memory: int, slot: int, labels: np.ndarray, broken: list[str]) -> Batch:
    return Batch(batch_memory(memory).take(slot, len(labels)), torch.from_numpy(labels), broken)


def _reading_ahead(batches: EpochBatches, images: EncodedImages) -> Iterable[list[int]]:
    """Batches of positions, with hints to the system: read what the workers get next, or the next stretch of the order.

    What is hinted is read while batches before it are decoded, many images at a time, as disks like it.
    """
    stretch = batches.order.stretch if isinstance(batches.order, Order) else 0
    if stretch:
        return Repeatable(_hinting_stretches, batches, images, stretch)
    expect_random_reads(images)
    return Repeatable(_hinting_batches, batches, images)


def _hinting_batches(batches: EpochBatches, images: EncodedImages) -> Iterator[list[int]]:
    for positions in batches:
        read_soon(images, np.array(positions))
        yield positions


def _hinting_stretches(batches: EpochBatches, images: EncodedImages, stretch: int) -> Iterator[list[int]]:
    """While a stretch is shown, the next one is read in the order of the file."""
    order, size = batches.order(batches.epoch), batches.batch_size
    to_read = np.concatenate([np.sort(order[start : start + stretch]) for start in range(0, len(order), stretch)])
    start = batches.first * size
    read_soon(images, to_read[start - start % stretch : start + stretch])
    for positions in batches:
        read_soon(images, to_read[start + stretch :][:size])
        start += size
        yield positions


def _decoded_on_arrival(loader: DataLoader, faces: DecodedFaces, device: torch.device) -> Iterator[Batch]:
    """The batches of a loader of encoded faces, decoded on the device as they come."""
    for encoded in loader:
        decoded, broken = decode_jpegs(encoded, faces.size, device, faces.resize, faces.images.describe)
        if broken and not faces.tolerant:
            raise ImageError(next(iter(broken.values())))
        labels = faces.labels[torch.as_tensor(encoded.positions)]
        labels[list(broken)] = -1
        yield Batch(decoded, labels, list(broken.values()))


def flips(seed: int, epoch: int, batch: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """Which faces of a batch are mirrored: bool [batch_size], decided by the arguments alone.

    Of several ranks each gets its part, [batch_size / ranks], of what one process would draw.
    """
    generator = np.random.default_rng([seed, epoch, batch, _STREAM])
    return torch.from_numpy(generator.random(batch_size)[part_of_batch(batch_size, rank, ranks)] < 0.5)


def to_network_input(faces: Tensor, mirror: Tensor | bool = False) -> Tensor:
    """uint8 [B, H, W, 3] RGB on any device to float32 [B, 3, H, W] in [-1, 1], channels last in memory.

    `mirror`: bool [B], which faces to mirror left to right, or one bool for all.
    """
    if isinstance(mirror, Tensor) and (faces.is_cuda or torch.compiler.is_compiling()):
        faces = torch.where(mirror[:, None, None, None], faces.flip(2), faces)
    elif isinstance(mirror, Tensor):
        # The mirrored face where the mask is 255, else the face: torch.where takes ten times as long on the CPU.
        mask = mirror[:, None, None, None].to(torch.uint8).neg_()
        faces = faces.flip(2).bitwise_xor_(faces).bitwise_and_(mask).bitwise_xor_(faces)
    elif mirror:
        faces = faces.flip(2)
    return faces.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
