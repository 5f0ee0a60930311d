"""pack_bin: the pairs of a list as a verification set, in order, image bytes as they are."""

import itertools
import os
import random
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from data import pair_drawing
from data.face_sets import IMAGE_ENDINGS, FaceSetError
from data.fitting import Fit
from data.images import ImageError, decode_rgb
from data.pack_bin import main, pack_bin
from data.pair_drawing import draw_pairs
from data.pair_lists import PairsError, read_pairs
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
    [
        LFW,
        LFW.removeprefix("2\t1\n"),
        LFW.replace("2\t1\n", "2\n", 1).replace("\n", "\r\n"),
        CSV,
        "\ufeff" + CSV,
        CSV.replace(",", ";"),
    ],
    ids=["LFW", "without header", "one fold, CRLF", "CSV", "CSV with byte order mark", "semicolons"],
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
    """Blanks separate as well as tabs; an image may be a .png, or a .JPG as cameras name it."""
    jpeg = images / "Bob" / "Bob_0003.jpg"
    jpeg.rename(jpeg.with_suffix(".png"))
    other = images / "Bob" / "Bob_0012.jpg"
    other.rename(other.with_suffix(".JPG"))
    pairs = read_pairs(written(tmp_path / "pairs", "Bob 3 12\n"), images)
    assert pairs[0].files == (jpeg.with_suffix(".png"), other.with_suffix(".JPG"))
    assert pairs[0].same


