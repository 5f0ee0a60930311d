"""pack_set: from every kind of source the same images, in order, under labels without holes; whole or not at all."""

import csv
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from config import PackConfig
from conftest import ROOT
from data import face_sets, fitting, set_sources
from data.align import TEMPLATE, align
from data.face_set_writer import write_face_set
from data.face_sets import FaceSet, FaceSetError, identity_order, open_face_set
from data.fitting import Fit
from data.identity_choice import Identity
from data.images import ImageError, decode_rgb, encode_jpeg, encode_png
from data.pack_set import Packed, main, pack, select, summary, warn_of_like_names
from data.prepare_data import prepare
from data.recordio import pack_image, write_records
from data.set_sources import LANDMARK_COLUMNS, ListedFaceSet, open_source
from tiny_faces import tiny_face

SCRIPT = ROOT / "data" / "pack_set.py"
SIZE = 32
FIT = Fit(SIZE, "refuse", 95)
# Name of each person, and the shots there are of them.
PEOPLE = {"anna": 3, "bert": 1, "carl": 4}
CONTENT = [
    (name, tiny_face(person, shot)) for person, (name, shots) in enumerate(PEOPLE.items()) for shot in range(shots)
]
NUMBERS = {"anna": 5, "bert": 20, "carl": 100}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The people as folders of images, with what else lies about in such folders."""
    root = tmp_path / "faces"
    for person, (name, shots) in enumerate(PEOPLE.items()):
        (root / name).mkdir(parents=True)
        for shot in range(shots):
            (root / name / f"{shot}.png").write_bytes(tiny_face(person, shot))
    (root / "anna" / "._0.png").write_bytes(b"not an image")
    (root / "anna" / "notes.txt").write_text("not an image")
    (root / "empty").mkdir()
    return root


def files(folder: Path) -> list[tuple[str, str]]:
    """(name, path in `folder`) of every image, the people in turn, as lists have them shuffled."""
    listed = [(name, f"{name}/{shot}.png") for shot in range(max(PEOPLE.values())) for name in PEOPLE]
    return [(name, path) for name, path in listed if (folder / path).exists()]


def as_folders(folder: Path) -> Path:
    return folder


def as_im2rec(folder: Path) -> Path:
    lines = [f"{index}\t{NUMBERS[name]}.000000\t{path}\n" for index, (name, path) in enumerate(files(folder), 7)]
    return written(folder / "faces.lst", "".join(lines))


def as_face2rec(folder: Path) -> Path:
    lines = [f"1\t{path}\t{NUMBERS[name]}\n" for name, path in files(folder)]
    lines[2] = lines[2].rstrip() + "\t1\t2\t30\t31\n"  # a box
    lines[4] = lines[4].rstrip() + "\t1\t2\t30\t31" + "\t1.5" * 10 + "\n"  # landmarks of a face that is aligned
    return written(folder / "faces.lst", "\n" + "\r\n".join(lines))


def as_csv(folder: Path) -> Path:
    lines = [f'"{folder / path}",x,{name}\n' for name, path in files(folder)]
    return written(folder / "faces.csv", "\ufeffPath,source,label\n" + "".join(lines))


def with_semicolons(folder: Path) -> Path:
    """As Excel writes a CSV in half of the world."""
    lines = [f"{name};{path};a, b\n" for name, path in files(folder)]
    return written(folder / "faces.csv", '"name";"path";"other"\n' + "".join(lines))


def with_tabs(folder: Path) -> Path:
    lines = [f"{path}\t{name}\n" for name, path in files(folder)]
    return written(folder / "faces.tsv", "path\tlabel\n" + "".join(lines))


def as_rec(folder: Path) -> Path:
    """Records in the order of no identity, without record 0, labels with holes."""
    with write_records(folder / "some.rec") as writer:
        for key, (name, path) in enumerate(files(folder), 11):
            writer.write(key, pack_image([float(NUMBERS[name]), 1.0], key, (folder / path).read_bytes()))
    return folder / "some.rec"


def written(path: Path, text: str) -> Path:
    path.write_text(text, newline="")
    return path


def pack_all(source: Path, output: Path, pick: PackConfig | None = None, fit: Fit = FIT, workers: int = 0) -> FaceSet:
    faces = open_source(source)
    pack(faces, select(faces, pick or PackConfig()), output, fit, workers)
    return open_face_set(output)


def content(faces: FaceSet) -> list[tuple[int, bytes]]:
    return [(int(faces.labels[i]), faces.encoded(i)) for i in range(len(faces))]


EXPECTED = [(list(PEOPLE).index(name), image) for name, image in CONTENT]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [as_folders, as_im2rec, as_face2rec, as_csv, with_semicolons, with_tabs, as_rec])
def test_every_source_gives_the_same_set(
    tmp_path: Path, folder: Path, kind: Callable[[Path], Path], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes as they are, grouped by person, labels 0, 1, 2; `packed.csv` says who they were."""
    monkeypatch.setattr(fitting, "IMAGES_PER_BLOCK", 3)
    packed = pack_all(kind(folder), tmp_path / "set", workers=workers)
    assert content(packed) == EXPECTED
    assert (tmp_path / "set" / "property").read_text() == f"3,{SIZE},{SIZE}"
    names = list(PEOPLE) if kind not in (as_im2rec, as_face2rec, as_rec) else [str(NUMBERS[name]) for name in PEOPLE]
    with (tmp_path / "set" / "packed.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["label", "identity", "images"],
        *(
            [str(label), name, str(count)]
            for label, (name, count) in enumerate(zip(names, PEOPLE.values(), strict=True))
        ),
    ]


