"""What the files of a set are called that is unpacked: so that packing the folders brings all back in the same order.

A set is packed with its identities in `identity_order` of the folders, and the images of each in the order of the
files' names. So names are kept where they are in that order and fit any file system, and are numbered where not.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from data.face_sets import FaceSet, FolderFaceSet, RecFaceSet, identity_order
from data.identity_choice import Identity
from data.set_sources import ListedFaceSet

# What Linux, macOS, Windows, or a disk made for one of the latter, does not take in a name.
FORBIDDEN = frozenset('/\\:*?"<>|') | {chr(code) for code in (*range(32), 127)}
LONGEST = 200  # bytes; file systems take 255, some of them less


class UnpackedNames:
    """The names that the images of `identities`, chosen from `faces`, get.

    Identities: numbers have six digits or more, other names and those of folders stay. Images: the record's key, the
    number of the line in a list, or the name of the file in a folder, see `image`.
    """

    def __init__(self, faces: FaceSet, identities: Sequence[Identity]) -> None:
        names = [identity.name for identity in identities]
        if not isinstance(faces, FolderFaceSet) and all(map(_is_plain_number, names)):
            folders = [name.zfill(6) for name in names]
        else:
            folders = portable_names(names, in_order=identity_order(names) == list(range(len(names))))
        #: The folder of each identity.
        self.folders = folders
        #: Whether `file` adds the extension that it gets.
        self.adds_extension = not isinstance(faces, FolderFaceSet)
        self._faces = faces
        classes = faces.labels[[identity.images[0] for identity in identities]].tolist()
        self._folder_of_class = dict(zip(classes, folders, strict=True))
        self._files = _renamed_files(faces, identities) if isinstance(faces, FolderFaceSet) else {}
        self._digits = max(9, len(str(self._numbers().max(initial=0))))

    def _numbers(self) -> np.ndarray:
        if isinstance(self._faces, RecFaceSet):
            return self._faces.keys
        return self._faces.lines if isinstance(self._faces, ListedFaceSet) else np.zeros(0, np.int64)

    def folder(self, i: int) -> str:
        """The folder of image `i`."""
        return self._folder_of_class[int(self._faces.labels[i])]

    def image(self, i: int) -> str:
        """What image `i` is called in its source: its key, its line or, in a folder, the name of its file."""
        return self._faces.file(i).name if isinstance(self._faces, FolderFaceSet) else str(self._numbers()[i])

    def file(self, i: int, extension: str) -> str:
        """The path of image `i` in the output; files from folders keep the extension that they have."""
        if isinstance(self._faces, FolderFaceSet):
            return f"{self.folder(i)}/{self._files.get(i) or self.image(i)}"
        return f"{self.folder(i)}/{self._numbers()[i]:0{self._digits}d}{extension}"


def portable_names(names: Sequence[str], in_order: bool) -> list[str]:
    """`names` as they are, if each can be the name of a file anywhere, no two differ in case alone, and they stand in
    the order that they are read in (`in_order`); otherwise all numbered, with what cannot be in a name replaced.
    """
    alike = {unicodedata.normalize("NFC", name).casefold() for name in names}
    portable = all(name == _portable(name) for name in names) and len(alike) == len(names)
    if portable and in_order:
        return list(names)
    digits = max(6, len(str(len(names))))
    return [f"{number:0{digits}d}_{_portable(name, LONGEST - digits - 1)}" for number, name in enumerate(names)]


def _portable(name: str, longest: int = LONGEST) -> str:
    """`name`, of `longest` bytes at most, without characters and endings that some file system refuses.

    It is not hidden, as hidden files are no faces.
    """
    safe = "".join("_" if character in FORBIDDEN else character for character in name)
    while len(safe.encode(errors="surrogateescape")) > longest:
        # What comes last may be the extension, by which images are known.
        safe = safe[: len(safe) // 2 - 1] + safe[len(safe) // 2 :]
    safe = "_" + safe[1:] if safe.startswith((".", " ")) else safe
    return safe[:-1] + "_" if safe.endswith((".", " ")) else safe


def _is_plain_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= LONGEST and name == (name.lstrip("0") or "0")


def _renamed_files(faces: FolderFaceSet, identities: Sequence[Identity]) -> dict[int, str]:
    """The new names of those files of a folder that cannot keep theirs, by position."""
    renamed: dict[int, str] = {}
    for identity in identities:
        positions = identity.images.tolist()
        names = [faces.file(i).name for i in positions]
        new = portable_names(names, in_order=True)  # as FolderFaceSet has them
        renamed |= {i: name for i, name, old in zip(positions, new, names, strict=True) if name != old}
    return renamed
