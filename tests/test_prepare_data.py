"""prepare_data: the bytes of the records as files, whole after any interruption, and never mixed with another set."""

import csv
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import PackConfig
from conftest import ROOT
from data import prepare_data
from data.face_sets import FaceSetError, RecFaceSet, identity_order, open_face_set
from data.fitting import Fit
from data.identity_choice import choose_identities
from data.pack_set import pack, select
from data.prepare_data import JOURNAL, TABLE, JournalError, main, prepare
from data.recordio import MAGIC_BYTES, RecordError, pack_image, write_records
from data.set_sources import LANDMARK_COLUMNS, open_source
from data.unpacked_names import FORBIDDEN, portable_names
from tiny_faces import tiny_face
from utils import processes
from utils.files import BusyError

SCRIPT = ROOT / "data" / "prepare_data.py"
BLOCK = 4
IMAGES = 15


def image(key: int) -> bytes:
    """Bytes of a length of their own; every third is a PNG, every fifth holds the magic of the record format."""
    signature = b"\x89PNG" if key % 3 == 0 else b"\xff\xd8\xff\xe0"
    return signature + MAGIC_BYTES * (key % 5 == 0) + bytes([key]) * key


def path_of(key: int) -> str:
    return f"{label(key):06d}/{key:09d}{'.png' if key % 3 == 0 else '.jpg'}"


class MeasuredPool(ProcessPoolExecutor):
    """Notes in `sent` how many bytes workers get, when they are started and with each block."""

    sent: ClassVar[list[int]] = []

    def __init__(self, workers: int, context: Any, initialise: Any, arguments: Any) -> None:
        super().__init__(workers, context, initialise, arguments)
        self.sent.append(len(pickle.dumps((initialise, arguments))))

    def submit(self, *task: Any) -> Any:
        self.sent.append(len(pickle.dumps(task)))
        return super().submit(*task)


def label(key: int) -> int:
    return 10 * (key % 4)  # with holes, and spread over all blocks


EXPECTED = {path_of(key): image(key) for key in range(1, IMAGES + 1)}


@pytest.fixture
def rec(tmp_path: Path) -> Path:
    """A set of 15 images of 4 identities, with header and identity record."""
    path = tmp_path / "set" / "train.rec"
    path.parent.mkdir()
    with write_records(path) as writer:
        for key in range(1, IMAGES + 1):
            writer.write(key, pack_image(float(label(key)), key, image(key)))
        writer.write(IMAGES + 1, pack_image([1.0, 16.0], IMAGES + 1, b""))
        writer.write(0, pack_image([16.0, 17.0], 0, b""))
    return path


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "IMAGES_PER_BLOCK", BLOCK)


def tree(output: Path) -> dict[str, bytes]:
    """{relative path: bytes} of all images below `output`."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name not in (JOURNAL, TABLE)
    }


def test_workers_get_their_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking and packing send a worker the places of a block of images, not those of the set: of 42 million they
    are a GiB, for each of them.
    """
    count, sent = 2000, MeasuredPool.sent
    with write_records(tmp_path / "train.rec") as writer:
        for key in range(count):
            writer.write(key, pack_image(float(key % 50), key, tiny_face(key % 3, 0)))
    monkeypatch.setattr(processes, "ProcessPoolExecutor", MeasuredPool)
    monkeypatch.setattr(prepare_data, "IMAGES_PER_BLOCK", 64)
    prepare(tmp_path / "train.rec", tmp_path / "images", 1)
    faces = open_source(tmp_path / "train.rec")
    pack(faces, select(faces, PackConfig()), tmp_path / "packed", Fit(32, "refuse", 95), 1)
    assert len(sent) > 2 * count // 64
    assert max(sent) < 8 * count


def test_files_are_the_bytes_of_the_records(tmp_path: Path, rec: Path) -> None:
    """Every image under label and key, bit for bit, PNG called so; header and identity records leave no file."""
    done = prepare(rec, tmp_path / "out", workers=0)
    assert tree(tmp_path / "out") == EXPECTED
    assert (done.images, done.written, done.identities) == (IMAGES, IMAGES, 4)
    assert done.bytes == sum(map(len, EXPECTED.values()))


