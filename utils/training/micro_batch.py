"""In how many passes a batch goes, and how many faces fit into memory in a forward and backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.heads import BlockwiseHead, Head
from utils.devices import autocast
from utils.files import write_text_atomic

#: In a run's folder: faces in a pass at most, because more of them ran out of memory.
LIMIT = "micro_batch.txt"


def passes_of(faces: int, micro_batch: int) -> int:
    """How many passes `faces` take, of `micro_batch` at most."""
    return -(-faces // micro_batch)


def part_sizes(faces: int, micro_batch: int) -> list[int]:
    """The different sizes of these passes, the largest first; they differ by one, as those of torch.tensor_split."""
    passes = passes_of(faces, micro_batch)
    return [faces // passes + 1, faces // passes] if faces % passes else [faces // passes]


def can_train(faces: int, micro_batch: int) -> bool:
    """Whether each of these passes has the two faces that batch norm needs."""
    return part_sizes(faces, micro_batch)[-1] >= 2


def keep_limit(run: Path, faces: int) -> None:
    """Limit the passes of `run` to so many faces from its next start on. Any rank may do this: all write the same."""
    write_text_atomic(run / LIMIT, f"{faces}\n")


def kept_limit(run: Path) -> int | None:
    """What `keep_limit` wrote; None: nothing. Raises ValueError, naming the file, unless it is a number from 1 on."""
    path = run / LIMIT
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    if not text.strip().isdecimal() or len(text) > 20 or int(text) < 1:
        raise ValueError(f"{path}: {text.strip()[:20]!r} is no number of images: remove the file")
    return int(text)


def largest_that_fits(attempt: Callable[[int], None], most: int) -> int:
    """The first of `most`, its half, its quarter ... for which `attempt` does not run out of memory.

    Raises torch.OutOfMemoryError when not even two fit, which batch norm needs, or `most` is one that does not.
    """
    while True:
        try:
            attempt(most)
        except torch.OutOfMemoryError:
            if most <= 2:
                raise
        else:
            return most
        most = -(-most // 2)  # outside of the handler, which keeps the failed pass alive
        torch.cuda.empty_cache()


def bytes_beside(faces: int, whole: int, image_size: int, network: nn.Module, head: Head, ranks: int) -> int:
    """Bytes that a step needs beside the network's pass of `faces`, of a batch of `whole` on each of `ranks`.

    That is the batch's inputs; about four matrices of the head, faces of all ranks x classes computed at a time; what
    is as large as the centres of these classes: their gradient and their normalised copy, or in the blockwise engine
    their gradient, twice, and while the update is compiled copies of what it changes; the gradient of all centres, if
    there are several passes; a copy of the network's gradient, if ranks exchange it.
    """
    columns, copies = len(head.weight), 2
    if isinstance(head, BlockwiseHead):
        columns, copies = min(columns, head.block * head.sub_centers), 4 + len(head.optimizer_states())
    floats = whole * 3 * image_size**2 + 4 * faces * ranks * columns + copies * columns * head.weight.shape[1]
    if faces < whole:
        floats += head.weight.numel()
    if ranks > 1:
        floats += sum(parameter.numel() for parameter in network.parameters())
    return 4 * floats


def trial_pass(
    network: nn.Module, faces: int, image_size: int, precision: torch.dtype, states: int = 0, beside: int = 0
) -> None:
    """Make a forward and backward pass of so many grey faces, while memory is reserved for what a step needs besides:
    `states` tensors for every weight, and `beside` bytes.

    The statistics of norms are as before then, and no weight has a gradient. Raises torch.OutOfMemoryError.
    """
    parameters = list(network.parameters())
    device = parameters[0].device
    reserved = [torch.empty_like(parameter) for parameter in parameters for _ in range(states)]
    reserved.append(torch.empty(beside, dtype=torch.uint8, device=device))
    try:
        inputs = torch.zeros(faces, 3, image_size, image_size, device=device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with statistics_kept(network):
            with autocast(device, precision):
                embeddings = network(inputs)
            embeddings.float().sum().backward()
    finally:
        del reserved
        network.zero_grad(set_to_none=True)


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """After the block the buffers of `network`, such as the statistics of norms, are as they were."""
    before: list[tuple[Tensor, Tensor]] = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in before:
                buffer.copy_(kept)
