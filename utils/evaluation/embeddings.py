"""The embeddings of several models on one set, whose images are decoded once for all of them."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.face_sets import EncodedImages
from data.images_fingerprint import images_fingerprint
from models.embedders import Embedder
from models.embedders.interface import FaceEmbedder, digest
from models.embedding import embed_images
from models.feature_cache import features_key, kept_features
from utils.evaluation.measure import Options
from utils.ranks import Ranks

# Images of a set that is embedded by several models at once. Their features are held in memory until all are done; of a
# larger set each model's go to the cache as they are made, so that a killed test can be resumed.
MOST_AT_ONCE = 100_000


class _Together(FaceEmbedder):
    """Models that take faces of one size as one model: their features side by side, `widths` numbers each."""

    def __init__(self, embedders: Sequence[Embedder]) -> None:
        self._embedders = embedders
        self.name = ", ".join(one.name for one in embedders)
        self.runs_on = ", ".join(dict.fromkeys(one.runs_on for one in embedders))
        self.image_size, self.device = embedders[0].image_size, embedders[0].device
        self.widths: list[int] = []

    @property
    def fingerprint(self) -> str:
        """See Embedder."""
        return digest([one.fingerprint for one in self._embedders])

    def _forward(self, faces: Tensor, mirror: bool) -> Tensor:
        shown = faces.flip(2) if mirror else faces
        parts = [one.features(shown, False).to(self.device) for one in self._embedders]
        self.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)


def embed_by_all(
    embedders: Sequence[Embedder], images: EncodedImages, title: str, options: Options, ranks: Ranks
) -> list[np.ndarray]:
    """Features float32 [N, D] of each embedder, of the lengths that it gives, as `embed_images` makes them.

    Embedders whose features are not kept already and that take faces of one size see the same decoded batches, on sets
    of up to `MOST_AT_ONCE` images. Memory: 4 bytes x the numbers of all features of an image x images.
    """
    keys: list[str] = []
    if options.cache is not None and ranks.first:
        shown = images_fingerprint(images)
        keys = [features_key(one.fingerprint, shown, len(images), options.mirror) for one in embedders]
    keys = json.loads(ranks.agree(json.dumps(keys)))
    found: dict[int, np.ndarray] = {}
    for group in _groups(embedders, images, options, keys, ranks):
        together = _Together([embedders[i] for i in group])
        features = embed_images(
            together, images, options.batch_size, options.workers, options.mirror, title, ranks, normalised=False
        )
        parts = np.split(features, np.cumsum(together.widths)[:-1], axis=1)
        found |= {i: np.ascontiguousarray(part) for i, part in zip(group, parts, strict=True)}
    return [
        _kept(found[i], keys[i] if keys else "", options, ranks)
        if i in found
        else embed_images(
            one, images, options.batch_size, options.workers, options.mirror, title, ranks, options.cache, False
        )
        for i, one in enumerate(embedders)
    ]


def _groups(
    embedders: Sequence[Embedder], images: EncodedImages, options: Options, keys: Sequence[str], ranks: Ranks
) -> list[list[int]]:
    """The embedders, two or more together, that are to see the same batches; the first rank decides."""
    groups: dict[int, list[int]] = {}
    if ranks.first and len(images) <= MOST_AT_ONCE:
        for i, one in enumerate(embedders):
            if options.cache is None or not (options.cache / f"{keys[i]}.features").exists():
                groups.setdefault(one.image_size, []).append(i)
    agreed: list[list[int]] = json.loads(ranks.agree(json.dumps([one for one in groups.values() if len(one) > 1])))
    return agreed


def _kept(features: np.ndarray, key: str, options: Options, ranks: Ranks) -> np.ndarray:
    """The features, put into the cache if there is one."""
    if options.cache is None:
        return features
    return kept_features(options.cache, key, len(features), lambda positions: [features[positions]], ranks)