def test_a_second_run_writes_nothing(tmp_path: Path, rec: Path) -> None:
    """What is done stays untouched, to the modification time."""
    prepare(rec, tmp_path / "out", workers=0)
    for path in (tmp_path / "out").rglob("*.*g"):
        os.utime(path, ns=(1, 1))
    journal = (tmp_path / "out" / JOURNAL).read_bytes()
    again = prepare(rec, tmp_path / "out", workers=0)
    assert (tmp_path / "out" / JOURNAL).read_bytes() == journal
    assert (again.images, again.written, again.bytes) == (IMAGES, 0, 0)
    assert {path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*g")} == {1}


def drop_lines(journal: Path, *dropped: int) -> None:
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for number, line in enumerate(lines) if number not in dropped))


def cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


# What a crash leaves, and which blocks of 4 images must then be written anew in full.
DAMAGE: dict[str, tuple[Callable[[Path, Path], object], set[int]]] = {
    "files cut and gone": (lambda out, journal: (cut(out / path_of(3), 1), (out / path_of(9)).unlink()), set()),
    "a file empty": (lambda out, journal: cut(out / path_of(7), len(image(7))), set()),
    "a folder gone": (lambda out, journal: [p.unlink() for p in (out / "000010").iterdir()], set()),
    "last line cut within": (lambda out, journal: cut(journal, 2), {12}),
    "last line cut at its end": (lambda out, journal: cut(journal, 1), {12}),
    "last line lost": (lambda out, journal: drop_lines(journal, 4), {12}),
    "lines lost": (lambda out, journal: drop_lines(journal, 1, 3), {0, 8}),
    "only the header left": (lambda out, journal: drop_lines(journal, 1, 2, 3, 4), {0, 4, 8, 12}),
    "header cut": (lambda out, journal: os.truncate(journal, 9), {0, 4, 8, 12}),
    "header without line break": (
        lambda out, journal: os.truncate(journal, journal.read_bytes().index(b"\n")),
        {0, 4, 8, 12},
    ),
    "journal empty": (lambda out, journal: os.truncate(journal, 0), {0, 4, 8, 12}),
}


@pytest.mark.parametrize(("damage", "lost_blocks"), DAMAGE.values(), ids=DAMAGE.keys())
def test_restart_after_an_interruption(
    tmp_path: Path, rec: Path, damage: Callable[[Path, Path], object], lost_blocks: set[int]
) -> None:
    """Whatever was cut, lost or not noted, all is right afterwards, and finished blocks are not written again."""
    out = tmp_path / "out"
    prepare(rec, out, workers=0)
    damage(out, out / JOURNAL)
    # Blocks that are not in the journal may hold anything, even a file of the right size with wrong bytes.
    for block in lost_blocks:
        path = out / path_of(block + 1)
        path.write_bytes(bytes(path.stat().st_size))
    damaged = {name for name, content in EXPECTED.items() if tree(out).get(name) != content}
    assert damaged or lost_blocks, "the damage must be one"
    for path in out.rglob("*.*g"):
        os.utime(path, ns=(1, 1))

    result = prepare(rec, out, workers=0)

    assert tree(out) == EXPECTED
    lost = {path_of(key) for block in lost_blocks for key in range(block + 1, min(block + BLOCK, IMAGES) + 1)}
    written = {name for name in EXPECTED if (out / name).stat().st_mtime_ns != 1}
    assert written == damaged | lost
    assert result.written == len(written)
    third = prepare(rec, out, workers=0)
    assert third.written == 0, "the journal must know all blocks again"


