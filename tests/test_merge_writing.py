"""A merged set's bytes: those of the sources whatever interrupted the writing, and known to fit before it begins."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from data.face_set_writer import write_face_set
from data.face_sets import open_face_set
from data.images import encode_png
from data.joined_sets import JoinedFaceSet
from dataset_merge import writing
from dataset_merge.disk_space import as_size, available, needed, require_space, stored_sizes
from dataset_merge.face_sizes import face_size
from dataset_merge.writing import made_from, write_images
from tiny_faces import tiny_face
from utils.resumable import JournalError, resumable_folder

PARTS = [np.array([0, 1, 5, 6]), np.array([2]), np.array([7, 3])]


@pytest.fixture
def everything(tmp_path: Path) -> JoinedFaceSet:
    """A rec set of two people and a folder of one, four and eight images."""
    with write_face_set(tmp_path / "rec", 32) as out:
        for person in range(2):
            out.add_identity(tiny_face(person, shot) for shot in range(2))
    (tmp_path / "tree" / "anna").mkdir(parents=True)
    for shot in range(4):
        (tmp_path / "tree" / "anna" / f"{shot}.png").write_bytes(tiny_face(7, shot))
    return JoinedFaceSet([open_face_set(tmp_path / "rec"), open_face_set(tmp_path / "tree")])


def write(faces: JoinedFaceSet, output: Path, restart: bool = False) -> int:
    with resumable_folder(output, made_from(faces._sets, PARTS), restart) as work:
        return write_images(work, faces, PARTS, 32)


def killed_at(image: int, faces: JoinedFaceSet, output: Path) -> None:
    """Write in a child process that is killed when it reads image number `image`."""
    child = os.fork()
    if not child:
        read, count = faces.encoded, iter(range(1000))

        def encoded(i: int) -> bytes:
            if next(count) == image:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(i)

        faces.encoded = encoded  # type: ignore[method-assign]
        write(faces, output)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_images_keep_their_bytes(everything: JoinedFaceSet, tmp_path: Path) -> None:
    """Under the labels that were decided, in that order, in a set that opens."""
    assert write(everything, tmp_path / "out") == 0
    faces = open_face_set(tmp_path / "out")
    assert [faces.encoded(i) for i in range(len(faces))] == [everything.encoded(i) for i in np.concatenate(PARTS)]
    assert faces.labels.tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert (tmp_path / "out" / "property").read_text() == "3,32,32"


def test_writing_goes_on_where_it_was_killed(
    everything: JoinedFaceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any image, gone on with, killed again: what comes out is the same to the byte."""
    monkeypatch.setattr(writing, "SECONDS_BETWEEN_SAVES", 0.0)
    write(everything, tmp_path / "whole")
    for image in range(7):
        killed_at(image, everything, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        if image >= 2:
            killed_at(0, everything, tmp_path / "out")
        assert write(everything, tmp_path / "out") == image
        for name in ("train.rec", "train.idx", "property"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        shutil.rmtree(tmp_path / "out")


def test_other_decisions_and_changed_images_are_not_gone_on_with(
    everything: JoinedFaceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set is of one merge: half of one and half of another are refused, with what differs."""
    monkeypatch.setattr(writing, "SECONDS_BETWEEN_SAVES", 0.0)
    killed_at(3, everything, tmp_path / "out")
    monkeypatch.setattr("test_merge_writing.PARTS", PARTS[::-1])
    with pytest.raises(JournalError, match="decisions"):
        write(everything, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "tree" / "anna" / "1.png").write_bytes(tiny_face(7, 9))
    with pytest.raises(JournalError, match="images of the sets"):
        write(everything, tmp_path / "out")
    assert write(everything, tmp_path / "out", restart=True) == 0


def test_the_room_that_is_told_is_what_it_takes(everything: JoinedFaceSet, tmp_path: Path) -> None:
    """Within some bytes a record, above rather than below."""
    sizes = np.concatenate([stored_sizes(faces) for faces in everything._sets])
    told = needed(sizes[np.concatenate(PARTS)], len(PARTS))
    write(everything, tmp_path / "out")
    taken = sum((tmp_path / "out" / name).stat().st_size for name in ("train.rec", "train.idx"))
    assert taken <= told <= taken + 200 * 7


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written; what an interrupted run wrote of the set counts as room."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10 << 20))  # type: ignore[attr-defined]
    output = tmp_path / "not" / "there" / "yet"
    require_space(output, 10 << 20)
    with pytest.raises(ValueError, match=r"yet needs 12\.0 MiB, but its disk has 10\.0 MiB for it: free 2\.0 MiB"):
        require_space(output, 12 << 20)
    begun = tmp_path / ".merged.partial" / "merged"
    begun.mkdir(parents=True)
    (begun / "train.rec").write_bytes(bytes(3 << 20))
    assert available(tmp_path / "merged") == 13 << 20


def test_faces_of_other_sizes_are_refused(everything: JoinedFaceSet, tmp_path: Path) -> None:
    """The property file states one size for all."""
    assert face_size(everything._sets) == 32
    with write_face_set(tmp_path / "large", 64) as out:
        out.add_identity([encode_png(np.zeros((64, 64, 3), np.uint8))])
    with pytest.raises(ValueError, match=r"large.* has faces of 64x64 pixels .*, .* of 32x32"):
        face_size([*everything._sets, open_face_set(tmp_path / "large")])
    (tmp_path / "tree" / "anna" / "3.png").write_bytes(encode_png(np.zeros((32, 40, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"40x32 pixels \(.*3\.png\).* --source .*tree --output NAME: --other-sizes"):
        face_size(everything._sets)


def test_sizes_for_people() -> None:
    """Bytes in the unit that reads best."""
    assert [as_size(n) for n in (0, 1023, 1024, 5 << 30, 3 << 50)] == [
        "0 B",
        "1,023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3,072.0 TiB",
    ]
