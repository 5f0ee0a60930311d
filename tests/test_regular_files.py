"""Images that are no files: a pipe would be waited for, a device read for ever."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.face_sets import FolderFaceSet
from data.tolerant_records import open_records
from tiny_faces import tiny_face
from utils.regular_files import read_regular_file


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """Fail after 20 seconds where reading would hang."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    """Whole, however long, an empty one too."""
    for content in (b"", b"face", os.urandom(3_000_000)):
        (tmp_path / "a").write_bytes(content)
        assert read_regular_file(tmp_path / "a") == content
    (tmp_path / "b").symlink_to("a")
    assert read_regular_file(tmp_path / "b") == content


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "nothing"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """By its name, and without leaving it open."""
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        socket.socket(socket.AF_UNIX).bind("a.jpg")
    elif kind == "folder":
        path.mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match=r"a\.jpg") as refused:
        read_regular_file(path)
    if kind in ("pipe", "device"):
        assert refused.value.strerror == "not a file, but a pipe or a device"
    del refused
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_pipe_among_the_images_of_a_set(tmp_path: Path) -> None:
    """Is an image that cannot be read, with its name, as any other."""
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.jpg").write_bytes(tiny_face(0, 0))
    os.mkfifo(tmp_path / "set" / "b" / "2.jpg")
    faces = FolderFaceSet(tmp_path / "set")
    assert faces.encoded(1) == tiny_face(0, 0)
    with pytest.raises(OSError, match=r"not a file, but a pipe or a device: '.*set/b/2\.jpg'"):
        faces.encoded(2)
    records, _ = open_records(tmp_path / "set")
    assert records.heads(0, 3).broken.tolist() == [False, False, True]
