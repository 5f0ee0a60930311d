"""All pairs of a set of embeddings, block by block: their scores, and which of them are of one person.

Scores are cosine similarities in float32, of rows that are normalised in float64, and the same to the bit each time.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from utils.progress import progress_bar
from utils.ranks import Ranks

# Block sizes whose scores stay in a core's cache, and that fill a GPU.
_BLOCK = {"cpu": 512, "cuda": 4096}
# Rows that are normalised at once.
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Block:
    """Scores of some rows against some columns, slices of `PairBlocks.vectors`.

    scores: float32 [rows, columns], valid until the thread's next block.
    mixed: whether pairs of it are genuine, or are none at all because they lie below the diagonal.
    """

    scores: Tensor
    rows: slice
    columns: slice
    mixed: bool


class PairBlocks:
    """All pairs of a set, as often as wanted, in the same blocks and so with bit-identical scores.

    vectors: float32 [N, D], unit rows. labels: int64 [N], 0..C-1, ascending: then only blocks near the diagonal have
    genuine pairs. people: [C], what the labels were; order: int64 [N], where the rows were. Each rank has its share of
    the blocks. On the CPU as many threads work as torch may use, each on blocks of its own: torch counts with one.
    """

    def __init__(
        self, embeddings: Tensor, labels: Tensor, block: int = 0, ranks: Ranks | None = None, progress: bool = False
    ) -> None:
        check_embeddings(embeddings, labels, block)
        self.people, numbers = labels.to(embeddings.device).unique(return_inverse=True)
        self.order = numbers.argsort(stable=True)
        self.vectors, self.labels = _normalised(embeddings)[self.order], numbers[self.order]
        self.ranks, self._progress = ranks or Ranks(), progress
        self._block = block or _BLOCK.get(embeddings.device.type, 2048)
        self.threads = torch.get_num_threads() if embeddings.device.type == "cpu" else 1
        self._sorted = self.labels.cpu().numpy()
        self._starts = range(0, len(labels), self._block)

    def each(self, work: Callable[[Block, int], None], title: str) -> None:
        """Call `work(block, thread)` for each block of this rank, on `threads` threads, numbered from 0."""
        starts, size = self._starts, self.ranks.size
        # Of a million images there are two million blocks: no list of them.
        pairs = ((row, column) for number, row in enumerate(starts) for column in starts[number:])
        todo = islice(pairs, self.ranks.rank, None, size)
        count = len(range(self.ranks.rank, len(starts) * (len(starts) + 1) // 2, size))
        lock = threading.Lock()

        def run(thread: int) -> None:
            buffer = torch.empty(self._block**2, device=self.vectors.device)
            with torch.no_grad():
                while True:
                    with lock:
                        start = next(todo, None)
                    if start is None:
                        return
                    work(self._scores(*start, buffer), thread)
                    with lock:
                        bar.update()

        hidden = not (self._progress and self.ranks.first)
        with progress_bar(count, "block", title, disable=hidden) as bar:
            if self.threads == 1:
                run(0)
                return
            with _one_thread_each(self.threads), ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(run, range(self.threads)))

    def visit(self, work: Callable[[Tensor, Tensor, int], None], title: str) -> None:
        """Call `work(genuine, impostor, thread)` with the scores of each block of this rank."""
        self.each(lambda block, thread: work(*self.split(block), thread), title)

    def _scores(self, row: int, column: int, buffer: Tensor) -> Block:
        rows, columns = self.vectors[row : row + self._block], self.vectors[column : column + self._block]
        scores = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
        torch.mm(rows, columns.T, out=scores)
        mixed = bool(self._sorted[column] <= self._sorted[row + len(rows) - 1])
        return Block(scores, slice(row, row + len(rows)), slice(column, column + len(columns)), mixed)

    def split(self, block: Block) -> tuple[Tensor, Tensor]:
        """The genuine and the impostor scores of a block, float32, one-dimensional."""
        if not block.mixed:
            return block.scores.new_empty(0), block.scores.view(-1)
        genuine, impostor = self.masks(block)
        return _picked(block.scores, genuine), _picked(block.scores, impostor)

    def masks(self, block: Block) -> tuple[Tensor, Tensor]:
        """Which scores of a block are genuine and which are impostors', bool [rows, columns] each."""
        genuine = self.labels[block.rows, None] == self.labels[None, block.columns]
        impostor = ~genuine
        if block.rows == block.columns:
            genuine.triu_(diagonal=1)
            impostor.triu_(diagonal=1)
        return genuine, impostor


@contextmanager
def _one_thread_each(threads: int) -> Iterator[None]:
    """No more than a thread for each operation, of the threads that are started within."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_embeddings(embeddings: Tensor, labels: Tensor, block: int) -> None:
    """Raise ValueError when shapes or types do not fit, or the block size is out of range."""
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be floats of shape [N, D], not {embeddings.dtype} {list(embeddings.shape)}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{len(embeddings)} embeddings need as many labels, not shape {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    if block < 0:
        raise ValueError(f"block must be at least 1, or 0 for automatic, not {block}")


def _normalised(embeddings: Tensor) -> Tensor:
    """Rows of unit length, float32: normalised in float64, so that each component is rounded only once."""
    parts = embeddings.detach().split(_ROWS_AT_ONCE)
    norms = torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in parts])
    for bad, complaint in ((~norms.isfinite(), "is not finite"), (norms == 0, "has zero norm")):
        if bad.any():
            row = int(bad.int().argmax())
            raise ValueError(f"embedding row {row} {complaint} ({int(bad.sum())} such rows)")
    vectors = torch.empty_like(embeddings, dtype=torch.float32)
    for rows, part, lengths in zip(vectors.split(_ROWS_AT_ONCE), parts, norms.split(_ROWS_AT_ONCE), strict=True):
        rows.copy_(part.double() / lengths[:, None])
    return vectors


def _picked(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores where the mask of the same shape is set, one-dimensional."""
    if scores.device.type != "cpu":
        return scores[mask]
    return torch.from_numpy(scores.numpy().reshape(-1)[np.flatnonzero(mask.numpy())])
