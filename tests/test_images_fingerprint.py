"""Images have the same digest exactly when they are the same images."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import images_fingerprint as module
from data.face_set_writer import write_face_set
from data.face_sets import FaceSet, FaceSetError, FolderFaceSet, open_face_set
from data.images_fingerprint import images_fingerprint
from data.joined_sets import FrequentIdentities, JoinedFaceSet
from data.set_sources import ListedFaceSet
from data.verification_bin import PairImages, VerificationPairs
from tiny_faces import tiny_face


def rec_set(folder: Path, people: range = range(3)) -> FaceSet:
    """Two images of each of `people`."""
    with write_face_set(folder, 32) as out:
        for identity in people:
            out.add_identity(tiny_face(identity, shot) for shot in range(2))
    return open_face_set(folder)


def folder_set(folder: Path, people: range = range(3)) -> FaceSet:
    """The same as a tree of files."""
    for identity in people:
        (folder / str(identity)).mkdir(parents=True)
        for shot in range(2):
            (folder / str(identity) / f"{shot}.png").write_bytes(tiny_face(identity, shot))
    return FolderFaceSet(folder)


MAKERS = [rec_set, folder_set]


@pytest.mark.parametrize("make", MAKERS)
def test_small_sets_are_known_by_their_bytes(tmp_path: Path, make: Callable[..., FaceSet]) -> None:
    """A copy is the same set; one that has another image in it, or its images in another order, is not."""
    first = images_fingerprint(make(tmp_path / "a"))
    assert images_fingerprint(make(tmp_path / "b")) == first
    assert images_fingerprint(make(tmp_path / "c", range(1, 4))) != first
    assert images_fingerprint(make(tmp_path / "d", range(2))) != first


def test_how_small_images_are_stored_does_not_matter(tmp_path: Path) -> None:
    """Records, files and the pairs of a .bin with the same images in the same order have the same features."""
    rec, files = rec_set(tmp_path / "a"), folder_set(tmp_path / "b")
    images = [rec.encoded(i) for i in range(len(rec))]
    pairs = PairImages(VerificationPairs("v", images, np.zeros((3, 2), np.int64), np.ones(3, bool)))
    assert images_fingerprint(rec) == images_fingerprint(files) == images_fingerprint(pairs)


@pytest.mark.parametrize("make", MAKERS)
def test_large_sets_are_known_by_their_files(
    tmp_path: Path, make: Callable[..., FaceSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size, time and a sample of the bytes of the files: any of them that changes is another set."""
    monkeypatch.setattr(module, "EXACT_BYTES", 0)
    faces = make(tmp_path / "a")
    first = images_fingerprint(faces)
    assert images_fingerprint(faces) == first
    file = next(path for path in sorted((tmp_path / "a").rglob("*")) if path.suffix in (".rec", ".png"))
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    os.utime(file, ns=(times[0], times[1] + 1))
    assert images_fingerprint(faces) != first
    os.utime(file, ns=times)
    assert images_fingerprint(faces) == first
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=times)  # who changes a file and puts its time back is found out where the sample looks
    assert images_fingerprint(faces) != first


def test_a_renamed_file_of_a_large_tree_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names decide the order of the images."""
    monkeypatch.setattr(module, "EXACT_BYTES", 0)
    first = images_fingerprint(folder_set(tmp_path / "a"))
    (tmp_path / "a" / "0" / "0.png").rename(tmp_path / "a" / "0" / "2.png")
    assert images_fingerprint(FolderFaceSet(tmp_path / "a")) != first


@pytest.mark.parametrize("exact", [0, 1 << 30])
def test_lists_are_known_by_the_files_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: int) -> None:
    """A list of a tree's files is the set of these files; another choice, order or file is another one, and a large
    list is not read through."""
    monkeypatch.setattr(module, "EXACT_BYTES", exact)
    monkeypatch.setattr(module, "SAMPLE", 2)
    tree = folder_set(tmp_path / "a")

    def listed(*names: str) -> ListedFaceSet:
        lines = "".join(f"{name},{name[0]}\n" for name in names)
        (tmp_path / "list.csv").write_text("path,label\n" + lines)
        return ListedFaceSet(tmp_path / "list.csv", tmp_path / "a")

    names = [tree.relative_file(i) for i in range(len(tree))]  # type: ignore[attr-defined]
    first = images_fingerprint(listed(*names))
    assert first == images_fingerprint(tree)
    assert images_fingerprint(listed(*names[:-1])) != first
    assert images_fingerprint(listed(names[1], names[0], *names[2:])) != first
    reads: list[int] = []
    faces = listed(*names)
    read = faces.encoded
    monkeypatch.setattr(faces, "encoded", lambda i: reads.append(i) or read(i))
    images_fingerprint(faces)
    assert len(reads) == (2 if exact == 0 else len(names))
    (tmp_path / "a" / names[2]).unlink()
    with pytest.raises(FaceSetError, match=r"list\.csv.*No such file"):
        images_fingerprint(faces)


@pytest.mark.parametrize("exact", [0, 1 << 30])
def test_sets_made_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: int) -> None:
    """Joined sets know their parts and their order; a choice of identities knows which images it has."""
    monkeypatch.setattr(module, "EXACT_BYTES", exact)
    a, b = rec_set(tmp_path / "a"), folder_set(tmp_path / "b", range(5, 7))
    assert images_fingerprint(JoinedFaceSet([a, b])) != images_fingerprint(JoinedFaceSet([b, a]))
    assert images_fingerprint(JoinedFaceSet([a, b])) == images_fingerprint(JoinedFaceSet([a, b]))
    with write_face_set(tmp_path / "c", 32) as out:
        out.add_identity([tiny_face(0, 0)])
        out.add_identity([tiny_face(1, 0), tiny_face(1, 1)])
        out.add_identity([tiny_face(2, 0), tiny_face(2, 1), tiny_face(2, 2)])
    faces = open_face_set(tmp_path / "c")
    digests = [images_fingerprint(FrequentIdentities(faces, least)) for least in (1, 2, 3)]
    assert len({*digests, images_fingerprint(a)}) == 4
    assert images_fingerprint(FrequentIdentities(faces, 2)) == digests[1]
