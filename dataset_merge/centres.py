"""One vector for each identity, from the embeddings of its images: mean, trimmed mean or medoid.

The mirrored image comes in through the embeddings (see `models.embedders`). The mean is best while all images are the
person's; the trimmed mean and the medoid hold as long as more than half of an identity's images are. Of two images
neither can be called the wrong one, so both count there (mean, trimmed) or, as rounding has it, one of them (medoid).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset_merge.unit_rows import Rows

Method = Literal["mean", "trimmed", "medoid"]

# Images with less than this share of the median cosine of their identity are left out of a trimmed mean.
_TRIM = 0.6
_TRIM_ROUNDS = 3

# Images that are worked on at once.
_CHUNK = 1 << 14


@dataclass(frozen=True)
class Centres:
    """The identities of a set, or of several sets one after another.

    `vectors`: float32 [identities, D], unit, zeros for an identity without an image; `images`: int64 [identities];
    `used`: int64 [identities], how many images the vector is made of.
    """

    vectors: Tensor
    images: Tensor
    used: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def split(self, identities: Sequence[int]) -> list["Centres"]:
        """Views of as many identities each, one after another."""
        values = (getattr(self, field.name).split(list(identities)) for field in fields(self))
        return [Centres(*parts) for parts in zip(*values, strict=True)]


def join_centres(parts: Iterable[Centres], identities: int) -> Centres:
    """The centres of all parts, `identities` in all, one after another. Of an iterator one part is held at a time."""
    joined: list[Tensor] = []
    start = 0
    for part in parts:
        values = [getattr(part, field.name) for field in fields(Centres)]
        joined = joined or [value.new_empty(identities, *value.shape[1:]) for value in values]
        for whole, value in zip(joined, values, strict=True):
            whole[start : start + len(part)] = value
        start += len(part)
        del part, values, value
    return Centres(*joined)


def identity_centres(embeddings: Rows, labels: Tensor, identities: int, method: Method = "mean") -> Centres:
    """Centres from unit embeddings float32 [images, D] and labels int64 [images], 0..identities-1, on labels' device.

    mean: normalise(mean of the unit embeddings). medoid: the image with the highest mean cosine to the identity's
    others. trimmed: from the medoid on, three times over, the normalised mean of the images whose cosine with the
    vector before is at least 0.6 of the identity's median cosine with it.

    `embeddings` may lie elsewhere (see unit_rows.py) and go to the device in chunks. Memory there: 4 x D bytes an
    identity (medoid, trimmed: three times as much), and 30 bytes an image. Raises ValueError for labels
    that do not fit and another method.
    """
    if method not in get_args(Method):
        raise ValueError(f"merge.centre: must be one of {', '.join(get_args(Method))}, got {method!r}")
    if len(embeddings) != len(labels):
        raise ValueError(f"{len(embeddings)} embeddings, but {len(labels)} labels")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < identities:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())} for {identities} identities")
    images = torch.bincount(labels, minlength=identities)
    used = images
    vectors = sums(embeddings, labels, identities)
    if method != "mean":
        # The sum of an image's cosines with the others of its identity is x . (sum - x), and x . x = 1.
        best = _first_best(cosines_with(embeddings, labels, vectors), labels, identities)
        some = best >= 0
        vectors[some] = embeddings[best[some].to(embeddings.device)].to(vectors)
        used = images.clamp(max=1) if method == "medoid" else images
    if method == "trimmed":
        for _ in range(_TRIM_ROUNDS):
            cosines = cosines_with(embeddings, labels, F.normalize(vectors))
            keep = (cosines >= _TRIM * _medians(cosines, labels, images)[labels]) | (images[labels] <= 2)
            vectors = sums(embeddings, labels, identities, keep)
            used = torch.bincount(labels[keep], minlength=identities)
    return Centres(F.normalize(vectors, out=vectors), images, used)


def _chunks(embeddings: Rows, labels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(labels), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield part, embeddings[part].to(labels.device, torch.float32)


def sums(embeddings: Rows, labels: Tensor, identities: int, keep: Tensor | None = None) -> Tensor:
    """The sum of the embeddings of each identity, float32 [identities, D]; `keep`: bool [images], those that count."""
    total = torch.zeros(identities, embeddings.shape[1], device=labels.device)
    for part, rows in _chunks(embeddings, labels):
        own = labels[part]
        if keep is not None:
            rows, own = rows[keep[part]], own[keep[part]]
        if total.is_cuda:  # sorts them; index_add_ adds in any order there, and centres would differ from run to run
            total.index_put_((own,), rows, accumulate=True)
        else:
            total.index_add_(0, own, rows)
    return total


def cosines_with(embeddings: Rows, labels: Tensor, vectors: Tensor) -> Tensor:
    """The product of each image with the vector of its identity, float32 [images]: the cosine where that is unit."""
    cosines = torch.empty(len(labels), device=labels.device)
    for part, rows in _chunks(embeddings, labels):
        cosines[part] = torch.einsum("nd,nd->n", rows, vectors[labels[part]])
    return cosines


def _by_identity(values: Tensor, labels: Tensor, descending: bool) -> Tensor:
    """The images' positions, identity after identity, those of each by value; equal ones in their order."""
    order = values.sort(stable=True, descending=descending).indices
    return order[labels[order].sort(stable=True).indices]


def _first_best(values: Tensor, labels: Tensor, identities: int) -> Tensor:
    """The position of each identity's image with the highest value, -1 for an identity without images."""
    order = _by_identity(values, labels, descending=True)
    images = torch.bincount(labels, minlength=identities)
    starts = images.cumsum(0) - images
    best = torch.full((identities,), -1, dtype=torch.int64, device=labels.device)
    filled = images > 0
    best[filled] = order[starts[filled]]
    return best


def _medians(values: Tensor, labels: Tensor, images: Tensor) -> Tensor:
    """The (lower) median of the values of each identity's images; 0 for an identity without images."""
    order = _by_identity(values, labels, descending=False)
    starts = images.cumsum(0) - images
    medians = torch.zeros(len(images), device=values.device)
    filled = images > 0
    medians[filled] = values[order[(starts + (images - 1).clamp(min=0) // 2)[filled]]]
    return medians
