"""prepare_data: the bytes of the records as files, whole after any interruption, and never mixed with another set."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest

from config import PackConfig
from conftest import ROOT
from data import prepare_data
from data.face_sets import FaceSetError, RecFaceSet, open_face_set
from data.fitting import Fit
from data.pack_set import pack, select
from data.prepare_data import JOURNAL, TABLE, main, prepare
from data.recordio import MAGIC_BYTES, RecordError, pack_image, write_records
from data.set_sources import open_source
from tiny_faces import tiny_face
from unpacked_trees import drop_lines, table, tree
from utils import processes
from utils.files import BusyError
from utils.resumable import JournalError

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


def cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


# What a crash leaves, and which blocks of 4 images must then be written anew in full.
DAMAGE: dict[str, tuple[Callable[[Path, Path], object], set[int]]] = {
    "files cut and gone": (lambda out, journal: (cut(out / path_of(3), 1), (out / path_of(9)).unlink()), set()),
    "a file empty": (lambda out, journal: cut(out / path_of(7), len(image(7))), set()),
    "a file's bytes lost": (lambda out, journal: (out / path_of(7)).write_bytes(bytes(len(image(7)))), set()),
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


def test_a_set_that_was_damaged_is_prepared_again_from_a_good_copy(tmp_path: Path, rec: Path) -> None:
    """Nothing is decoded here, so damage shows later. The good copy has the same size, keys and labels."""
    good = rec.read_bytes()
    place = good.index(image(7)) + len(image(7)) - 1
    rec.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    prepare(rec, tmp_path / "out", workers=0)
    assert tree(tmp_path / "out") != EXPECTED
    rec.write_bytes(good)
    assert prepare(rec, tmp_path / "out", workers=0).written == 1
    assert tree(tmp_path / "out") == EXPECTED


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


@pytest.mark.parametrize("line", ["\u00b2", "7" * 5000])
def test_a_damaged_line_of_the_journal_is_passed_over(tmp_path: Path, rec: Path, line: str) -> None:
    """Digits that int() does not take name no block: what is there is read, and nothing is written again."""
    out = tmp_path / "out"
    prepare(rec, out, workers=0)
    with (out / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(f"{line}\n")
    assert prepare(rec, out, workers=0).written == 0


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
        (["--data.root", "{here}/set,{here}/file"], "one at a time, --rec-data-path A"),
        (["--r", "{here}"], "name a folder for the images of"),
        (["--r", "{here}", "--output", "{here}/out"], "set holds train.rec, so it is a set of its own"),
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
