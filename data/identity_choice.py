"""Which identities of a face set are asked for: what packing and unpacking have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from data.face_sets import FaceSet, FaceSetError, RecFaceSet, identity_order, images_by_identity
from utils.text_files import open_text


class Identity(NamedTuple):
    """A person of the new set: the name in the source, and the positions of the images there, int64 [images].

    Images of records are in the order of their keys, others in that of the source.
    """

    name: str
    images: np.ndarray


def choose_identities(faces: FaceSet, names: Sequence[str], min_images: int) -> list[Identity]:
    """The identities of `faces` called `names` that have `min_images` images or more, in the order of their labels.

    `@FILE` among the names stands for the lines of a text file; no names are all of them. Letters with accents may be
    written as one character or as two, as a Mac does. Raises FaceSetError when no identity is left, when one that is
    asked for by name does not exist, or when a file names none.
    """
    wanted = _expand(names, faces.identities)
    if spelled_otherwise := wanted.difference(faces.identities):
        composed = {normalize("NFC", name): name for name in spelled_otherwise}
        same = {name: key for name in faces.identities if (key := normalize("NFC", name)) in composed}
        unknown = set(composed).difference(same.values())
        if unknown:
            raise FaceSetError(f"{faces.path} has no identity {composed[min(unknown)]!r} ({len(unknown)} such names)")
        wanted = wanted - spelled_otherwise | set(same)
    # Those of records in the order that their folders have them in.
    images = images_by_identity(faces, faces.keys if isinstance(faces, RecFaceSet) else None)
    identities = [
        Identity(faces.identities[label], images[label])
        for label in identity_order(faces.identities)
        if len(images[label]) >= min_images and (not wanted or faces.identities[label] in wanted)
    ]
    if not identities:
        raise FaceSetError(f"{faces.path}: no identity with {min_images} images or more is asked for")
    return identities


def _expand(items: Sequence[str], known: Sequence[str]) -> set[str]:
    """The names that are meant; blanks at the ends of a line belong to it where a name of `known` has them.

    Raises FaceSetError for a file without any.
    """
    names: set[str] = set()
    for item in items:
        if item.startswith("@"):
            exact = frozenset(known)
            with open_text(Path(item[1:])) as file:
                lines = [line for line in (line.rstrip("\r\n") for line in file) if line.strip()]
            if not lines:  # of no names at all, all identities would be taken
                raise FaceSetError(f"{item[1:]} names no identity: one a line is expected")
            names.update(line if line in exact else line.strip() for line in lines)
        else:
            names.add(item)
    return names
