"""A digest that tells whether images are the same as before, for what is kept of them: embeddings.

The rule: images of `EXACT_BYTES` or less altogether are read through, so the digest is of their very bytes. Of larger
sets it is of the sizes and times of the files and of where in them each image lies, and of the bytes of `SAMPLE`
images, the first and the last among them. So a copy of a large set whose times are new counts as another one, and only
a change that keeps sizes, times and the sample would go unseen. Names of people and labels are no part of it:
embeddings do not depend on them.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from data.recordio import RecordError

EXACT_BYTES = 64 << 20
SAMPLE = 64
VERSION = 1


class Images(Protocol):
    """Encoded images by position, as in data/face_sets.py."""

    def __len__(self) -> int: ...

    def encoded(self, i: int) -> bytes: ...


@runtime_checkable
class KnownByFingerprint(Protocol):
    """Images that know a quicker way to tell what they are than to be read through."""

    def fingerprint(self) -> str:
        """A digest of all that decides the bytes of the images and their order."""


def images_fingerprint(images: Images) -> str:
    """The digest of `images`, as hex: their own, or, of those that have none, that of their bytes."""
    return (
        images.fingerprint() if isinstance(images, KnownByFingerprint) else content_digest(images, range(len(images)))
    )


def content_digest(images: Images, positions: Iterable[int], tolerant: bool = False) -> str:
    """Of how many images there are, and of the bytes of those at `positions`; `tolerant`: unreadable ones have none."""
    total = hashlib.sha256(f"{VERSION} {len(images)}".encode())
    for i in positions:
        try:
            encoded = images.encoded(i)
        except (RecordError, OSError):
            if not tolerant:
                raise
            encoded = b""
        total.update(len(encoded).to_bytes(8, "little"))
        total.update(encoded)
    return total.hexdigest()


def files_digest(images: Images, files: Iterable[Path], *layout: Any) -> str:
    """The digest of images in `files` by the rule above; `layout`, arrays or what JSON holds: where in them each is."""
    facts = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if sum(size for size, _ in facts) <= EXACT_BYTES:
        return content_digest(images, range(len(images)))
    return joined_digest(sample_digest(images), facts, *layout)


def sample_digest(images: Images, tolerant: bool = False) -> str:
    """Of how many images there are, and of the bytes of `SAMPLE` of them: the same for copies on several machines.

    `tolerant`: as in content_digest.
    """
    return content_digest(images, sample_positions(len(images)), tolerant)


def sample_positions(images: int) -> list[int]:
    """`SAMPLE` positions spread over so many images, the first and the last among them; all where there are fewer."""
    return np.unique(np.linspace(0, images - 1, SAMPLE).astype(np.int64)).tolist()


def joined_digest(*parts: Any) -> str:
    """Of arrays, and of what JSON holds, in this order."""
    total = hashlib.sha256(f"{VERSION}".encode())
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype} {part.shape}".encode())
            total.update(cast(Any, np.ascontiguousarray(part)))
        else:
            text = json.dumps(part).encode()
            total.update(f"{len(text)} ".encode() + text)
    return total.hexdigest()