def test_records_to_folders_and_back(tmp_path: Path, tiny_set: Path) -> None:
    """The set that is unpacked by prepare_data and packed again is the same file, byte for byte."""
    prepare(tiny_set / "train.rec", tmp_path / "images", workers=0)
    pack_all(tmp_path / "images", tmp_path / "again")
    pack_all(tiny_set, tmp_path / "copy")
    for name in ("train.rec", "train.idx", "property"):
        for folder in ("again", "copy"):
            assert (tmp_path / folder / name).read_bytes() == (tiny_set / name).read_bytes()


def test_shuffled_records_to_folders_and_back(tmp_path: Path, face_data: Path) -> None:
    """A set whose records lie in another order than their keys is packed in that of the keys, and so comes back."""
    prepare(face_data / "kazakh25" / "validation.rec", tmp_path / "images", workers=0)
    for source, output in ((tmp_path / "images", "again"), (face_data / "kazakh25", "copy")):
        pack_all(source, tmp_path / output, fit=Fit(112, "refuse", 95))
    for name in ("train.rec", "train.idx"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()


def test_the_file_that_mxnet_wrote(tmp_path: Path, face_data: Path) -> None:
    """A real set in insightface's layout, written by mxnet, comes out of the packer as the same bytes."""
    source = face_data / "faces_celeba5k"
    pack_all(source, tmp_path / "set", fit=Fit(112, "refuse", 95))
    for name in ("train.rec", "train.idx"):
        assert (tmp_path / "set" / name).read_bytes() == (source / name).read_bytes()


def test_im2rec_list_from_elsewhere(tmp_path: Path, face_data: Path) -> None:
    """A list that im2rec wrote is known as such: the images of its set, named by path, come back as that set."""
    records = open_face_set(face_data / "kazakh25")
    prepare(records.path, tmp_path / "images", workers=0)
    of_key = {int(file.stem): file for file in (tmp_path / "images").rglob("*.jpg")}
    for line in (face_data / "kazakh25" / "validation.lst").read_text().splitlines():
        key, _, path = line.split("\t")
        (tmp_path / path).parent.mkdir(exist_ok=True)
        of_key[int(key)].rename(tmp_path / path)
    listed = open_source(face_data / "kazakh25" / "validation.lst", tmp_path)
    assert listed.identities == records.identities
    assert sorted(content(listed)) == sorted(content(records))


def test_numbers_are_ordered_by_value() -> None:
    """Labels of a million and more keep their order as folder names; a name among them makes it the alphabet."""
    assert identity_order(["1000000", "999999", "000007"]) == [2, 1, 0]
    assert identity_order(["b", "10", "9"]) == [1, 2, 0]
    assert identity_order(["0", "7", "007", "00", "10", "010", "9"]) == [0, 3, 2, 1, 6, 5, 4]
    assert identity_order(["9" * 5000, "1" + "0" * 5000, "8"]) == [2, 0, 1]  # Python makes no number of these


def names_of(pick: PackConfig, folder: Path) -> list[str]:
    return [identity.name for identity in select(open_source(folder), pick)]


def test_choosing_identities(folder: Path) -> None:
    """By name, from a file of names, by number of images, the first ones: all conditions hold together."""
    assert names_of(PackConfig(identities=("carl", "anna")), folder) == ["anna", "carl"]
    list_of_names = written(folder / "names.txt", "carl\n\nbert\n")
    assert names_of(PackConfig(identities=(f"@{list_of_names}",)), folder) == ["bert", "carl"]
    list_of_names.write_text("bert\r\ncarl", encoding="utf-16", newline="")
    assert names_of(PackConfig(identities=(f"@{list_of_names}",)), folder) == ["bert", "carl"]
    assert names_of(PackConfig(min_images=3), folder) == ["anna", "carl"]
    assert names_of(PackConfig(limit=2), folder) == ["anna", "bert"]
    assert names_of(PackConfig(identities=("bert", "carl"), min_images=2, limit=5), folder) == ["carl"]
    with pytest.raises(FaceSetError, match=r"faces has no identity 'dora' \(1 such names\)"):
        names_of(PackConfig(identities=("anna", "dora")), folder)
    with pytest.raises(FaceSetError, match="no identity with 9 images or more"):
        names_of(PackConfig(min_images=9), folder)


def test_choosing_a_name_that_is_not_utf8(folder: Path) -> None:
    """A list of names and the folders have the same bytes, whatever their encoding."""
    (folder / "bert").rename(folder / os.fsdecode(b"bj\xf6rn"))
    (folder / "names.txt").write_bytes(b"carl\nbj\xf6rn\n")
    pick = PackConfig(identities=(f"@{folder / 'names.txt'}",))
    assert names_of(pick, folder) == [os.fsdecode(b"bj\xf6rn"), "carl"]


def test_what_folders_hold_beside_images_is_listed(tmp_path: Path, folder: Path) -> None:
    """left_out.csv names the files and folders that are not taken: nobody misses a person without being told."""
    pack_all(folder, tmp_path / "set")
    with (tmp_path / "set" / "left_out.csv").open(newline="") as file:
        rows = [(row["identity"], row["image"]) for row in csv.DictReader(file)]
    assert rows == [("anna", str(folder / "anna" / "notes.txt")), ("empty", str(folder / "empty"))]


def test_names_that_look_alike(tmp_path: Path, folder: Path) -> None:
    """One person under two spellings becomes two classes: not in silence."""
    names = ["Jos\u00e9", "Jose\u0301", "anna", "Anna", "bert"]
    paths = [path for _, path in files(folder)]
    written(folder / "a.csv", "path,label\n" + "".join(map("{},{}\n".format, paths, names)))
    arguments = ["--image-size", str(SIZE), "--workers", "0", "--output", str(tmp_path / "set")]
    with pytest.warns(UserWarning, match="^Jose\u0301 and Jos\u00e9, Anna and anna are names that differ in case"):
        main(["--source", str(folder / "a.csv"), *arguments])
    assert len(open_face_set(tmp_path / "set").identities) == 5
    with warnings.catch_warnings(action="error"):
        warn_of_like_names([Identity(name, np.zeros(0)) for name in ("anna", "bert", "annna")])


def test_shuffle(folder: Path) -> None:
    """A seed gives one order of identities and images, another seed another; every image stays with its person."""
    orders = set()
    for seed in range(8):
        chosen = [select(open_source(folder), PackConfig(shuffle=True, seed=seed)) for _ in range(2)]
        ordered = [[(name, tuple(images)) for name, images in identities] for identities in chosen]
        assert ordered[0] == ordered[1]
        orders.add(str(ordered[0]))
        assert {name: set(images) for name, images in ordered[0]} == {
            "anna": {0, 1, 2},
            "bert": {3},
            "carl": {4, 5, 6, 7},
        }
    assert len(orders) > 4
    first = {names_of(PackConfig(shuffle=True, seed=seed, limit=1), folder)[0] for seed in range(8)}
    assert len(first) > 1, "the limit must come after the shuffle"


PHOTO = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
POINTS = (TEMPLATE * 0.4 + [10, 5]).astype(np.float32)


@pytest.mark.parametrize("kind", ["csv", "face2rec"])
def test_faces_with_landmarks_are_aligned(tmp_path: Path, kind: str) -> None:
    """Both lists' orders of the ten numbers give the same alignment; an image without landmarks keeps its bytes."""
    (tmp_path / "photo.png").write_bytes(encode_png(PHOTO))
    (tmp_path / "crop.png").write_bytes(tiny_face(0, 0))
    if kind == "csv":
        numbers = ",".join(map(str, POINTS.ravel()))
        header = f"label,{','.join(LANDMARK_COLUMNS)},path"
        source = written(tmp_path / "a.csv", f"{header}\n0,{',' * 9},crop.png\n1,{numbers},photo.png\n")
    else:
        numbers = "\t".join(map(str, POINTS.T.ravel()))
        source = written(tmp_path / "a.lst", f"1\tcrop.png\t0\n0\tphoto.png\t1\t1\t1\t9\t9\t{numbers}\n")
    packed = pack_all(source, tmp_path / "set")
    assert content(packed) == [(0, tiny_face(0, 0)), (1, encode_jpeg(align(PHOTO, POINTS, SIZE), 95))]


def test_images_of_another_size(tmp_path: Path, folder: Path) -> None:
    """Refused with the name and what to do; resized when asked, which leaves those that fit untouched."""
    smaller = encode_png(decode_rgb(tiny_face(0, 0), "")[:20, :20])
    (folder / "carl" / "1.png").write_bytes(smaller)
    with pytest.raises(ImageError, match=r"carl/1\.png has 20x20 pixels, expected 32x32: .*--other-sizes resize"):
        pack_all(folder, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    packed = pack_all(folder, tmp_path / "set", fit=Fit(SIZE, "resize", 95))
    changed = [i for i in range(len(packed)) if packed.encoded(i) != CONTENT[i][1]]
    assert [CONTENT[i][0] for i in changed] == ["carl"]
    assert decode_rgb(packed.encoded(changed[0]), "").shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_of_a_list(tmp_path: Path, folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file and one that is no image stop the run with the list's line and the file, and leave no set."""
    monkeypatch.setattr(fitting, "IMAGES_PER_BLOCK", 3)
    source = as_im2rec(folder)
    (folder / "carl" / "3.png").write_bytes(b"oops")
    with pytest.raises(ImageError, match=r"faces\.lst, line 8: .*carl/3\.png: its 4 bytes are no image"):
        pack_all(source, tmp_path / "set", workers=workers)
    (folder / "carl" / "3.png").unlink()
    with pytest.raises(FaceSetError, match=r"faces\.lst, line 8: .*carl/3\.png: No such file.*--image-root$"):
        pack_all(source, tmp_path / "set", workers=workers)
    with pytest.raises(FaceSetError, match=r"carl/3\.png: No such file or directory$"):
        pack(faces := open_source(source, folder), select(faces, PackConfig()), tmp_path / "set", FIT, workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_png_is_told_once(tmp_path: Path, folder: Path, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    """With its file, by this program; OpenCV's own warning names none, and would break the progress bar.

    The line that libpng itself writes about larger ones is not OpenCV's to keep back.
    """
    face = encode_png(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    (folder / "carl" / "3.png").write_bytes(face[: len(face) // 2])
    pack_all(folder, tmp_path / "set", fit=Fit(SIZE, "refuse", 95, bad_images="skip"), workers=workers)
    assert "carl/3.png" in (tmp_path / "set" / "left_out.csv").read_text()
    assert "incomplete" not in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_of_another_size_is_named(tmp_path: Path, folder: Path, workers: int) -> None:
    """The first one stops the run with its size and the ways out, also when a worker process found it: an error that
    cannot be sent from there looked like a lack of memory."""
    with pytest.raises(
        ImageError, match=r"ann.* has 32x32 pixels, expected 48x48: resize such images with --other-size"
    ):
        pack_all(folder, tmp_path / "set", fit=Fit(48, "refuse", 95), workers=workers)


@pytest.mark.parametrize(("kind", "title"), [(as_folders, "faces: 100%"), (as_csv, "lines of .*faces.csv: 100%")])
def test_a_bar_shows_how_far_large_sources_are_read(
    folder: Path,
    kind: Callable[[Path], Path],
    title: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Millions of folders or lines take minutes; small sources open without a word."""
    source = kind(folder)
    open_source(source)
    assert not capsys.readouterr().err
    monkeypatch.setattr(face_sets, "_FOLDERS_SHOWN", 1)
    monkeypatch.setattr(set_sources, "_SHOWN", 1)
    monkeypatch.setattr(set_sources, "_LINES_AT_ONCE", 1)
    assert len(open_source(source)) == sum(PEOPLE.values())
    assert re.search(title, capsys.readouterr().err)


@pytest.mark.parametrize("kind", [as_folders, as_face2rec, as_csv, as_rec])
def test_a_part_is_sent_to_workers_alone(folder: Path, kind: Callable[[Path], Path]) -> None:
    """It has the bytes, places and landmarks of its images, and nothing of the others."""
    faces = open_source(kind(folder))
    few = np.array([5, 2, 7])
    part = pickle.loads(pickle.dumps(faces.part(few)))
    for i, whole in enumerate(few.tolist()):
        assert (part.encoded(i), part.describe(i)) == (faces.encoded(whole), faces.describe(whole))
        if isinstance(faces, ListedFaceSet):
            assert part.is_aligned(i) == faces.is_aligned(whole)
            assert np.array_equal(part.landmarks(i), faces.landmarks(whole))
    large = faces.part(np.resize(np.arange(len(faces)), 5000))
    assert len(pickle.dumps(large.part(few))) == len(pickle.dumps(faces.part(few)))


def test_nothing_is_replaced(tmp_path: Path, folder: Path) -> None:
    """An output that is there already is left as it is."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="set exists and is not empty"):
        pack_all(folder, tmp_path / "set")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine.txt"]


PACK = """
import sys
from data import pack_set, resumable_set
resumable_set.SECONDS_BETWEEN_SAVES = 0.05
pack_set.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 2), (signal.SIGKILL, 0), (signal.SIGINT, 0)])
def test_killed_in_the_middle(tmp_path: Path, how: signal.Signals, workers: int) -> None:
    """A program that is killed while it writes leaves no set and no processes; the next run goes on to the same one."""
    with write_face_set(tmp_path / "source", SIZE) as out:
        for person in range(60):
            out.add_identity([tiny_face(person, 0)] * 200)
    source, output = str(tmp_path / "source"), str(tmp_path / "set")
    command = [sys.executable, "-c", PACK, "--source", source, "--output", output, "--image-size", str(SIZE)]
    program = subprocess.Popen(
        [*command, "--workers", str(workers)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A shell that runs the tests in the background makes them, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / ".set.partial" / ".journal.json").exists():
        assert program.poll() is None, "it must be caught while it writes"
        assert time.monotonic() < deadline, "it saves nothing"
        time.sleep(0.005)
    os.kill(program.pid, how)
    program.communicate(timeout=20)  # its output ends when the last of its processes does
    assert program.returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.partial", "source"]
    faces = open_source(tmp_path / "source")
    packed = pack(faces, select(faces, PackConfig()), tmp_path / "set", FIT, 0)
    assert 0 < packed.taken_over < packed.images
    for name in ("train.rec", "train.idx", "property"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{here}/set"], "name what to pack: --source A"),
        (["--source", "{here}/faces"], "name a folder for the set: --output B"),
        (["--source", "{here}/nothing", "--output", "{here}/set"], "nothing does not exist"),
        (["--source", "{here}", "--output", "{here}/set"], "has no folders of images"),
        (["--source", "{here}/faces", "--output", "{here}/set"], "anna/0.png has 32x32 pixels, expected 112x112"),
        (["--source", "{here}/faces", "--output", "{here}/set", "--identities", "@{here}/no"], "No such file"),
        (["--source", "{here}/faces", "--output", "{here}/faces/set"], "faces/set lies inside the set"),
    ],
)
def test_errors_on_the_command_line(tmp_path: Path, folder: Path, arguments: list[str], message: str) -> None:
    """A mistake ends the program with one line that says what is wrong, not with a traceback."""
    with pytest.raises(SystemExit) as error:
        main([argument.format(here=tmp_path) for argument in arguments] + ["--workers", "0"])
    assert str(error.value).startswith("pack_set: ")
    assert message in str(error.value)


def test_the_command_to_train_can_be_typed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line is a command for a shell, also where the name of the set has a blank and an apostrophe in it."""
    output = str(tmp_path / "Ann's set")
    main(["--source", str(folder), "--output", output, "--image-size", str(SIZE), "--workers", "0"])
    _, command = capsys.readouterr().out.splitlines()[-1].split(": ")
    assert shlex.split(command) == ["python", "train.py", "--data.root", output, "--data.image-size", str(SIZE)]


def test_one_person_alone_is_not_sent_to_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set of one identity, as one gathers it, is for merging: training would refuse it."""
    output = str(tmp_path / "set")
    main(["--source", str(folder), "--output", output, "--limit", "1", "--image-size", str(SIZE), "--workers", "0"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("training needs two identities or more: join it")


def test_the_summary_counts_new_bytes() -> None:
    """The last line says how many images were aligned or resized, and whether the rest is untouched."""
    assert summary(Packed(2, 9, 0), "a", "b") == "b: 9 images of 2 identities, byte for byte as in a"
    assert summary(Packed(2, 9, 9), "a", "b") == "b: 9 images of 2 identities, all aligned or resized"
    assert summary(Packed(2, 9, 4), "a", "b").endswith("4 of them aligned or resized, the rest byte for byte as in a")


def test_the_summary_tells_what_else_became_of_the_images() -> None:
    """What an interrupted run had packed is said, and what was left out, with the file that names it."""
    text = summary(Packed(2, 9, 0, taken_over=4, left_out_images=3, left_out_identities=1), "a", "b")
    assert "b: 9 images of 2 identities, byte for byte as in a" in text
    assert "4 of them taken over from an interrupted run" in text
    assert text.splitlines()[1:] == ["left out (left_out.csv): 3 images, and with them 1 identities"]


def test_script_from_another_directory(tmp_path: Path, folder: Path) -> None:
    """The program runs wherever it is called; paths of a list are relative to the list, or to --image-root."""
    source = written(tmp_path / "list.csv", "path,label\nanna/0.png,a\ncarl/2.png,c\n")
    flags = ["--source", source.name, "--image-root", "faces", "--output", "out/set", "--image-size", str(SIZE)]
    done = subprocess.run([sys.executable, SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out/set: 2 images of 2 identities, byte for byte as in list.csv" in done.stdout
    assert content(open_face_set(tmp_path / "out" / "set")) == [(0, tiny_face(0, 0)), (1, tiny_face(2, 2))]


def test_the_folder_one_is_in(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--source .` is the set that it stands for."""
    monkeypatch.chdir(folder)
    assert content(pack_all(Path(), tmp_path / "set")) == EXPECTED


def test_a_name_that_ends_in_a_blank_is_found(folder: Path) -> None:
    """In a list of names as `ls` writes it, blanks and all."""
    (folder / "bert").rename(folder / "bert ")
    names = written(folder / "names.txt", "bert \ncarl \n")
    assert names_of(PackConfig(identities=(f"@{names}",)), folder) == ["bert ", "carl"]
