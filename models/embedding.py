"""Embeddings of whole sets, and the accuracy on verification sets that follows from them."""

import numpy as np
import torch

from data.face_sets import EncodedImages, PairImages
from data.images import ImageError
from data.loading import DecodedFaces, sequential_loader
from data.verification_bin import VerificationPairs
from models.embedder import Embedder
from utils.evaluation.folds import FOLDS, FoldResult, ten_fold
from utils.progress import progress_bar
from utils.ranks import Ranks, share_of


def embed_images(
    embedder: Embedder,
    images: EncodedImages,
    batch_size: int,
    workers: int,
    mirror: bool,
    title: str,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Unit embeddings float32 [images, D], in order, with a progress bar called `title`.

    Several `ranks` share the work, and all get the result. Memory: 4 bytes x D an image, and the decoded batches in
    flight.
    """
    ranks = ranks or Ranks()
    share = share_of(len(images), ranks.rank, ranks.size)
    faces = DecodedFaces(images, np.zeros(len(images), np.int64), embedder.image_size, tolerant=True)
    # A rank without a share embeds an image all the same, to know how long embeddings are.
    loader = sequential_loader(faces, batch_size, workers, embedder.device, share or range(1))
    embeddings: np.ndarray | None = None
    start = 0
    with progress_bar(len(share), "image", title, leave=False, disable=not ranks.first) as bar:
        for batch, _, broken in loader:
            if broken:  # raised here and not in a worker, where its message would drown in tracebacks
                raise ImageError(broken[0])
            part = embedder.embed(batch, mirror).cpu().numpy()
            if embeddings is None:
                embeddings = np.empty((max(1, len(share)), part.shape[1]), np.float32)
            embeddings[start : start + len(part)] = part
            start += len(part)
            bar.update(len(part))
    assert embeddings is not None
    if ranks.size == 1:
        return embeddings
    return ranks.join(torch.from_numpy(embeddings[: len(share)]).to(embedder.device), len(images)).cpu().numpy()


def verify(
    embedder: Embedder,
    pairs: VerificationPairs,
    batch_size: int,
    workers: int,
    mirror: bool,
    ranks: Ranks | None = None,
) -> FoldResult:
    """The 10-fold protocol on a verification set; every distinct image is embedded once, by one of the `ranks`."""
    embeddings = embed_images(embedder, PairImages(pairs), batch_size, workers, mirror, pairs.name, ranks)
    try:
        return ten_fold(embeddings[pairs.index.reshape(-1)], pairs.same)
    except ValueError as error:
        raise ValueError(f"{pairs.name}: {error}") from None


def check_pairs(pairs: VerificationPairs, image_size: int) -> None:
    """Raise ValueError, naming the set, unless the protocol can be run on it: 10 pairs or more, and images that decode.

    Called before training: a set that fails should not fail after an epoch.
    """
    if len(pairs.same) < FOLDS:
        raise ValueError(f"{pairs.name}: {len(pairs.same)} pairs cannot make {FOLDS} folds")
    faces = DecodedFaces(PairImages(pairs), np.zeros(len(pairs.images), np.int64), image_size)
    for i in range(len(faces)):
        faces.__getitems__([i])