def test_an_error_midway_is_a_place_to_go_on_from(tmp_path: Path, rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk raises its OSError; the next call writes only the blocks that were not finished."""
    out = tmp_path / "out"
    write_bytes, left = Path.write_bytes, [10]

    def disk_full(path: Path, content: bytes) -> int:
        left[0] -= path.parent.exists()  # the first try in a new folder is no write
        if left[0] < 0:
            write_bytes(path, content[:2])
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        with pytest.raises(OSError, match="No space left"):
            prepare(rec, out, workers=0)
    assert len(tree(out)) == 11
    result = prepare(rec, out, workers=0)
    assert tree(out) == EXPECTED
    assert result.written == IMAGES - 2 * BLOCK


def table(output: Path) -> list[tuple[str, ...]]:
    """The rows of prepared.csv, without the header."""
    header, *rows = csv.reader((output / TABLE).read_text().splitlines())
    assert header == ["key", "label", "identity", "file"]
    return [tuple(row) for row in rows]


def test_a_full_disk_is_named(tmp_path: Path, rec: Path) -> None:
    """The system's own error for a full disk does not say which file: ours does, and the same call goes on."""
    out = tmp_path / "out"
    full = out / path_of(7)
    prepare(rec, out, workers=0)
    drop_lines(out / JOURNAL, 1, 2, 3, 4)
    (out / TABLE).unlink()
    full.unlink()
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        prepare(rec, out, workers=0)
    assert error.value.filename == str(full)
    assert not (out / TABLE).exists(), "the table must wait for the last image"
    full.unlink()
    prepare(rec, out, workers=0)
    assert tree(out) == EXPECTED
    assert len(table(out)) == IMAGES


def test_a_disk_too_full_for_the_journal_is_named(tmp_path: Path) -> None:
    """The journal is named too, while a line is added and when what is left of it cannot be written at the end."""
    path = tmp_path / JOURNAL
    journal = prepare_data._Journal(path, {})
    journal._file.close()
    with Path("/dev/full").open("w") as journal._file:
        for write in (lambda: journal.add(0), journal.__exit__):
            with pytest.raises(OSError, match="No space left") as error:
                write()
            assert error.value.filename == str(path)


def test_the_table_says_what_went_where(tmp_path: Path, rec: Path) -> None:
    """Every image has its row, with the label that the folders give when they are read as a set."""
    out = tmp_path / "out"
    prepare(rec, out, workers=0)
    folders = open_face_set(out)
    rows = table(out)
    assert sorted(int(key) for key, *_ in rows) == list(range(1, IMAGES + 1))
    assert [int(row[1]) for row in rows] == folders.labels.tolist()
    for i, (key, _, identity, file) in enumerate(rows):
        assert (int(identity), file) == (label(int(key)), path_of(int(key)))
        assert (out / file).read_bytes() == folders.encoded(i)


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({"names": ("30", "0")}, {0, 30}),
        ({"min_images": 4}, {10, 20, 30}),
        ({"limit": 2}, {0, 10}),
        ({"min_images": 4, "limit": 1, "names": ("0", "20", "30")}, {20}),
    ],
)
def test_filters(tmp_path: Path, rec: Path, choice: dict, kept: set[int]) -> None:
    """Exactly the identities that are asked for come out; another choice does not get into their folder."""
    out = tmp_path / "out"
    prepare(rec, out, 0, **choice)
    expected = {name: content for name, content in EXPECTED.items() if int(name.split("/")[0]) in kept}
    assert tree(out) == expected
    assert {file for *_, file in table(out)} == set(expected)
    assert prepare(rec, out, 0, **choice).written == 0
    with pytest.raises(JournalError, match="another set or choice"):
        prepare(rec, out, 0)


def test_filters_on_the_command_line(tmp_path: Path, rec: Path) -> None:
    """The flags reach the filters, names come from a file too, and a name that does not exist is an error."""
    (tmp_path / "names.txt").write_text("10\n\n20\n")
    out = tmp_path / "out"
    main(["--r", str(rec), "--output", str(out), "--workers", "0", "--limit", "1", "--min-images", "2",
          "--identities", f"@{tmp_path / 'names.txt'}"])  # fmt: skip
    assert {row[2] for row in table(out)} == {"10"}
    with pytest.raises(FaceSetError, match="has no identity '11'"):
        prepare(rec, tmp_path / "other", 0, ("11",))


