"""prepare_data: folders, lists and CSVs become the folders that their set would, and go on where they were stopped."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import PackConfig
from data import prepare_data
from data.face_sets import FaceSetError, identity_order, open_face_set
from data.fitting import Fit
from data.identity_choice import choose_identities
from data.pack_set import pack, select
from data.prepare_data import JOURNAL, TABLE, main, prepare
from data.set_sources import LANDMARK_COLUMNS, open_source
from data.unpacked_names import FORBIDDEN, portable_names
from tiny_faces import tiny_face
from unpacked_trees import drop_lines, table, tree
from utils.resumable import JournalError


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "IMAGES_PER_BLOCK", 4)


def shots(folder: Path, *names: str) -> list[Path]:
    """Images of 32x32 with these names."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(tiny_face(number, number))
    return [folder / name for name in names]


def from_folder(here: Path) -> Path:
    shots(here / "in", "b/2.png", "b/10.PNG", "b/1.jpg", "a b/x.webp", "10/x.png", "9/y.bmp")
    return here / "in"


def from_numbered_folder(here: Path) -> Path:
    shots(here / "in", "7/2.png", "007/10.png", "1000000/1.jpg", "999999/x.png")
    return here / "in"


def from_awkward_folder(here: Path) -> Path:
    """Names that not every file system can hold, or keep apart."""
    shots(here / "in", "Anna/a.png", "anna/A.png", "anna/a.png", "b:1/x.png", f"c/{'x' * 230}.png", "d /x.png")
    return here / "in"


def from_im2rec(here: Path) -> Path:
    """Files of one name in several folders, in an order of the list's own; a label with images here and there."""
    files = shots(here / "p", "z/1.png", "a/1.png", "m/1.png", "a/2.png", "b.png")
    lines = [f"{9 - i}\t{label}\tp/{file.relative_to(here / 'p')}\n" for i, (file, label) in
             enumerate(zip(files, ("1000000.000", "3.0", "1000000.0", "3", "999999"), strict=True))]  # fmt: skip
    (here / "l.lst").write_text("".join(lines))
    return here / "l.lst"


def from_face2rec(here: Path) -> Path:
    files = shots(here / "p", "z/1.png", "a/1.png", "a/2.png")
    box = "\t".join("1234") + "\t" + "\t".join(map(str, range(10)))
    (here / "l.lst").write_text("".join(f"1\t{file}\t{2 - i % 2}\t{box}\n" for i, file in enumerate(files)))
    return here / "l.lst"


