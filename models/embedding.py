"""Embeddings of whole sets, and the accuracy on verification sets that follows from them."""

import numpy as np

from data.face_sets import EncodedImages, PairImages
from data.images import ImageError
from data.loading import DecodedFaces, sequential_loader
from data.verification_bin import VerificationPairs
from models.embedder import Embedder
from utils.progress import progress_bar
from utils.verification import FOLDS, FoldResult, ten_fold


def embed_images(
    embedder: Embedder, images: EncodedImages, batch_size: int, workers: int, mirror: bool, title: str
) -> np.ndarray:
    """Unit embeddings float32 [images, D], in order, with a progress bar called `title`.

    Memory: 4 bytes x D an image, and the decoded batches in flight.
    """
    faces = DecodedFaces(images, np.zeros(len(images), np.int64), embedder.image_size, tolerant=True)
    loader = sequential_loader(faces, batch_size, workers, embedder.device)
    embeddings: np.ndarray | None = None
    start = 0
    with progress_bar(len(images), "image", title, leave=False) as bar:
        for batch, _, broken in loader:
            if broken:  # raised here and not in a worker, where its message would drown in tracebacks
                raise ImageError(broken[0])
            part = embedder.embed(batch, mirror).cpu().numpy()
            if embeddings is None:
                embeddings = np.empty((len(images), part.shape[1]), np.float32)
            embeddings[start : start + len(part)] = part
            start += len(part)
            bar.update(len(part))
    assert embeddings is not None
    return embeddings


def verify(embedder: Embedder, pairs: VerificationPairs, batch_size: int, workers: int, mirror: bool) -> FoldResult:
    """The 10-fold protocol on a verification set; every distinct image is embedded once."""
    embeddings = embed_images(embedder, PairImages(pairs), batch_size, workers, mirror, pairs.name)
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