@pytest.mark.parametrize("other", ["images", "bytes", "block", "no journal of ours"])
def test_output_of_another_set_is_refused(
    tmp_path: Path, rec: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sets in one folder would be one wrong set: the journal of another one is an error, and nothing is written."""
    out = tmp_path / "out"
    prepare(rec, out, workers=0)
    (out / path_of(1)).unlink()
    if other == "no journal of ours":
        (out / JOURNAL).write_bytes(b"\xff\xfe notes")
    elif other == "block":
        monkeypatch.setattr(prepare_data, "IMAGES_PER_BLOCK", BLOCK + 1)
    else:
        with write_records(rec) as writer:
            for key in range(1, IMAGES + 1 + (other == "images")):
                writer.write(key, pack_image(0.0, key, image(key) + b"...."))
    before = tree(out)
    with pytest.raises(JournalError, match=r"out/\.prepare_journal\.jsonl belongs to another set"):
        prepare(rec, out, workers=0)
    assert tree(out) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, rec: Path) -> None:
    """Images are never mixed into a folder that holds anything but an earlier run."""
    (tmp_path / "out" / "000001").mkdir(parents=True)
    (tmp_path / "out" / "000001" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(JournalError, match="out is not empty and no earlier run's"):
        prepare(rec, tmp_path / "out", workers=0)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["000001", "mine.jpg"]


def test_two_at_once(tmp_path: Path, rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one process writes, another with the same output is refused, be it of the same set or another one: killed,
    it would leave a file cut off that the first has told to be whole."""
    out, refused, write = tmp_path / "out", [], prepare_data._write

    def write_among_others(path: Path, image: bytes) -> None:
        if not refused:
            refused.append(path)
            with pytest.raises(BusyError, match="out is being written by another process"):
                prepare(rec, out, workers=0)
        write(path, image)

    monkeypatch.setattr(prepare_data, "_write", write_among_others)
    prepare(rec, out, workers=0)
    assert refused
    assert tree(out) == EXPECTED


def test_damaged_record_names_itself(tmp_path: Path, rec: Path) -> None:
    """A record that cannot be read stops the run with file and offset."""
    damaged = bytearray(rec.read_bytes())
    offset = RecFaceSet(rec)._offsets[6]
    damaged[offset : offset + 4] = b"oops"
    rec.write_bytes(damaged)
    with pytest.raises(RecordError, match=rf"train\.rec: no record begins at byte {offset}"):
        prepare(rec, tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "{here}/nothing"], "nothing does not exist"),
        (["--r", "{here}"], "name a folder for the images of"),
        (["--r", "{here}", "--output", "{here}/out"], "has no folders of images"),
        (["--r", "{here}/set", "--output", "{here}/file"], "file"),
        (["--r", "{here}/set/train.idx", "--output", "{here}/out"], "train.idx: its first line"),
    ],
)
def test_errors_on_the_command_line(tmp_path: Path, rec: Path, arguments: list[str], message: str) -> None:
    """A wrong path ends the program with one line that names it, not with a traceback."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as error:
        main([argument.format(here=tmp_path) for argument in arguments] + ["--workers", "0"])
    assert str(error.value).startswith("prepare_data: ")
    assert message in str(error.value)


@pytest.mark.parametrize(("flag", "workers"), [("--r", 0), ("--rec_data_path", 2)])
def test_script_from_another_directory(tmp_path: Path, rec: Path, flag: str, workers: int) -> None:
    """The program runs wherever it is called, in this process or in others, and the tree is the same."""
    done = subprocess.run(
        [sys.executable, SCRIPT, flag, "set", "--workers", str(workers)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "15 images of 4 identities; 15 written now" in done.stdout
    out = rec.parent / "images"
    assert tree(out) == EXPECTED
    journal = (out / JOURNAL).read_text().splitlines()
    assert json.loads(journal[0])["images"] == IMAGES
    assert journal[1:] == ["0"]


def test_workers_make_no_difference(tmp_path: Path, rec: Path) -> None:
    """Two processes and one write the same tree and finish the same blocks."""
    done = [prepare(rec, tmp_path / str(workers), workers) for workers in (0, 2)]
    assert done[0] == done[1]
    assert tree(tmp_path / "0") == tree(tmp_path / "2") == EXPECTED
    blocks = [sorted((tmp_path / str(workers) / JOURNAL).read_text().splitlines()) for workers in (0, 2)]
    assert blocks[0] == blocks[1]


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


@given(NAMES)
def test_portable_names(names: list[str]) -> None:
    """Whatever names there are: what comes of them can be told apart on any file system, and is in the same order."""
    names = [names[i] for i in identity_order(names)]
    new = portable_names(names, identity_order)
    assert identity_order(new) == list(range(len(names)))
    assert len({name.casefold() for name in new}) == len(names)
    for name in new:
        assert not set(name) & FORBIDDEN
        assert not name.startswith(".")
        assert not name.endswith((" ", "."))
        assert 0 < len(name.encode(errors="surrogateescape")) < 240
    assert portable_names(new, identity_order) == new


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
    assert portable_names(names, identity_order) == new


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
