"""Images that are no files: a pipe would be waited for, a device read for ever."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.face_sets import FolderFaceSet
from data.identity_choice import choose_identities
from data.pair_lists import read_pairs
from data.tolerant_records import open_records
from data.verification_bin import VerificationFileError, read_bin
from models.weights.reading import model_file
from tiny_faces import tiny_face
from utils.checkpoints import CheckpointError
from utils.evaluation.columns import read_columns
from utils.regular_files import read_regular_file
from utils.text_files import open_text


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("named", [True, False])
def test_a_list_that_comes_out_of_a_pipe_is_read_whole(tmp_path: Path, named: bool, encoding: str) -> None:
    """A shell's `<(cat pairs.txt)` was opened twice, once for its first two bytes, and lost its first 8,192. Wherever
    the writer stops for a while, within the mark at the beginning too."""
    text = "".join(f"name {number} 7\r\n" for number in range(40_000))
    content, reading = text.encode(encoding), None
    if named:
        os.mkfifo(path := tmp_path / "p.txt")
        writing = os.open(path, os.O_RDWR)  # which does not wait for who reads
    else:
        reading, writing = os.pipe()
        path = Path(f"/dev/fd/{reading}")

    def write() -> None:
        with open(writing, "wb", buffering=0) as file:  # noqa: PTH123
            for part in (content[:1], content[1:70_000], content[70_000:]):
                while part:
                    part = part[file.write(part) :]
                time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    with open_text(path) as file:
        assert file.read() == text
        file.seek(0)  # whoever looks at the first line to tell what it is
        assert file.readline() == "name 0 7\r\n"
    writer.join()
    if reading is not None:
        os.close(reading)


READERS: dict[str, Callable[[Path], object]] = {
    "list of pairs": lambda path: read_pairs(path, path.parent),
    "columns": read_columns,
    "list of identities": lambda path: choose_identities(FolderFaceSet(path.parent / "set"), [f"@{path}"], 1),
    "verification set": read_bin,
    "model": model_file,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_files_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reader: str) -> None:
    """One that would be waited for, or read, without an end is refused by its name instead."""
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "1.jpg").touch()
    path = tmp_path / "p.pth"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(tmp_path)
        socket.socket(socket.AF_UNIX).bind("p.pth")
    with pytest.raises((OSError, CheckpointError), match=r"p\.pth"):
        READERS[reader](path)


def test_a_folder_beside_a_set_that_is_called_like_a_verification_set(tmp_path: Path) -> None:
    """Is named with what to do about it."""
    (tmp_path / "v.bin").mkdir()
    with pytest.raises(VerificationFileError, match=r"v\.bin is a folder, and no verification set.*: move it away"):
        read_bin(tmp_path / "v.bin")
