"""Packing goes on where it was killed: the same bytes as without a break, or an error that says why not."""

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import onnxruntime
import pytest

from config import PackConfig
from data import fitting, resumable_set
from data.detect import Detection
from data.face_set_writer import write_face_set
from data.face_sets import FaceSetError, open_face_set
from data.fitting import Fit
from data.identity_choice import Identity
from data.images import ImageError, encode_jpeg, encode_png
from data.pack_set import Packed, main, pack, select
from data.resumable_set import made_from
from data.set_sources import open_source
from packed_photos import FIT, SIZE, SKIP, content, pack_all, photos, spoil
from tiny_faces import tiny_face
from utils.files import BusyError, atomic_folder
from utils.resumable import JournalError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four people of four images."""
    return photos(tmp_path / "faces", 4, 4)


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is saved at once, and read by itself; the disk is not waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(resumable_set, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(fitting, "IMAGES_PER_BLOCK", 1)


@pytest.fixture
def interrupted(tmp_path: Path, folder: Path, saves: None) -> Path:
    """Where a set of `folder` was to come, whose packing an image stopped that was bad and is good again."""
    bad = folder / "02" / "2.png"
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"02/2\.png"):
        pack_all(folder, tmp_path / "set", Fit(SIZE, "refuse", 90))
    bad.write_bytes(good)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.partial", "faces"]
    return tmp_path / "set"


def test_going_on_after_an_error(tmp_path: Path, folder: Path, interrupted: Path) -> None:
    """What was packed before a bad image is kept; once that is mended, the rest is added, and the sum says so.

    Bytes beyond the journal, and files that it does not know, do not count, whatever they hold.
    """
    partial = tmp_path / ".set.partial" / "set"
    for name in ("train.rec", "train.idx", "packed.csv"):
        with (partial / name).open("ab") as file:
            file.write(b"torn")
    (partial / "property").write_text("torn")
    (partial / "left_out.csv").write_text("torn")
    fit = Fit(SIZE, "refuse", 90)
    assert pack_all(folder, interrupted, fit) == Packed(4, 16, 0, taken_over=10)
    pack_all(folder, tmp_path / "whole", fit)
    assert content(interrupted) == content(tmp_path / "whole")


def another_quality(folder: Path) -> tuple[Fit, PackConfig]:
    return Fit(SIZE, "refuse", 95), PackConfig()


def another_choice(folder: Path) -> tuple[Fit, PackConfig]:
    return Fit(SIZE, "refuse", 90), PackConfig(limit=3)


def another_image(folder: Path) -> tuple[Fit, PackConfig]:
    (folder / "00" / "1.png").write_bytes(tiny_face(9, 9))
    return Fit(SIZE, "refuse", 90), PackConfig()


def another_name(folder: Path) -> tuple[Fit, PackConfig]:
    (folder / "00" / "1.png").rename(folder / "00" / "11.png")
    return Fit(SIZE, "refuse", 90), PackConfig()


def one_more_image(folder: Path) -> tuple[Fit, PackConfig]:
    (folder / "03" / "9.png").write_bytes(tiny_face(3, 9))
    return Fit(SIZE, "refuse", 90), PackConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_quality, r"\.set\.partial was begun with another quality \(90, now 95\): go on with the .* --restart"),
        (another_choice, r"begun with another choice of images \("),
        (
            another_image,
            "begun with other files: one of the first 10 images was changed since: go on with",
        ),
        (another_name, "begun with other files: one of the first 10 images was changed"),
        (one_more_image, r"begun with another choice of images \("),
    ],
)
def test_another_set_is_never_mixed_in(
    tmp_path: Path, folder: Path, interrupted: Path, change: Any, message: str
) -> None:
    """Other settings and changed sources are told apart, and change nothing; `restart` discards and begins anew."""
    before = content(tmp_path / ".set.partial")
    fit, pick = change(folder)
    with pytest.raises(JournalError, match=message):
        pack_all(folder, interrupted, fit, pick=pick)
    assert content(tmp_path / ".set.partial") == before
    assert pack_all(folder, interrupted, fit, restart=True, pick=pick).taken_over == 0
    pack_all(folder, tmp_path / "whole", fit, pick=pick)
    assert content(interrupted) == content(tmp_path / "whole")
    assert not (tmp_path / ".set.partial").exists()


def interrupt(*arguments: object) -> int:
    raise KeyboardInterrupt


def test_bad_images_are_skipped_from_an_interruption_on(
    tmp_path: Path, folder: Path, saves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packing that a bad image stopped goes on without such images: nothing is packed twice. Not the other way
    round, as what was left out would stay so."""
    spoil(folder)
    with pytest.raises(ImageError, match=r"01/2\.png has 24x20 .*; --bad-images skip goes on without such images"):
        pack_all(folder, tmp_path / "set")
    assert pack_all(folder, tmp_path / "set", SKIP).taken_over == 6
    pack_all(folder, tmp_path / "whole", SKIP)
    assert content(tmp_path / "set") == content(tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(resumable_set.ResumableSet, "finish", interrupt)
        pack_all(folder, tmp_path / "other", SKIP)
    with pytest.raises(JournalError, match=r"another bad_images \('skip', now 'refuse'\)"):
        pack_all(folder, tmp_path / "other")


@pytest.mark.parametrize("kind", ["folders", "list"])
def test_files_that_cannot_be_read(
    tmp_path: Path, folder: Path, saves: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A link that leads around in a circle, a pipe: bad images like others, which stop a packing with their names, or
    are left out, in one that was interrupted as well. What is missing stops it, as a disk may have come loose."""
    loop, pipe = folder / "01" / "1.png", folder / "02" / "1.png"
    loop.unlink()
    loop.symlink_to("1.png")
    pipe.unlink()
    os.mkfifo(pipe)
    source = folder
    if kind == "list":
        source = tmp_path / "list.csv"
        files = sorted(f"faces/{one.name}/{shot}.png" for one in folder.iterdir() for shot in range(4))
        source.write_text("path,label\n" + "".join(f"{file},{file[6:8]}\n" for file in files))
    with pytest.raises(ImageError, match=r"01/1\.png: Too many levels of symbolic links; --bad-images skip goes on"):
        pack_all(source, tmp_path / "set")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(resumable_set.ResumableSet, "finish", interrupt)
        pack_all(source, tmp_path / "set", SKIP)
    packed = pack_all(source, tmp_path / "set", SKIP)
    assert (packed.images, packed.left_out_images, packed.taken_over) == (14, 2, 14)
    with (tmp_path / "set" / "left_out.csv").open(newline="") as table:
        left_out = [(row["image"][-8:], row["reason"]) for row in csv.DictReader(table)]
    assert left_out == [
        ("01/1.png", "Too many levels of symbolic links"),
        ("02/1.png", "not a file, but a pipe or a device"),
    ]
    (folder / "03" / "1.png").rename(tmp_path / "away.png")
    (folder / "03" / "1.png").symlink_to("nowhere.png")
    with pytest.raises((FileNotFoundError, FaceSetError), match="No such file"):
        pack_all(source, tmp_path / "other", SKIP)


def test_a_changed_rec(tmp_path: Path, folder: Path, saves: None) -> None:
    """A source of records is known by the size and time of its `.rec` and `.idx`."""
    (folder / "03" / "0.png").write_bytes(b"no image")
    with write_face_set(tmp_path / "source", SIZE) as out:
        for person in range(4):
            out.add_identity((folder / f"{person:02}" / f"{shot}.png").read_bytes() for shot in range(4))
    with pytest.raises(ImageError, match="record 13 at"):
        pack_all(tmp_path / "source", tmp_path / "set")
    with pytest.raises(ImageError, match="record 13 at"):
        pack_all(tmp_path / "source", tmp_path / "set")
    for name in ("train.rec", "train.idx"):
        status = (tmp_path / "source" / name).stat()
        os.utime(tmp_path / "source" / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        with pytest.raises(JournalError, match="another size and time of the source"):
            pack_all(tmp_path / "source", tmp_path / "set")
        os.utime(tmp_path / "source" / name, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_image_that_is_gone(tmp_path: Path, folder: Path, saves: None) -> None:
    """A file of a list that was packed and is not there any more is named."""
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"faces/00/{shot}.png,a\n" for shot in range(4)))
    (folder / "00" / "3.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"00/3\.png"):
        pack_all(tmp_path / "list.csv", tmp_path / "set")
    (folder / "00" / "0.png").unlink()
    with pytest.raises(JournalError, match=r"an image that is gone, .*00/0\.png: .*--restart"):
        pack_all(tmp_path / "list.csv", tmp_path / "set")


def test_a_damaged_journal(tmp_path: Path, folder: Path, interrupted: Path) -> None:
    """Files that lack what the journal says are on the disk, and a journal that is none, are errors, not guesses."""
    partial = tmp_path / ".set.partial"
    os.truncate(partial / "set" / "train.idx", 5)
    with pytest.raises(JournalError, match=r"train\.idx has 5 bytes, \d+ were written: .*--restart"):
        pack_all(folder, interrupted, Fit(SIZE, "refuse", 90))
    (partial / ".journal.json").write_text('{"made_from":')
    with pytest.raises(JournalError, match=r"journal\.json is damaged .*--restart"):
        pack_all(folder, interrupted, Fit(SIZE, "refuse", 90))


def test_restart_on_the_command_line(
    tmp_path: Path, folder: Path, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag that the error names is the one that helps; without it the summary counts what was taken over."""
    flags = ["--source", str(folder), "--output", str(interrupted), "--image-size", str(SIZE), "--workers", "0"]
    with pytest.raises(SystemExit, match=r"^pack_set: .*another quality \(90, now 95\).*--restart$"):
        main(flags)
    main([*flags, "--quality", "90"])
    assert "16 images of 4 identities, byte for byte as in" in capsys.readouterr().out
    shutil.rmtree(interrupted)
    main([*flags, "--restart"])


def test_two_at_once(tmp_path: Path, folder: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one process packs, others with the same output are refused, also with `restart`, and change nothing."""
    fit, refused = Fit(SIZE, "refuse", 90), []
    finish = resumable_set.ResumableSet.finish

    def finish_among_others(out: resumable_set.ResumableSet, image_size: int) -> int:
        before = content(tmp_path / ".set.partial")
        for restart in (False, True):
            with pytest.raises(BusyError, match="set is being written by another process"):
                pack_all(folder, interrupted, fit, restart)
        with pytest.raises(BusyError), atomic_folder(interrupted):
            pytest.fail("two at once")
        assert content(tmp_path / ".set.partial") == before
        refused.append(True)
        return finish(out, image_size)

    monkeypatch.setattr(resumable_set.ResumableSet, "finish", finish_among_others)
    pack_all(folder, interrupted, fit)
    assert refused
    monkeypatch.undo()
    pack_all(folder, tmp_path / "whole", fit)
    assert content(interrupted) == content(tmp_path / "whole")


def test_skipped_images(tmp_path: Path, folder: Path) -> None:
    """Bad ones are counted and named with the reason, who loses all is left out, and labels have no holes."""
    spoil(folder)
    packed = pack_all(folder, tmp_path / "set", SKIP)
    assert packed == Packed(3, 11, 0, left_out_images=5, left_out_identities=1)
    faces = open_face_set(tmp_path / "set")
    assert faces.identities == ["0", "1", "2"]
    kept = [(label, shot) for label, person in enumerate((0, 1, 3)) for shot in range(4) if (person, shot) != (1, 2)]
    assert [(int(faces.labels[i]), faces.encoded(i)) for i in range(len(faces))] == [
        (label, tiny_face((0, 1, 3)[label], shot)) for label, shot in kept
    ]
    assert rows(tmp_path / "set" / "packed.csv")[1:] == [["0", "00", "4"], ["1", "01", "3"], ["2", "03", "4"]]
    left_out = rows(tmp_path / "set" / "left_out.csv")
    assert left_out[0] == ["identity", "image", "reason"]
    assert left_out[1][:2] == ["01", str(folder / "01" / "2.png")]
    assert left_out[1][2] == "has 24x20 pixels, expected 32x32", "the reason alone: advice is for the screen"
    assert left_out[3] == ["02", str(folder / "02" / "1.png"), "its 4 bytes are no image that OpenCV can decode"]
    assert left_out[6:] == [["02", "", "not one of its 4 images is left"]]
    assert (tmp_path / "set" / "property").read_text() == f"3,{SIZE},{SIZE}"


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


NOT_SQUARE = encode_png(np.zeros((20, 24, 3), np.uint8))
CUT = encode_jpeg(np.zeros((SIZE, SIZE, 3), np.uint8))[:-2]


@pytest.mark.parametrize(
    ("image", "other_sizes", "reason"),
    [
        (NOT_SQUARE, "resize", "has 24x20 pixels: resizing it to a square would distort the face"),
        (CUT, "refuse", f"its JPEG of {len(CUT)} bytes has no end: it was cut off"),
    ],
    ids=["not square", "cut"],
)
def test_reasons(
    tmp_path: Path, folder: Path, image: bytes, other_sizes: Literal["refuse", "resize"], reason: str
) -> None:
    """A JPEG without its end marker is as broken for the packer as for the report, whatever OpenCV makes of it."""
    (folder / "00" / "1.png").write_bytes(image)
    pack_all(folder, tmp_path / "set", replace(SKIP, other_sizes=other_sizes))
    assert rows(tmp_path / "set" / "left_out.csv")[1:] == [["00", str(folder / "00" / "1.png"), reason]]


@pytest.mark.parametrize(
    "change", ["OpenCV", "onnxruntime", "detector's bytes", "detector's path", "threshold", "nothing"]
)
def test_what_the_bytes_depend_on(tmp_path: Path, folder: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set is not gone on with by other programs or another detector: each has a say in the pixels."""
    detector = tmp_path / "detector.onnx"
    detector.write_bytes(b"net")
    faces = open_source(folder)
    identities = select(faces, PackConfig())
    fit = replace(FIT, detection=Detection(detector, 0.5, 640, "largest"))
    before = made_from(faces, identities, fit)
    if change == "OpenCV":
        monkeypatch.setattr(cv2, "__version__", "0.0")
    elif change == "onnxruntime":
        monkeypatch.setattr(onnxruntime, "__version__", "0.0")
    elif change == "detector's bytes":
        detector.write_bytes(b"another")
    elif change == "detector's path":
        other = shutil.copy2(detector, tmp_path / "other.onnx")
        fit = replace(FIT, detection=Detection(Path(other), 0.5, 640, "largest"))
    elif change == "threshold":
        fit = replace(FIT, detection=Detection(detector, 0.4, 640, "largest"))
    assert (made_from(faces, identities, fit) == before) == (change == "nothing")


def test_a_choice_is_of_images_and_names(folder: Path) -> None:
    """As many images of as many people, but others of them, or under other names, are another set."""
    faces, plain = open_source(folder), [Identity("00", np.array([0, 1])), Identity("01", np.array([4, 5]))]
    choices = [
        made_from(faces, identities, FIT)["choice of images"]
        for identities in (plain, [plain[0]._replace(images=np.array([0, 2])), plain[1]],
                           [plain[0]._replace(name="02"), plain[1]])
    ]  # fmt: skip
    assert len(set(choices)) == 3


def test_new_bytes_are_counted(tmp_path: Path, folder: Path) -> None:
    """Of the images those that were resized, which the last line tells: the rest are as they were."""
    large = encode_png(np.zeros((2 * SIZE, 2 * SIZE, 3), np.uint8))
    for person in (0, 3):
        (folder / f"{person:02}" / "1.png").write_bytes(large)
    assert pack_all(folder, tmp_path / "set", Fit(SIZE, "resize", 95)) == Packed(4, 16, changed=2)


def test_another_spelling_of_the_source(tmp_path: Path, folder: Path, interrupted: Path) -> None:
    """The same folder by a relative path, with `..`, or through a link, is the same; so are a list and its images."""
    bad = folder / "03" / "1.png"
    (tmp_path / "link").symlink_to(folder)
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    fit = Fit(SIZE, "refuse", 90)
    spellings = [folder / ".." / "faces", tmp_path / "link", Path(os.path.relpath(folder))]
    for spelling in spellings:
        with pytest.raises(ImageError, match=r"03/1\.png"):
            pack_all(spelling, interrupted, fit)
    bad.write_bytes(good)
    assert pack_all(folder, interrupted, fit).taken_over == 13


def test_another_spelling_of_a_list(tmp_path: Path, folder: Path, saves: None) -> None:
    """The folder that a list's paths are relative to is known however it is named; another one is told so."""
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"00/{shot}.png,a\n" for shot in range(4)))
    (folder / "00" / "3.png").write_bytes(b"no image")
    shutil.copytree(folder, tmp_path / "copy")

    def pack_list(root: Path) -> Packed:
        faces = open_source(tmp_path / "copy" / ".." / "list.csv", root)
        return pack(faces, select(faces, PackConfig()), tmp_path / "set", FIT, 0)

    for root in (folder, folder / ".." / "faces", Path(os.path.relpath(folder))):
        with pytest.raises(ImageError, match=r"00/3\.png"):
            pack_list(root)
    with pytest.raises(JournalError, match="begun with another image_root"):
        pack_list(tmp_path / "copy")
    (folder / "00" / "3.png").write_bytes(tiny_face(0, 3))
    assert pack_list(folder).taken_over == 3


def test_skipping_leaves_something(tmp_path: Path, folder: Path) -> None:
    """A source without a good image is an error that names the first, and leaves nothing; files that lack stop too."""
    (tmp_path / "list.csv").write_text("path,label\nfaces/00/0.png,a\nfaces/00/1.png,a\n")
    (folder / "00" / "0.png").write_bytes(b"no image")
    (folder / "00" / "1.png").write_bytes(b"no")
    with pytest.raises(FaceSetError, match=r"not one of 2 images can be packed; the first: .*0\.png: its 8 bytes"):
        pack_all(tmp_path / "list.csv", tmp_path / "set", SKIP)
    (folder / "00" / "0.png").unlink()
    with pytest.raises(FaceSetError, match=r"list\.csv, line 2: .*0\.png: No such file"):
        pack_all(tmp_path / "list.csv", tmp_path / "set", SKIP)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "list.csv"]
