"""Who is who across sets: the most similar identities of long lists, in blocks, on a device, over several ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.devices import full_precision
from utils.ranks import Ranks


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
) -> tuple[TopMatches, TopMatches]:
    """The most similar of `second` [M, D] for each of `first` [N, D], and the other way round; unit vectors, float32.

    Of each the best one is kept, whatever its cosine, and up to k - 1 more with cosines above `floor`. Without
    `second`: within `first`, each but itself; both results are then the same. Several `ranks` share the row blocks, and
    all get the result.

    Memory beside the vectors: 4 x block^2 bytes for the cosines and 12 x k x (N + M) for what is kept, never N x M.
    Blocks are 1024 wide on the CPU, whose caches hold such a one, else 8192, or as `block` says. Of 1 M x 1 M
    identities with k = 8 on the CPU: 4 MB and 192 MB. Time: that of the product, 2 x N x M x D operations, and two
    passes over each block for the maxima of its rows and of its columns; only rows and columns whose maximum beats
    what they have are looked at closer, which a floor makes few.
    """
    ranks = ranks or Ranks()
    block = block or (1024 if first.device.type == "cpu" else 8192)
    within = second is None
    columns = first if second is None else second
    n, m = len(first), len(columns)
    of_rows = _Kept(n, k, floor, first.device)
    of_columns = of_rows if within else _Kept(m, k, floor, first.device)
    buffer = first.new_empty(min(block, n) * min(block, m))
    with full_precision(first.device):
        for number, i in enumerate(range(0, n, block)):
            if number % ranks.size != ranks.rank:
                continue
            rows = first[i : i + block]
            for j in range(i if within else 0, m, block):
                part = columns[j : j + block]
                cosines = buffer[: len(rows) * len(part)].view(len(rows), len(part))
                torch.mm(rows, part.T, out=cosines)
                if within and i == j:
                    cosines.fill_diagonal_(-torch.inf)
                of_rows.offer(cosines, 1, i, j)
                if not (within and i == j):
                    of_columns.offer(cosines, 0, j, i)
    of_rows.share(ranks)
    if not within:
        of_columns.share(ranks)
    return of_rows.matches(), of_columns.matches()


# Rows whose matches several ranks exchange at once.
_SHARED_AT_ONCE = 1 << 17


class _Kept:
    """The k best of each of N items so far."""

    def __init__(self, items: int, k: int, floor: float, device: torch.device) -> None:
        self.cosine = torch.full((items, k), -torch.inf, device=device)
        self.index = torch.full((items, k), -1, dtype=torch.int64, device=device)
        # What a cosine has to beat to be kept.
        self.bar = torch.full((items,), -torch.inf, device=device)
        self.floor = floor

    def offer(self, cosines: Tensor, along: int, start: int, offset: int) -> None:
        """Take in a block of cosines. `along`: the dimension to look along for the best; the other one are the items
        from `start` on; the candidates are numbered from `offset` on.
        """
        size = cosines.shape[1 - along]
        beaten = cosines.amax(along) > self.bar[start : start + size]
        items = beaten.nonzero().flatten()
        if not len(items):
            return
        # Columns are gathered row by row and turned in memory: a view of them would be read with long strides.
        chosen = cosines[items] if along == 1 else cosines.index_select(1, items).T.contiguous()
        k = min(self.cosine.shape[1], chosen.shape[1])
        if k > 1 and self.floor <= -1:
            more, position = _largest(chosen, k)
            self._take(items + start, more, position + offset)
            return
        # Cosines up to the floor can only be the best one: where that is all there is, the maximum is enough.
        best, position = _largest(chosen, 1)
        high = (best > self.floor).flatten() if k > 1 else torch.zeros_like(best, dtype=torch.bool).flatten()
        self._take(items[~high] + start, best[~high], position[~high] + offset)
        if high.any():
            more, position = _largest(chosen[high], k)
            self._take(items[high] + start, more, position + offset)

    def _take(self, items: Tensor, cosine: Tensor, index: Tensor) -> None:
        if not len(items):
            return
        k = self.cosine.shape[1]
        cosine, order = torch.cat([self.cosine[items], cosine], 1).topk(k, dim=1)
        index = torch.cat([self.index[items], index], 1).gather(1, order)
        low = cosine[:, 1:] <= self.floor
        cosine[:, 1:][low], index[:, 1:][low] = -torch.inf, -1
        self.cosine[items], self.index[items] = cosine, index
        self.bar[items] = torch.minimum(cosine[:, 0], cosine[:, -1].clamp(min=self.floor))

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
            low = best[:, 1:] <= self.floor
            best[:, 1:][low], index[:, 1:][low] = -torch.inf, -1
            self.cosine[part], self.index[part] = best, index

    def matches(self) -> TopMatches:
        return TopMatches(self.cosine, self.index)


def _largest(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, as topk gives them.

    On the CPU numpy's argmax is ten times as fast for one or two of a row: it is vectorised, topk is not.
    """
    if k > 2 or cosines.device.type != "cpu":
        return cosines.topk(k, dim=1)
    position = torch.from_numpy(cosines.numpy().argmax(1, keepdims=True))
    best = cosines.gather(1, position)
    if k == 1:
        return best, position
    without = cosines.scatter(1, position, -torch.inf)
    second = torch.from_numpy(without.numpy().argmax(1, keepdims=True))
    return torch.cat([best, without.gather(1, second)], 1), torch.cat([position, second], 1)
