"""Batches that are on the device when they are needed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from data.loading import Batch


class CopyEvent(Protocol):
    """When a copy is done; a `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it is done."""

    def synchronize(self) -> None:
        """Wait until it is done."""


Event = TypeVar("Event", bound=CopyEvent)


class Copy(NamedTuple, Generic[Event]):
    """A batch on its way to the device."""

    batch: Batch
    done: Event


def on_device(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches of `loader`, their faces and labels on `device`.

    On CUDA the next batch is copied by a stream of its own while the device computes, if its faces are pinned. A batch
    of the loader is kept until its copy is done: its memory may be used again after that (see data/batch_memory.py).
    """
    if device.type != "cuda":
        yield from loader
        return
    stream = torch.cuda.Stream(device)

    def copy(batch: Batch) -> Copy[torch.cuda.Event]:
        with torch.cuda.stream(stream):
            labels = batch.labels.pin_memory().to(device, non_blocking=True)
            copied = Batch(batch.faces.to(device, non_blocking=True), labels, batch.broken)
            return Copy(copied, stream.record_event())

    for copied, done in one_ahead(loader, copy):
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        for tensor in (copied.faces, copied.labels):
            tensor.record_stream(current)  # its memory is the copying stream's, which must not reuse it too early
        yield copied


def one_ahead(loader: Iterable[Batch], copy: Callable[[Batch], Copy[Event]]) -> Iterator[Copy[Event]]:
    """Copies of the batches of `loader`; when one is given out, that of the next has begun.

    `copy` begins one. The original is kept until that is done; those that are left when the iteration ends, or is given
    up, are waited for.
    """
    copying: deque[tuple[Event, Batch]] = deque()
    ahead: Copy[Event] | None = None
    try:
        for batch in loader:
            begun = copy(batch)
            copying.append((begun.done, batch))
            if ahead is not None:
                yield ahead
            ahead = begun
            while copying and copying[0][0].query():
                copying.popleft()
        if ahead is not None:
            yield ahead
    finally:
        for done, _ in copying:
            done.synchronize()
