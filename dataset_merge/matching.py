"""Who is who across sets: the most similar identities of long lists, in blocks, on a device, over several ranks."""

import hashlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.devices import full_precision
from utils.files import atomic_write
from utils.progress import progress_bar
from utils.ranks import Ranks

# Row blocks for each of several ranks, at least.
_BLOCKS_EACH = 4
# Seconds of work after which the matches so far are saved; what takes less is not.
_SAVED_AFTER = 60.0
# Rows whose matches several ranks exchange at once.
_SHARED_AT_ONCE = 1 << 17
# Candidates in a part: of each part the highest cosine is found first, and only the best parts are looked through.
_PART = 32
# Pairs from which on comparing shows its progress: half a minute on a CPU.
_PAIRS_SHOWN = 1 << 30


@dataclass(frozen=True)
class TopMatches:
    """The most similar columns of each of N rows, the best first.

    `cosine`: float32 [N, k], -inf where there are fewer than k; `index`: int64 [N, k], columns, -1 there. Which of
    equal cosines come first is not defined.
    """

    cosine: Tensor
    index: Tensor


def top_matches(
    first: Tensor,
    second: Tensor | None,
    k: int = 8,
    floor: float = -1.0,
    block: int = 0,
    ranks: Ranks | None = None,
    folder: Path | None = None,
) -> tuple[TopMatches, TopMatches]:
    """The most similar of `second` [M, D] for each of `first` [N, D], and the other way round; unit vectors, float32.

    Of each the best one is kept, whatever its cosine, and up to k - 1 more with cosines above `floor`. Without
    `second`: within `first`, each but itself; both results are then the same. Several `ranks` share the row blocks, and
    all get the result. What takes long is kept in `folder`, by the vectors and all else that it depends on; a later
    call goes on from there.

    Memory beside the vectors: 4 x block^2 bytes for the cosines, 12 x k x (N + M) for what is kept, and up to
    800 x k x block while a block is looked through, never N x M. Blocks are 1024 wide on the CPU, whose caches hold
    such a one, else 8192, or as `block` says. Of 1 M x 1 M identities with k = 8 on the CPU: 4 MB, 192 MB and 7 MB.
    Time: that of the product, 2 x N x M x D operations, and two passes over each block for the maxima of parts of its
    rows and of its columns; only those whose maximum beats what they have are looked at closer: few, with a floor.
    """
    if second is not None and len(second) > len(first):  # more rows to share
        columns, rows = top_matches(second, first, k, floor, block, ranks, folder)
        return rows, columns
    ranks = ranks or Ranks()
    block = block or usual_block(first.device)
    within = second is None
    other = first if second is None else second
    n, m = len(first), len(other)
    # Of several ranks none should wait long for another one's last block. Within a set both sides have the same blocks.
    row_block = block if ranks.size == 1 else max(1, min(block, -(-n // (_BLOCKS_EACH * ranks.size))))
    column_block = row_block if within else block
    of_rows = _Kept(n, k, floor, first.device)
    of_columns = of_rows if within else _Kept(m, k, floor, first.device)
    kept = [of_rows] if within else [of_rows, of_columns]
    settings = (k, floor, row_block, column_block, ranks.rank, ranks.size)
    saved = _Saved(folder, (first, second), settings, ranks.size * row_block, kept)
    buffer = first.new_empty(_padded(min(row_block, n)) * _padded(min(column_block, m)))
    shown = ranks.first and n * m >= _PAIRS_SHOWN
    bar = progress_bar(n, "identity", "compare", initial=min(saved.start, n), disable=not shown)
    with full_precision(first.device), bar:
        for i in range(saved.start + ranks.rank * row_block, n, ranks.size * row_block):
            own = first[i : i + row_block]
            for j in range(i if within else 0, m, column_block):
                part = other[j : j + column_block]
                shape = _padded(len(own)), _padded(len(part))
                cosines = buffer[: shape[0] * shape[1]].view(shape)
                torch.mm(own, part.T, out=cosines[: len(own), : len(part)])
                cosines[len(own) :] = -torch.inf
                cosines[:, len(part) :] = -torch.inf
                if within and i == j:
                    cosines.fill_diagonal_(-torch.inf)
                of_rows.offer(cosines, 1, i, j)
                if not (within and i == j):
                    of_columns.offer(cosines, 0, j, i)
            done = i + (ranks.size - ranks.rank) * row_block
            saved.done(done)
            bar.update(min(done, n) - bar.n)
    of_rows.share(ranks)
    if not within:
        of_columns.share(ranks)
    return of_rows.matches(), of_columns.matches()


def usual_block(device: torch.device) -> int:
    """Identities that are multiplied at once unless one says otherwise."""
    return 1024 if device.type == "cpu" else 8192


def _padded(length: int) -> int:
    """The length in whole parts."""
    return -(-length // _PART) * _PART


class _Kept:
    """The k best of each of N items so far."""

    def __init__(self, items: int, k: int, floor: float, device: torch.device) -> None:
        self.cosine = torch.full((items, k), -torch.inf, device=device)
        self.index = torch.full((items, k), -1, dtype=torch.int64, device=device)
        # What a cosine has to beat to be kept.
        self.bar = torch.full((items,), -torch.inf, device=device)
        self.floor = floor

    def offer(self, cosines: Tensor, along: int, start: int, offset: int) -> None:
        """Take in a block of cosines, padded with -inf to whole parts. `along`: the dimension to look along for the
        best; the other one are the items from `start` on; the candidates are numbered from `offset` on.
        """
        size, candidates = cosines.shape[1 - along], cosines.shape[along]
        parts = candidates // _PART
        # Part p has the candidates p, p + parts, p + 2 parts...: so neighbours in memory are compared with neighbours.
        if along == 1:
            highest = cosines.view(size, _PART, parts).amax(1)
        else:
            highest = cosines.view(_PART, parts, size).amax(0).T
        bar = self.bar[start : start + size]
        best = highest.amax(1)[: len(bar)]
        items = (best > bar).nonzero().flatten()
        if not len(items):
            return
        k = self.cosine.shape[1]
        if k > 1 and self.floor > -1 and not (best[items] > self.floor).any():
            k = 1  # cosines up to the floor can only be the best one
        # The k best are in the k parts with the highest maxima.
        chosen = highest[items].topk(min(k, parts), dim=1).indices
        places = (chosen[:, :, None] + parts * torch.arange(_PART, device=chosen.device)).flatten(1)
        flat = items[:, None] * candidates + places if along == 1 else places * size + items[:, None]
        found, order = torch.take(cosines, flat).topk(min(k, flat.shape[1]), dim=1)
        self._take(items + start, found, places.gather(1, order) + offset)

    def _take(self, items: Tensor, cosine: Tensor, index: Tensor) -> None:
        k = self.cosine.shape[1]
        cosine, order = torch.cat([self.cosine[items], cosine], 1).topk(k, dim=1)
        index = torch.cat([self.index[items], index], 1).gather(1, order)
        self._cut(cosine, index)
        self.cosine[items], self.index[items] = cosine, index
        self.bar[items] = torch.minimum(cosine[:, 0], cosine[:, -1].clamp(min=self.floor))

    def _cut(self, cosine: Tensor, index: Tensor) -> None:
        """Take out what is not above the floor, but for the best ones, and what is no cosine."""
        low = cosine <= self.floor
        low[:, 0] = cosine[:, 0] == -torch.inf
        cosine.masked_fill_(low, -torch.inf)
        index.masked_fill_(low, -1)

    def share(self, ranks: Ranks) -> None:
        """Take in what the other ranks have kept of the same items."""
        if ranks.size == 1:
            return
        k = self.cosine.shape[1]
        for start in range(0, len(self.cosine), _SHARED_AT_ONCE):
            part = slice(start, start + _SHARED_AT_ONCE)
            cosine, index = (ranks.gather(kept[part][None]) for kept in (self.cosine, self.index))
            cosine, index = (parts.permute(1, 0, 2).flatten(1) for parts in (cosine, index))
            best, order = cosine.topk(k, dim=1)
            index = index.gather(1, order)
            self._cut(best, index)
            self.cosine[part], self.index[part] = best, index

    def matches(self) -> TopMatches:
        return TopMatches(self.cosine, self.index)

    def fits(self, cosine: Any, index: Any, candidates: int) -> bool:
        """Whether another one, of the same items and as many candidates, may have kept these."""
        return (
            all(isinstance(one, Tensor) and one.shape == self.cosine.shape for one in (cosine, index))
            and (cosine.dtype, index.dtype) == (self.cosine.dtype, self.index.dtype)
            and (not index.numel() or bool(index.min() >= -1 and index.max() < candidates))
        )

    def restore(self, cosine: Tensor, index: Tensor) -> None:
        """Go on from what another one had kept."""
        self.cosine.copy_(cosine)
        self.index.copy_(index)
        self.bar = torch.minimum(self.cosine[:, 0], self.cosine[:, -1].clamp(min=self.floor))


class _Saved:
    """The matches so far in a file of `folder` (None: nowhere), named by the `vectors` and the `settings`; what is
    there already is given to `kept`, and `start` is the row to go on with, a multiple of `stride`: 0, with a warning,
    where the file is damaged.
    """

    def __init__(
        self,
        folder: Path | None,
        vectors: tuple[Tensor, Tensor | None],
        settings: tuple[float, ...],
        stride: int,
        kept: Sequence[_Kept],
    ) -> None:
        self.start = 0
        self._possible = range(0, len(vectors[0]) + stride, stride)
        self._kept = kept
        self._file = folder and folder / f"matches-{_digest(vectors, settings)}.pt"
        self._last = time.monotonic()
        if self._file and self._file.exists():
            start, found = self._read(self._file)
            if found:
                self.start = start
                for own, values in zip(kept, found, strict=True):
                    own.restore(*values)
            else:
                warnings.warn(f"{self._file} is damaged: its matches are made anew", stacklevel=3)

    def _read(self, file: Path) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        """The row to go on with, and what was kept so far; nothing where the file is damaged. Raises OSError."""
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            start, found = state["start"], [(cosine, index) for cosine, index in state["kept"]]
            # What is found for one side are numbers of the other.
            candidates = [len(other.cosine) for other in reversed(self._kept)]
            fit = [own.fits(*values, many) for own, values, many in zip(self._kept, found, candidates, strict=True)]
        except OSError:
            raise
        except Exception:  # of a damaged file torch's reader raises what its bytes lead it to
            return 0, []
        return (start, found) if type(start) is int and start in self._possible and all(fit) else (0, [])

    def done(self, start: int) -> None:
        """All rows before `start` are done, or some other rank's. Raises OSError when that cannot be saved."""
        if self._file is None or time.monotonic() - self._last < _SAVED_AFTER:
            return
        kept = [(own.cosine.cpu(), own.index.cpu()) for own in self._kept]
        with atomic_write(self._file) as file:
            try:
                torch.save({"start": start, "kept": kept}, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # of a full disk: torch covers it with its own
                    raise error.__context__ from None
                raise
        self._last = time.monotonic()


def _digest(vectors: tuple[Tensor, Tensor | None], settings: tuple[float, ...]) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for part in vectors:
        rows = part if part is not None else torch.empty(0)
        digest.update(repr(tuple(rows.shape)).encode())
        for start in range(0, len(rows), _SHARED_AT_ONCE):
            digest.update(rows[start : start + _SHARED_AT_ONCE].cpu().numpy().data)
    return digest.hexdigest()[:16]
