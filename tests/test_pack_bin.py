"""pack_bin: the pairs of a list as a verification set, in order, image bytes as they are."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from data.fitting import Fit
from data.images import ImageError, decode_rgb
from data.pack_bin import PairsError, main, pack_bin, read_pairs
from data.verification_bin import read_bin
from tiny_faces import tiny_face

SCRIPT = ROOT / "data" / "pack_bin.py"
FIT = Fit(32, "refuse", 95)
NAMES = ["Ann Lee", "Bob"]
# Two folds with a pair of each kind; the images as (person, number).
LFW = "2\t1\nAnn Lee\t1\t2\nAnn Lee\t1\tBob\t12\nBob\t3\t12\nBob\t3\tAnn Lee\t2\n"
PAIRS = [((0, 1), (0, 2)), ((0, 1), (1, 12)), ((1, 3), (1, 12)), ((1, 3), (0, 2))]
CSV = "path1,path2,same\n" + "".join(
    f"{','.join(f'{NAMES[person]}/{NAMES[person]}_{number:04d}.jpg' for person, number in pair)},{same}\n"
    for pair, same in zip(PAIRS, ["1", "0", "True", "false"], strict=True)
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for person, number in ((0, 1), (0, 2), (1, 3), (1, 12)):
        folder = root / NAMES[person]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{folder.name}_{number:04d}.jpg").write_bytes(tiny_face(person, number))
    return root


def written(path: Path, text: str) -> Path:
    path.write_text(text, newline="")
    return path


@pytest.mark.parametrize(
    "text",
    [LFW, LFW.removeprefix("2\t1\n"), LFW.replace("2\t1\n", "2\n", 1).replace("\n", "\r\n"), CSV, "\ufeff" + CSV],
    ids=["LFW", "without header", "one fold, CRLF", "CSV", "CSV with byte order mark"],
)
def test_every_list_gives_the_same_set(tmp_path: Path, images: Path, text: str) -> None:
    """Images, order and flags are those of the list, with and without a header, in either format."""
    assert pack_bin(written(tmp_path / "pairs", text), images, tmp_path / "a.bin", FIT, 0) == (4, 2)
    pairs = read_bin(tmp_path / "a.bin")
    assert pairs.same.tolist() == [True, False, True, False]
    found = [pairs.images[i] for i in pairs.index.ravel()]
    assert found == [tiny_face(*image) for pair in PAIRS for image in pair]


def test_names_that_are_not_utf8(tmp_path: Path, images: Path) -> None:
    """Lists of older programs and their file names have the same bytes, whatever the encoding: they are found."""
    name = os.fsdecode(b"Andr\xe9")
    (images / name).mkdir()
    for number in (1, 2):
        (images / name / f"{name}_{number:04d}.jpg").write_bytes(tiny_face(3, number))
    for list_, text in (("a", b"Andr\xe9\t1\t2\n"), ("b", b"path1,path2,same\nX/X_0001.jpg,X/X_0002.jpg,1\n")):
        (tmp_path / list_).write_bytes(text.replace(b"X", b"Andr\xe9"))
        assert pack_bin(tmp_path / list_, images, tmp_path / f"{list_}.bin", FIT, 0) == (1, 1)


def test_lfw_is_rebuilt(tmp_path: Path, face_data: Path) -> None:
    """LFW from its pairs.txt equals the .bin that an independent program made: images, their order, flags."""
    subprocess.run([sys.executable, face_data / "make_lfw_bin.py", tmp_path / "theirs.bin"], check=True)
    counts = pack_bin(
        face_data / "lfw" / "pairs.txt", face_data / "lfw" / "images", tmp_path / "ours.bin", Fit(112, "refuse", 95), 0
    )
    assert counts == (6000, 3000)
    ours, theirs = read_bin(tmp_path / "ours.bin"), read_bin(tmp_path / "theirs.bin")
    assert ours.images == theirs.images
    assert np.array_equal(ours.index, theirs.index)
    assert np.array_equal(ours.same, theirs.same)


def test_blanks_and_other_endings(tmp_path: Path, images: Path) -> None:
    """Blanks separate as well as tabs; an image may be a .png."""
    jpeg = images / "Bob" / "Bob_0003.jpg"
    jpeg.rename(jpeg.with_suffix(".png"))
    pairs = read_pairs(written(tmp_path / "pairs", "Bob 3 12\n"), images)
    assert pairs[0].files == (jpeg.with_suffix(".png"), images / "Bob" / "Bob_0012.jpg")
    assert pairs[0].same


BAD_LISTS = {
    "columns": ("Bob\t3\t12\nBob\t3\n", "pairs, line 2: 2 columns, expected 'name i j'"),
    "number": ("Bob\t3\t12\n\nBob\t3\tx\n", "pairs, line 3: 'x' is no number of an image"),
    "cut off": (LFW.rpartition("Bob")[0], "pairs: its first line announces 4 pairs, found 3"),
    "nothing": ("", "pairs has no pairs"),
    "only a header": ("path1,path2,same\n", "pairs has no pairs"),
    "CSV header": ("a,b,same\n", "pairs: its header is 'a,b,same', expected path1,path2,same"),
    "CSV columns": (CSV + "a,b\n", "pairs, line 6: 2 columns, expected 3"),
    "CSV flag": (CSV + "a,b,maybe\n", "pairs, line 6: 'maybe' does not say whether it is one person"),
}


@pytest.mark.parametrize(("text", "message"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_bad_lists(tmp_path: Path, images: Path, text: str, message: str) -> None:
    """Every mistake in a list names the list and its line."""
    with pytest.raises(PairsError, match=message):
        read_pairs(written(tmp_path / "pairs", text), images)


def test_bad_images(tmp_path: Path, images: Path) -> None:
    """Missing files, files that are no image and other sizes name line and file; there is no .bin afterwards."""
    source, output = written(tmp_path / "pairs", LFW), tmp_path / "a.bin"
    with pytest.raises(ImageError, match=r"pairs, line 2: .*Ann Lee_0001\.jpg has 32x32 pixels, expected 16x16"):
        pack_bin(source, images, output, Fit(16, "refuse", 95), 0)
    (images / "Bob" / "Bob_0012.jpg").write_bytes(b"oops")
    with pytest.raises(ImageError, match=r"pairs, line 3: .*Bob_0012\.jpg: its 4 bytes are no image"):
        pack_bin(source, images, output, FIT, 0)
    (images / "Bob" / "Bob_0012.jpg").unlink()
    with pytest.raises(PairsError, match=r"pairs, line 3: .*Bob_0012\.jpg: No such file"):
        pack_bin(source, images, output, FIT, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "pairs"]


def test_resize(tmp_path: Path, images: Path) -> None:
    """Other sizes become the asked one when that is allowed."""
    pack_bin(written(tmp_path / "pairs", LFW), images, tmp_path / "a.bin", Fit(16, "resize", 95), 0)
    assert {decode_rgb(image, "").shape for image in read_bin(tmp_path / "a.bin").images} == {(16, 16, 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": None}, "--pairs is missing"),
        ({"output": "{here}/a.pkl"}, "verification sets are found by the ending .bin"),
        ({"output": "{here}/there.bin"}, "there.bin exists: name another output"),
        ({"pairs": "{here}/nothing"}, "nothing"),
    ],
)
def test_errors_on_the_command_line(tmp_path: Path, images: Path, changes: dict[str, str | None], message: str) -> None:
    """A mistake ends the program with one line that says what is wrong; nothing that exists is replaced."""
    written(tmp_path / "pairs", LFW)
    written(tmp_path / "there.bin", "mine")
    flags = {"pairs": "{here}/pairs", "images": "{here}/images", "output": "{here}/a.bin", **changes}
    arguments = [text.format(here=tmp_path) for name, value in flags.items() if value for text in (f"--{name}", value)]
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--workers", "0"])
    assert str(error.value).startswith("pack_bin: ")
    assert message in str(error.value)
    assert (tmp_path / "there.bin").read_text() == "mine"


def test_script_from_another_directory(tmp_path: Path, images: Path) -> None:
    """The program runs wherever it is called and says what to do next."""
    written(tmp_path / "pairs.txt", LFW)
    flags = ["--pairs", "pairs.txt", "--images", "images", "--output", "out/tiny.bin", "--image-size", "32"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out/tiny.bin: 4 pairs, 2 of one person" in done.stdout
    assert len(read_bin(tmp_path / "out" / "tiny.bin").same) == 4
