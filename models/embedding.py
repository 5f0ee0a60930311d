"""Embeddings of whole sets."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.face_sets import EncodedImages
from data.images import ImageError
from data.images_fingerprint import images_fingerprint
from data.loading import DecodedFaces, sequential_loader
from models.embedders import Embedder
from models.feature_cache import features_key, kept_bytes, kept_features
from utils.progress import progress_bar
from utils.ranks import Ranks, share_of

_ROWS_AT_ONCE = 1 << 16


def embed_images(
    embedder: Embedder,
    images: EncodedImages,
    batch_size: int,
    workers: int,
    mirror: bool,
    title: str,
    ranks: Ranks | None = None,
    cache: Path | None = None,
    normalised: bool = True,
    poll: Callable[[], None] | None = None,
) -> np.ndarray:
    """Embeddings float32 [images, D], in order, with a progress bar called `title`: unit vectors, or, not `normalised`,
    of the lengths that the model gives.

    Several `ranks` share the work, and all get the result. Memory: 4 bytes x D an image, and the decoded batches in
    flight. With `cache`, a folder, features are kept there for the next call with this model and these images, and a
    call that was killed is gone on with (models/feature_cache.py); not `normalised`, large ones are mapped into memory.
    `poll`, without `cache`, is called before every batch, equally often on all ranks; what it raises ends the work.
    Raises ImageError, naming the image, for one that is broken.
    """
    ranks = ranks or Ranks()
    if not len(images):
        raise ValueError(f"{title}: there are no images to embed")

    def embed(positions: Sequence[int] | np.ndarray) -> Generator[np.ndarray, None, None]:
        """The features of the images at `positions`, batch after batch, float32 [B, D]."""
        faces = DecodedFaces(images, np.zeros(len(images), np.int64), embedder.image_size, tolerant=True)
        loader = sequential_loader(faces, batch_size, workers, embedder.device, positions)
        with progress_bar(len(positions), "image", title, leave=False, disable=not ranks.first) as bar:
            for batch, _, broken in loader:
                if broken:  # raised here and not in a worker, where its message would drown in tracebacks
                    raise ImageError(broken[0])
                features = embedder.features(batch, mirror).cpu().numpy()
                bar.update(len(batch))  # before the last batch is given out, after which nobody may come back
                yield features

    if cache is not None:
        key = _key(embedder, images, mirror) if ranks.first else ""
        features = kept_features(cache, ranks.agree(key), len(images), embed, ranks)
    else:
        features = _embed_share(embed, len(images), batch_size, embedder.device, ranks, poll)
    return _unit(features) if normalised else features


def features_to_make(embedder: Embedder, images: EncodedImages, mirror: bool, cache: Path) -> int:
    """Bytes that `embed_images` with this `cache` will write there."""
    kept = kept_bytes(cache, _key(embedder, images, mirror))
    if kept is None:
        return 0
    face = torch.zeros(1, embedder.image_size, embedder.image_size, 3, dtype=torch.uint8, device=embedder.device)
    return max(0, 4 * embedder.features(face, mirror).shape[1] * len(images) - kept)


def _key(embedder: Embedder, images: EncodedImages, mirror: bool) -> str:
    """The key of the features in a cache."""
    return features_key(embedder.fingerprint, images_fingerprint(images), len(images), mirror)


def _embed_share(
    embed: Callable[[Sequence[int]], Generator[np.ndarray, None, None]],
    count: int,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
    poll: Callable[[], None] | None,
) -> np.ndarray:
    """The features of all `count` images, of which this rank embeds its share."""
    share = share_of(count, ranks.rank, ranks.size)
    # A rank without a share embeds an image all the same, to know how long embeddings are.
    positions = share or range(1)
    features: np.ndarray | None = None
    start = 0
    largest_share = -(-count // ranks.size)
    with closing(embed(positions)) as parts:
        for _ in range(0, largest_share, batch_size):
            if poll is not None:
                poll()
            part = next(parts, None)
            if part is None:  # a rank may have one batch less than another
                break
            if features is None:
                features = np.empty((len(positions), part.shape[1]), np.float32)
            features[start : start + len(part)] = part
            start += len(part)
    assert features is not None
    if ranks.size == 1:
        return features
    return ranks.join(torch.from_numpy(features[: len(share)]).to(device), count).cpu().numpy()


def _unit(features: np.ndarray) -> np.ndarray:
    """The rows of `features` at length 1; in place, unless `features` is a mapped file."""
    unit = features if not isinstance(features, np.memmap) else np.empty(features.shape, np.float32)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        unit[rows] = F.normalize(torch.from_numpy(features[rows])).numpy()
    return unit
