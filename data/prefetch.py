"""Batches that are on the device when they are needed."""

from collections.abc import Iterable, Iterator

import torch

from data.loading import Batch


def on_device(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches of `loader`, their faces and labels on `device`.

    On CUDA the next batch is copied by a stream of its own while the device computes; batches should be pinned.
    """
    if device.type != "cuda":
        yield from loader
        return
    stream = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in loader:
        with torch.cuda.stream(stream):
            copied = Batch(
                batch.faces.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True), batch.broken
            )
        if ahead is not None:
            yield _ready(ahead, device, stream)
        ahead = copied
    if ahead is not None:
        yield _ready(ahead, device, stream)


def _ready(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> Batch:
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for tensor in (batch.faces, batch.labels):
        tensor.record_stream(current)  # its memory is the copying stream's, which must not reuse it too early
    return batch