BAD_LISTS = {
    "columns": ("Bob\t3\t12\nBob\t3\n", "pairs, line 2: 2 columns, expected 'name i j'"),
    "number": ("Bob\t3\t12\n\nBob\t3\tx\n", "pairs, line 3: 'x' is no number of an image"),
    "paths": (
        "a/1.jpg b/2.jpg 0\n",
        "line 1: 'b/2.jpg' is no number .*: paths go into a CSV with .* path1,path2,same$",
    ),
    "longer than any number": ("Bob\t3\t" + "9" * 5000, "pairs, line 1: '9{100}' is no number of an image"),
    "first line longer than any number": ("9" * 5000 + "\n" + LFW, "pairs, line 1: 1 columns, expected 'name i j'"),
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_as_excel_saves_them(tmp_path: Path, images: Path, encoding: str) -> None:
    """Its byte order marks, its semicolons, and the empty rows it adds behind the last."""
    text = CSV.replace(",", ";").replace("\n", "\r\n") + ";;\r\n"
    (tmp_path / "pairs").write_bytes(text.encode(encoding))
    assert read_pairs(tmp_path / "pairs", images) == read_pairs(written(tmp_path / "plain", CSV), images)


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
    written(source, "Bob\0\t3\t12\n")
    with pytest.raises(PairsError, match=r"pairs, line 1: .*_0003\.jpg: embedded null byte"):
        pack_bin(source, images, output, FIT, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "pairs"]


def test_an_output_that_cannot_be_written_is_told_before_the_images(tmp_path: Path, images: Path) -> None:
    """The .bin comes last, when thousands of images are read, or photos are searched for faces."""
    (tmp_path / "file").touch()
    (images / "Bob" / "Bob_0012.jpg").write_bytes(b"oops")
    with pytest.raises(NotADirectoryError, match=r"new/a\.bin cannot be written, as .*/file is a file"):
        pack_bin(written(tmp_path / "pairs", LFW), images, tmp_path / "file" / "new" / "a.bin", FIT, 0)


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


def people(root: Path, images_of: list[int]) -> Path:
    """A folder of people called 0, 1 ..., with so many images each."""
    for person, count in enumerate(images_of):
        (root / str(person)).mkdir(parents=True)
        for number in range(count):
            (root / str(person) / f"{number}.jpg").write_bytes(tiny_face(person, number))
    return root


def drawn(path: Path) -> list[tuple[str, str, str]]:
    """(first image, second image, flag) of a list's lines."""
    first, *lines = path.read_text().splitlines()
    assert first == "path1,path2,same"
    return [(a, b, flag) for a, b, flag in (line.split(",") for line in lines)]


def test_drawn_pairs(tmp_path: Path) -> None:
    """The two kinds in turn, so that every fold has both; the flag says what the folders say; no pair twice, nor an
    image with itself; nobody has two more pairs of the one kind than another who could have more."""
    images = people(tmp_path / "images", [1, 2, 3, 5, 2])
    draw_pairs(images, 9, 0, tmp_path / "a.csv")
    pairs = drawn(tmp_path / "a.csv")
    assert [flag for *_, flag in pairs] == ["1", "0"] * 9
    assert all((Path(a).parent == Path(b).parent) == (flag == "1") and a != b for a, b, flag in pairs)
    assert len({frozenset(pair[:2]) for pair in pairs}) == 18
    assert Counter(a.split("/")[0] for a, _, flag in pairs if flag == "1") == {"1": 1, "4": 1, "2": 3, "3": 4}
    draw_pairs(images, 9, 0, tmp_path / "again.csv")
    draw_pairs(images, 9, 1, tmp_path / "other.csv")
    assert drawn(tmp_path / "again.csv") == pairs != drawn(tmp_path / "other.csv")


def test_all_pairs_of_one_person_can_be_drawn(tmp_path: Path) -> None:
    """As many as there are, each once: none is left out by how they are numbered."""
    draw_pairs(people(tmp_path / "images", [6, 3]), 18, 0, tmp_path / "a.csv")
    assert len({frozenset(pair[:2]) for pair in drawn(tmp_path / "a.csv") if pair[2] == "1"}) == 18


@pytest.mark.parametrize(
    ("images_of", "count", "message"),
    [
        ([2, 3], 5, "has only 4 pairs of images of one person, 5 are asked for"),
        ([4], 2, "has one person, 0: pairs of two people need a second one"),
        ([5, 1], 6, "has too few images for 6 pairs of two people"),
    ],
)
def test_too_few_pairs_to_draw(tmp_path: Path, images_of: list[int], count: int, message: str) -> None:
    """What there is not enough of is said, and no list is written."""
    with pytest.raises(FaceSetError, match=message):
        draw_pairs(people(tmp_path / "images", images_of), count, 0, tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(("flags", "unmixed"), [([1] * 10 + [0] * 10, 10), ([1, 0] * 9 + [1, 1], 1), ([1, 0] * 10, 0)])
def test_folds_of_one_kind_are_warned_of(tmp_path: Path, images: Path, flags: list[int], unmixed: int) -> None:
    """A list sorted by kind gives folds of one kind, whose accuracy says little: it is packed, with a warning."""
    rows = "".join(f"Bob/Bob_0003.jpg,Bob/Bob_0012.jpg,{flag}\n" for flag in flags)
    pairs = written(tmp_path / "pairs.csv", f"path1,path2,same\n{rows}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert pack_bin(pairs, images, tmp_path / "a.bin", FIT, 0) == (20, sum(flags))
    told = [f"{unmixed} of the 10 folds"] if unmixed else []
    assert [re.findall(r"\d+ of the 10 folds", str(warning.message)) for warning in said] == [told][: len(told)]


def test_drawing_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One call draws and packs; a list that is there is not drawn over, and none is left for a .bin that is there."""
    images, pairs = people(tmp_path / "images", [2, 3]), tmp_path / "pairs.csv"
    flags = ["--draw", "4", "--images", str(images), "--image-size", "32", "--workers", "0"]
    main([*flags, "--pairs", str(pairs), "--output", str(tmp_path / "a.bin")])
    assert read_bin(tmp_path / "a.bin").same.tolist() == [True, False] * 4
    said = capsys.readouterr().out
    assert f"{pairs}: 4 pairs of one person and 4 of two, drawn\n" in said
    assert "a.bin: 8 pairs, 4 of one person\nno test takes so few: it cuts them into 10 folds, so 10 pairs are" in said
    with pytest.raises(SystemExit, match=r"pairs\.csv exists: pack it without --draw"):
        main([*flags, "--pairs", str(pairs), "--output", str(tmp_path / "b.bin")])
    with pytest.raises(SystemExit, match=r"a\.bin exists: name another output"):
        main([*flags, "--pairs", str(tmp_path / "more.csv"), "--output", str(tmp_path / "a.bin")])
    assert not (tmp_path / "more.csv").exists()


def test_pairs_of_one_kind_are_no_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten pairs, all of one person: packed, and said what lacks, instead of a command that fails; there is nothing to
    mix."""
    images = people(tmp_path / "images", [5])
    files = sorted(images.rglob("*.*"))
    rows = [f"{a.relative_to(images)},{b.relative_to(images)},1" for a, b in itertools.combinations(files, 2)]
    pairs = written(tmp_path / "pairs.csv", "\n".join(["path1,path2,same", *rows, *rows]))
    flags = ["--images", str(images), "--image-size", "32", "--workers", "0", "--output", str(tmp_path / "a.bin")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main(["--pairs", str(pairs), *flags])
    said = capsys.readouterr().out
    assert said.endswith("no test takes it: all pairs are of one person, none of the other kind\n")


def test_script_from_another_directory(tmp_path: Path, images: Path) -> None:
    """The program runs wherever it is called and says what to do next."""
    written(tmp_path / "pairs.txt", LFW)
    flags = ["--pairs", "pairs.txt", "--images", "images", "--output", "out/tiny.bin", "--image-size", "32"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out/tiny.bin: 4 pairs, 2 of one person" in done.stdout
    assert len(read_bin(tmp_path / "out" / "tiny.bin").same) == 4


def test_every_pair_may_be_drawn() -> None:
    """Of one person: any of the people where there are more than pairs, any two of a person's images, in any order of
    the people; not the first of the alphabet, whose images are one photographer's."""
    people = [list(range(4 * person, 4 * person + 4)) for person in range(5)]
    drawn = [pair_drawing._of_one(people, 3, random.Random(seed)) for seed in range(200)]
    assert {pair for pairs in drawn for pair in pairs} == {
        pair for images in people for pair in itertools.combinations(images, 2)
    }
    assert {len({first // 4 for first, _ in pairs}) for pairs in drawn} == {3}
    assert {pairs[0][0] // 4 for pairs in drawn} == set(range(5))
    whole = pair_drawing._of_one(people, 100, random.Random(0))
    assert len(set(whole)) == len(whole) == 30


def test_a_person_called_by_a_number_announces_nothing(tmp_path: Path) -> None:
    """The first line of a list is a number of pairs only where it has no more than two columns."""
    (tmp_path / "pairs.txt").write_text("7\t1\t2\n7\t1\t8\t2\n")
    assert [pair.same for pair in read_pairs(tmp_path / "pairs.txt", tmp_path)] == [True, False]


def test_a_comma_in_a_name_makes_no_csv(tmp_path: Path) -> None:
    """Columns of LFW's list are parted by tabs, whatever is in the first name."""
    (tmp_path / "pairs.txt").write_text("Lee, Ann\t1\t2\n")
    (pair,) = read_pairs(tmp_path / "pairs.txt", tmp_path)
    assert pair.files[1] == tmp_path / "Lee, Ann" / "Lee, Ann_0002.jpg"


def test_digits_of_other_scripts_are_no_number(tmp_path: Path) -> None:
    """A raised 2, which Python calls a digit and cannot read, is told with its line."""
    (tmp_path / "pairs.txt").write_text("Ann\t1\t\u00b2\n", encoding="utf-8")
    with pytest.raises(PairsError, match=r"line 1: '\u00b2' is no number of an image"):
        read_pairs(tmp_path / "pairs.txt", tmp_path)


def test_of_several_files_of_an_image_the_jpg_is_taken(tmp_path: Path) -> None:
    """Then the first by the alphabet, on every machine."""
    (tmp_path / "Ann").mkdir()
    for name in ("Ann_0001.jpg", "Ann_0001.bmp", *(f"Ann_0002{ending}" for ending in IMAGE_ENDINGS - {".jpg"})):
        (tmp_path / "Ann" / name).touch()
    (tmp_path / "pairs.txt").write_text("Ann\t1\t2\n")
    (pair,) = read_pairs(tmp_path / "pairs.txt", tmp_path)
    assert [file.name for file in pair.files] == ["Ann_0001.jpg", f"Ann_0002{min(IMAGE_ENDINGS - {'.jpg'})}"]


def test_a_csv_that_a_person_wrote(tmp_path: Path) -> None:
    """Blanks around fields, capitals in the header and empty lines do not matter; a column too many and a quote without
    its end do."""
    table = tmp_path / "pairs.csv"
    table.write_text("Path1, PATH2 ,same\n\n a/1.jpg , b/2.jpg, 1\n")
    (pair,) = read_pairs(table, tmp_path)
    assert pair == ((tmp_path / "a" / "1.jpg", tmp_path / "b" / "2.jpg"), True, 3)
    for line, message in (("a,b,1,0", "line 2: 4 columns"), ('a,"b,1', "line 2: unexpected end of data")):
        table.write_text(f"path1,path2,same\n{line}\n")
        with pytest.raises(PairsError, match=message):
            read_pairs(table, tmp_path)


def test_names_that_begin_with_a_blank_are_drawn_and_read(tmp_path: Path, images: Path) -> None:
    """What drawing writes can be read, whatever is in the names: a blank, a carriage return, a comma."""
    for old, new in zip(NAMES, [" Ann", "Bob,\r"], strict=True):
        (images / old).rename(images / new)
    draw_pairs(images, 2, 0, tmp_path / "pairs.csv")
    assert all(file.is_file() for pair in read_pairs(tmp_path / "pairs.csv", images) for file in pair.files)
