"""Pairs to verify on, as one thing, whether they are a `.bin` or a list beside a folder of images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.face_sets import EncodedImages
from data.pair_lists import PairFiles, PairsError, read_pairs
from data.verification_bin import PairImages, read_bin


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs of images.

    images: the distinct ones. index: int64 [P, 2] into them. same: bool [P].
    people: int64 [images], who is on each, numbered; None where the set does not say.
    """

    images: EncodedImages
    index: NDArray[np.int64]
    same: NDArray[np.bool_]
    people: NDArray[np.int64] | None


def open_pair_set(path: Path | str, images: Path | str | None = None) -> PairSet:
    """Open a `.bin`, or a list of pairs (LFW's `pairs.txt`, or a CSV `path1,path2,same`) of images in a folder.

    In a folder of images everyone's images are taken to lie in a folder of their own, as `pairs.txt` has it; where a
    list says otherwise, people are None.

    Raises VerificationFileError for a damaged `.bin`, and PairsError, with the line, for a list that is not as it
    should be or names an image that is not there.
    """
    path = Path(path)
    if path.suffix == ".bin":
        pairs = read_bin(path)
        return PairSet(PairImages(pairs), pairs.index, pairs.same, None)
    if images is None:
        raise PairsError(f"{path}: a list of pairs needs the folder of its images")
    listed = read_pairs(path, images)
    for pair in listed:
        for file in pair.files:
            if not file.is_file():
                raise PairsError(f"{path}, line {pair.line}: {file} does not exist")
    files = PairFiles(listed, path)
    same = np.array([pair.same for pair in listed], bool)
    folders = [pair.files[side].parent for pair in listed for side in (0, 1)]
    number = {folder: position for position, folder in enumerate(dict.fromkeys(folders))}
    people = np.zeros(len(files), np.int64)
    people[files.index.reshape(-1)] = [number[folder] for folder in folders]
    agrees = np.array_equal(people[files.index[:, 0]] == people[files.index[:, 1]], same)
    return PairSet(files, files.index, same, people if agrees else None)