def from_csv(here: Path) -> Path:
    """People called as no folder can be, two of them alike but for the case, with blank lines between."""
    shots(here / "p", *(f"{i}.png" for i in range(8)))
    names = ["a/b", "a.b", "A.B", "..", "Żółć, Jan", "a/b", "007", "nul\\x"]
    with (here / "l.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "name"), *((f"p/{i}.png", name) for i, name in enumerate(names)), ()])
    return here / "l.csv"


def from_csv_of_numbers(here: Path) -> Path:
    shots(here / "p", *(f"{i}.png" for i in range(4)))
    (here / "l.csv").write_text("path,label\np/3.png,7\np/2.png,007\np/1.png,12\np/0.png,7\n")
    return here / "l.csv"


SOURCES = (
    from_folder,
    from_numbered_folder,
    from_awkward_folder,
    from_im2rec,
    from_face2rec,
    from_csv,
    from_csv_of_numbers,
)


def packed(source: Path, output: Path) -> bytes:
    faces = open_source(source)
    pack(faces, select(faces, PackConfig()), output, Fit(32, "refuse", 95), 0)
    return (output / "train.rec").read_bytes()


@pytest.mark.parametrize("make", SOURCES)
def test_any_set_there_and_back(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Folders of any source are packed to the very records of the source itself; the table has all, in this order."""
    source = make(tmp_path)
    done = prepare(source, tmp_path / "out", workers=0)
    assert packed(tmp_path / "out", tmp_path / "a") == packed(source, tmp_path / "b")
    faces, rows = open_source(source), table(tmp_path / "out")
    assert done.images == done.written == len(faces) == len(rows) == len(tree(tmp_path / "out"))
    records = open_face_set(tmp_path / "a")
    assert [int(label) for _, label, *_ in rows] == records.labels.tolist()
    assert [(tmp_path / "out" / row[3]).read_bytes() for row in rows] == [records.encoded(i) for i in range(len(rows))]
    identities = [row[2] for row in rows]
    assert identities == sorted(identities, key=list(dict.fromkeys(identities)).index), "an identity's images together"
    assert set(identities) == set(faces.identities)
    assert prepare(source, tmp_path / "out", workers=0).written == 0


@pytest.mark.parametrize("make", [from_folder, from_csv, from_im2rec])
def test_any_set_in_processes(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """What the processes get of a set is all they need: the tree is that of one process."""
    source = make(tmp_path)
    for workers in (0, 2):
        prepare(source, tmp_path / str(workers), workers)
    assert tree(tmp_path / "0") == tree(tmp_path / "2")


def test_names_that_can_stay_do(tmp_path: Path) -> None:
    """Folders come out as they went in; those of a list are its numbers, as for records, and its lines the files."""
    folder = from_folder(tmp_path)
    prepare(folder, tmp_path / "out", 0)
    assert tree(tmp_path / "out") == tree(folder)
    prepare(from_im2rec(tmp_path / "list"), tmp_path / "listed", 0)
    assert sorted(tree(tmp_path / "listed")) == [
        "000003/000000002.png", "000003/000000004.png", "1000000/000000001.png", "1000000/000000003.png",
        "999999/000000005.png"]  # fmt: skip
    assert table(tmp_path / "listed")[0] == ("2", "0", "3", "000003/000000002.png")


NAMES = st.lists(st.text("aAb.:/ 19é", min_size=1, max_size=4) | st.text(min_size=1), min_size=1, unique=True)


def is_in_order(names: list[str]) -> bool:
    return identity_order(names) == list(range(len(names)))


@given(NAMES)
def test_portable_names(names: list[str]) -> None:
    """Whatever names there are: what comes of them can be told apart on any file system, and is in the same order."""
    names = [names[i] for i in identity_order(names)]
    new = portable_names(names, in_order=True)
    assert is_in_order(new)
    assert len({name.casefold() for name in new}) == len(names)
    for name in new:
        assert not set(name) & FORBIDDEN
        assert not name.startswith(".")
        assert not name.endswith((" ", "."))
        assert 0 < len(name.encode(errors="surrogateescape")) < 240
    assert portable_names(new, in_order=True) == new


@pytest.mark.parametrize(
    ("names", "new"),
    [
        (["10", "9", "x"], ["10", "9", "x"]),
        (["10", "9"], ["000000_10", "000001_9"]),  # chosen from the three: as numbers they would change places
        (["A", "a"], ["000000_A", "000001_a"]),
        (["e\u0301", "\u00e9"], ["000000_e\u0301", "000001_\u00e9"]),  # the same to macOS
        ([".", "..", "a/b", "b "], ["000000__", "000001___", "000002_a_b", "000003_b_"]),
    ],
)
def test_names_that_cannot_stay(names: list[str], new: list[str]) -> None:
    """One name that some disk refuses, or takes for another, or puts elsewhere, has all of them numbered."""
    assert portable_names(names, is_in_order(names)) == new


@pytest.mark.parametrize("digits", [200, 201, 300, 5000])
def test_labels_of_many_digits(tmp_path: Path, digits: int) -> None:
    """They fit no name of a folder from some length on, and are no numbers to Python from another: shortened, and
    numbered in their order, as other names that are too long."""
    source = tmp_path / "list.csv"
    source.write_text(f"path,label\na.png,{'9' * digits}\na.png,8\n")
    (tmp_path / "a.png").write_bytes(tiny_face(0, 0))
    prepare(source, tmp_path / "out", 0)
    found = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    if digits == 200:
        assert found == ["000008", "9" * 200]
    else:
        assert found == ["000000_8", "000001_" + "9" * 193]


@pytest.mark.parametrize("change", ["content", "name", "list", "one more"])
def test_changed_files_are_another_set(tmp_path: Path, change: str) -> None:
    """What was unpacked of one set is never gone on with from another; the same set in other words is the same."""
    source = from_im2rec(tmp_path)
    out = tmp_path / "out"
    prepare(source, out, workers=0)
    for spelling in (tmp_path / "p" / ".." / "l.lst", Path(os.path.relpath(source))):
        assert prepare(spelling, out, workers=0).written == 0
    if change == "content":
        (tmp_path / "p" / "a" / "2.png").write_bytes(tiny_face(9, 9) + b"more")
    elif change == "name":
        (tmp_path / "p" / "b.png").rename(tmp_path / "p" / "c.png")
        source.write_text(source.read_text().replace("b.png", "c.png"))
    elif change == "list":
        source.write_text(source.read_text().replace("999999", "999998"))
    else:
        source.write_text(source.read_text() + "0\t3\tp/b.png\n")
    with pytest.raises(JournalError, match="or images of the set were changed since"):
        prepare(source, out, workers=0)


def test_going_on_with_folders(tmp_path: Path) -> None:
    """Blocks that the journal has are left alone, others are written anew, of files as of records."""
    source, out = from_folder(tmp_path), tmp_path / "out"
    prepare(source, out, workers=0)
    expected = tree(out)
    drop_lines(out / JOURNAL, 2)
    (out / "b" / "2.png").unlink()
    (out / "9" / "y.bmp").write_bytes(b"torn")
    assert prepare(source, out, workers=0).written == 3
    assert tree(out) == expected == tree(source)


def test_images_that_are_not_aligned(tmp_path: Path) -> None:
    """Landmarks would be lost without a word: such images are refused by their line, or copied on demand."""
    shots(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "l.lst").write_text("1\t0.png\t0\n0\t1.png\t1\n")
    header = "path,name," + ",".join(LANDMARK_COLUMNS)
    (tmp_path / "l.csv").write_text(f"{header}\n0.png,a,{',' * 9}\n1.png,b,{','.join('1234567890')}\n")
    for name, line in (("l.lst", 2), ("l.csv", 3)):
        source = tmp_path / name
        with pytest.raises(
            FaceSetError, match=rf"{name}, line {line}: .*1\.png is not aligned.*pack_set.*--unaligned copy"
        ):
            prepare(source, tmp_path / f"out {name}", 0)
        assert not (tmp_path / f"out {name}").exists()
        assert prepare(source, tmp_path / f"out {name}", 0, unaligned="copy").images == 2
    kept = str(open_source(tmp_path / "l.csv").identities[0])
    assert prepare(tmp_path / "l.csv", tmp_path / "aligned", 0, names=(kept,)).images == 1, "those chosen are aligned"


def test_what_stops_a_list_or_folder(tmp_path: Path) -> None:
    """A missing image is named with its line before anything is written; a set is not unpacked into itself."""
    source = from_im2rec(tmp_path)
    (tmp_path / "p" / "m" / "1.png").unlink()
    with pytest.raises(FaceSetError, match=r"l\.lst, line 3: .*m/1\.png: No such file"):
        prepare(source, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()
    folder = from_folder(tmp_path)
    with pytest.raises(FaceSetError, match="out is within the set"):
        prepare(folder, folder / "out", 0)
    assert not (folder / "out").exists()


def test_lists_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The paths of a list are relative to the folder that is named, and landmarks are copied over on demand."""
    shots(tmp_path / "photos", "0.png")
    (tmp_path / "l.lst").write_text("0\t0.png\t5\n")
    main(["--r", str(tmp_path / "l.lst"), "--image-root", str(tmp_path / "photos"), "--output", str(tmp_path / "out"),
          "--unaligned", "copy", "--workers", "0"])  # fmt: skip
    shown = capsys.readouterr()
    assert "1 images of 1 identities; 1 written now" in shown.out
    assert "check: 100%" in shown.err, "the files of millions of images take minutes"
    assert f"{TABLE}: 100%" in shown.err
    assert list(tree(tmp_path / "out")) == ["000005/000000001.png"]


def test_real_set_as_folders(tmp_path: Path, face_data: Path) -> None:
    """The tree of a real set is a face set itself: same identities, same bytes."""
    prepare(face_data / "kazakh25" / "validation.rec", tmp_path / "out", workers=0)
    records, folders = open_face_set(face_data / "kazakh25"), open_face_set(tmp_path / "out")
    assert [int(name) for name in folders.identities] == sorted(int(name) for name in records.identities)
    assert len(records) == len(folders) == 229

    def people(faces) -> list[tuple[int, bytes]]:
        return sorted((int(faces.identities[faces.labels[i]]), faces.encoded(i)) for i in range(len(faces)))

    assert people(records) == people(folders)
    assert np.bincount(records.labels).tolist() == np.bincount(folders.labels).tolist()


def test_a_file_of_names_from_a_text_editor(tmp_path: Path) -> None:
    """With a byte order mark, empty lines and spaces; identities come in the order of their labels, not of the set."""
    faces: Any = SimpleNamespace(path=tmp_path, identities=["10", "9", "8"], labels=np.array([0, 1, 2, 1]))
    (tmp_path / "names.txt").write_text("\ufeff10\n  \n9 \n", encoding="utf-8")
    chosen = choose_identities(faces, [f"@{tmp_path / 'names.txt'}"], 1)
    assert [(identity.name, identity.images.tolist()) for identity in chosen] == [("9", [1, 3]), ("10", [0])]


@pytest.mark.parametrize("content", ["", "\ufeff", "\n \r\n\n"])
@pytest.mark.parametrize("others", [[], ["9"]])
def test_a_file_without_names(tmp_path: Path, content: str, others: list[str]) -> None:
    """What a search that found nobody writes: it stands for nobody, not for all identities, as no names do."""
    faces: Any = SimpleNamespace(path=tmp_path, identities=["10", "9"], labels=np.array([0, 1]))
    (tmp_path / "names.txt").write_text(content, encoding="utf-8")
    with pytest.raises(FaceSetError, match=r"names\.txt names no identity"):
        choose_identities(faces, [f"@{tmp_path / 'names.txt'}", *others], 1)


@pytest.mark.parametrize("folder", ["Zo\u00e9", "Zoe\u0301"])
def test_a_name_with_accents_is_the_same_however_it_is_written(tmp_path: Path, folder: str) -> None:
    """Folders from a Mac have the accent as a character of its own, which typing the name does not give."""
    faces: Any = SimpleNamespace(path=tmp_path, identities=["Ann", folder], labels=np.array([0, 1]))
    for typed in ("Zo\u00e9", "Zoe\u0301"):
        assert [identity.name for identity in choose_identities(faces, [typed], 1)] == [folder]
    with pytest.raises(FaceSetError, match=r"has no identity 'Zo\u00eb' \(1 such names\)"):
        choose_identities(faces, ["Zo\u00e9", "Zo\u00eb"], 1)
