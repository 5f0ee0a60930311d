"""Embeddings of whole sets, and the accuracy on verification sets that follows from them."""

import numpy as np

from data.face_sets import EncodedImages, PairImages
from data.loading import DecodedFaces, sequential_loader
from data.verification_bin import VerificationPairs
from models.embedder import Embedder
from utils.progress import progress_bar
from utils.verification import FoldResult, ten_fold


def embed_images(
    embedder: Embedder, images: EncodedImages, batch_size: int, workers: int, mirror: bool, title: str
) -> np.ndarray:
    """Unit embeddings float32 [images, D], in order, with a progress bar called `title`.

    Memory: 4 bytes x D an image, and the decoded batches in flight.
    """
    faces = DecodedFaces(images, np.zeros(len(images), np.int64), embedder.image_size)
    loader = sequential_loader(faces, batch_size, workers, embedder.device)
    embeddings: np.ndarray | None = None
    start = 0
    with progress_bar(len(images), "image", title, leave=False) as bar:
        for batch, _ in loader:
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
    return ten_fold(embeddings[pairs.index.reshape(-1)], pairs.same)
