"""Photos without landmarks become aligned faces in sets and verification sets; those without a face are named."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from config import PackConfig
from conftest import ROOT
from data import fitting
from data.align import align
from data.detect import Detection, DetectorError
from data.face_sets import FaceSet, FaceSetError, open_face_set
from data.fitting import Fit, Fitted, LeftOut, check_detector, find_and_fit, fit_images
from data.images import ImageError, decode_rgb, encode_jpeg, encode_png
from data.pack_bin import main as pack_bin_main
from data.pack_bin import pack_bin
from data.pack_set import Packed, main, pack, select
from data.pair_lists import PairsError
from data.recordio import pack_image, write_records
from data.set_sources import LANDMARK_COLUMNS, open_source
from data.verification_bin import read_bin
from tiny_detectors import LANDMARKS, lookup_detector, red_block_detector
from tiny_faces import tiny_face
from utils.files import write_csv_atomic

SIZE = 32
INPUT = 128
# What the photo of each file shows: nothing, or the (column, row) of a red block, in blocks of 8x8 pixels.
PLACES: dict[str, tuple[int, int] | None] = {
    "1/a.png": (2, 1),
    "1/b.png": None,
    "1/c.png": (3, 2),
    "2/d.png": None,
    "2/e.png": None,
    "3/f.png": (9, 7),
}


def photo(seed: int, *places: tuple[int, int]) -> np.ndarray:
    """Grey noise of 128x96 with red blocks at the places of 8x8 pixels (column, row): uint8 RGB."""
    grey = np.random.default_rng(seed).integers(0, 256, (96, 128, 1), np.uint8).repeat(3, axis=2)
    for x, y in places:
        grey[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = (255, 0, 0)
    return grey


def aligned(image: np.ndarray, place: tuple[int, int]) -> bytes:
    return encode_jpeg(align(image, 8 * (LANDMARKS + place), SIZE), 95)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for seed, (name, place) in enumerate(PLACES.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode_png(photo(seed, *([place] if place else []))))
    return root


FACES = [
    (int(name[0]), aligned(photo(seed, place), place)) for seed, (name, place) in enumerate(PLACES.items()) if place
]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """A fit that finds red blocks."""
    return Fit(SIZE, "refuse", 95, Detection(red_block_detector(tmp_path / "net.onnx"), 0.5, INPUT, "largest"))


def as_folders(root: Path) -> Path:
    return root


def as_im2rec(root: Path) -> Path:
    return written(root / "a.lst", "".join(f"{i}\t{name[0]}\t{name}\n" for i, name in enumerate(PLACES)))


def as_face2rec(root: Path) -> Path:
    """Not aligned, without landmarks, some with a box."""
    lines = [f"0\t{name}\t{name[0]}" + "\t0\t0\t9\t9" * (i % 2) + "\n" for i, name in enumerate(PLACES)]
    return written(root / "a.lst", "".join(lines))


def as_csv(root: Path) -> Path:
    return written(root / "a.csv", "path,label\n" + "".join(f"{name},{name[0]}\n" for name in PLACES))


def as_records(root: Path) -> Path:
    with write_records(root / "a.rec") as writer:
        for key, name in enumerate(PLACES):
            writer.write(key, pack_image(float(name[0]), key, (root / name).read_bytes()))
    return root / "a.rec"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def packed_from(source: Path, output: Path, fit: Fit, workers: int = 0) -> Packed:
    faces = open_source(source, detected=True)
    return pack(faces, select(faces, PackConfig()), output, fit, workers)


def content(faces: FaceSet) -> list[tuple[int, bytes]]:
    return [(int(faces.labels[i]), faces.encoded(i)) for i in range(len(faces))]


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [as_folders, as_im2rec, as_face2rec, as_csv, as_records])
def test_every_source_of_photos(
    tmp_path: Path,
    photos: Path,
    fit: Fit,
    kind: Callable[[Path], Path],
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Faces are aligned by what the detector finds; photos and people without any are left out, counted and named."""
    monkeypatch.setattr(fitting, "PHOTOS_PER_BLOCK", 2)
    source = kind(photos)
    packed = packed_from(source, tmp_path / "set", fit, workers)
    label = {1: 0, 3: 1}
    assert content(open_face_set(tmp_path / "set")) == [(label[person], image) for person, image in FACES]
    assert (packed.identities, packed.images, packed.changed) == (2, 3, 3)
    assert (packed.left_out_images, packed.left_out_identities) == (3, 1)
    assert rows(tmp_path / "set" / "packed.csv")[1:] == [["0", "1", "2"], ["1", "3", "1"]]
    left_out = rows(tmp_path / "set" / "left_out.csv")
    faces = open_source(source, detected=True)
    missed = [(i, name) for i, (name, place) in enumerate(PLACES.items()) if not place]
    assert left_out[1:-1] == [[name[0], faces.describe(i), "no face found in its 128x96 pixels"] for i, name in missed]
    assert left_out[-1] == ["2", "", "not one of its 2 images is left"]


def test_lfw_photos(tmp_path: Path, face_data: Path) -> None:
    """60 photos with a detector that points to their landmarks give the bytes that the landmarks in a CSV give."""
    raw = face_data / "lfw_raw"
    lines = sorted(rows(raw / "landmarks.csv")[1:])
    colours, anchors, points = [], [], []
    scale = 320 / 250
    for line in lines:
        image = decode_rgb((raw / line[0]).read_bytes(), line[0])
        assert image.shape == (250, 250, 3)
        colours.append((cv2.resize(image, (320, 320)).astype(np.float64).mean(axis=(0, 1)) - 127.5) / 128)
        points.append(np.array(line[2:], np.float32).reshape(5, 2).astype(np.float64) * scale)
        x, y = points[-1][2] // 8  # offsets from a place near the face are exact enough to give the CSV's float32
        anchors.append(int(y * 40 + x))
        folder = tmp_path / "photos" / line[1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / line[0]).symlink_to(raw / line[0])
    net = lookup_detector(tmp_path / "net.onnx", 320, np.array(colours), np.array(anchors), np.array(points))
    write_csv_atomic(tmp_path / "listed.csv", ("path", "name", *LANDMARK_COLUMNS), lines)
    listed = open_source(tmp_path / "listed.csv", raw)
    pack(listed, select(listed, PackConfig()), tmp_path / "listed", Fit(112, "refuse", 95), 0)
    packed = packed_from(
        tmp_path / "photos", tmp_path / "found", Fit(112, "refuse", 95, Detection(net, 0.9, 640, "largest")), 2
    )
    assert (packed.images, packed.changed, packed.left_out_images) == (60, 60, 0)
    found = (tmp_path / "found" / "train.rec").read_bytes()
    assert found == (tmp_path / "listed" / "train.rec").read_bytes()


def test_what_the_list_says_comes_first(tmp_path: Path, photos: Path, fit: Fit) -> None:
    """A face that face2rec calls aligned keeps its bytes, landmarks of a list are used, the rest is looked for."""
    (photos / "crop.png").write_bytes(tiny_face(0, 0))
    points = 8 * (LANDMARKS + np.array([5, 4]))
    numbers = "\t".join(map(str, points.T.ravel()))
    as_list = f"1\tcrop.png\t0\n0\t1/a.png\t1\n0\t1/c.png\t2\t0\t0\t9\t9\t{numbers}\n"
    packed_from(written(photos / "a.lst", as_list), tmp_path / "set", fit)
    expected = [(0, tiny_face(0, 0)), (1, FACES[0][1]), (2, aligned(photo(2, (3, 2)), (5, 4)))]
    assert content(open_face_set(tmp_path / "set")) == expected
    header = f"path,label,{','.join(LANDMARK_COLUMNS)}\n"
    as_csv = f"{header}1/c.png,2,{','.join(map(str, points.ravel()))}\n1/a.png,1{',' * 10}\n"
    packed_from(written(photos / "a.csv", as_csv), tmp_path / "from_csv", fit)
    assert [image for _, image in content(open_face_set(tmp_path / "from_csv"))] == [image for _, image in expected[1:]]


@pytest.mark.parametrize("choice", ["largest", "central"])
def test_one_of_several_faces(tmp_path: Path, choice: str) -> None:
    """The command line's --face decides; boxes of equal size: the largest is then the first by score."""
    image = photo(0, (5, 7), (8, 4))
    image[32:40, 64:72] = (200, 0, 0)  # a lower score, and the box nearer to the centre, which is (64, 48)
    (tmp_path / "photos" / "ann").mkdir(parents=True)
    (tmp_path / "photos" / "ann" / "1.png").write_bytes(encode_png(image))
    flags = {"source": "photos", "output": "set", "detector": "net.onnx", "face": choice, "workers": "0"}
    sizes = {"image-size": str(SIZE), "detector-size": str(INPUT)}
    red_block_detector(tmp_path / "net.onnx")
    arguments = [text for name, value in {**flags, **sizes}.items() for text in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, ROOT / "data" / "pack_set.py", *arguments], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    place = (8, 4) if choice == "central" else (5, 7)
    assert content(open_face_set(tmp_path / "set")) == [(0, aligned(image, place))]


def test_flags_of_the_detector(tmp_path: Path, photos: Path) -> None:
    """--detector-threshold, --detector-size and --smallest-face reach the detector: too high a score, too small an
    input, and too small a face, miss."""
    red_block_detector(tmp_path / "net.onnx")
    start = ["--source", str(photos), "--detector", str(tmp_path / "net.onnx"), "--image-size", str(SIZE)]
    start += ["--workers", "0", "--output", str(tmp_path / "set")]
    with pytest.raises(SystemExit, match=r"not one of 6 images can be packed.*a\.png: no face found"):
        main([*start, "--detector-size", "128", "--detector-threshold", "0.999"])
    with pytest.raises(SystemExit, match="not one of 6 images can be packed"):
        main([*start, "--detector-size", "32"])
    assert not (tmp_path / "set").exists()
    with pytest.raises(SystemExit, match="not one of 6 images can be packed"):
        main([*start, "--detector-size", "128", "--smallest-face", "33"])  # the boxes have 4 x 6 blocks of 8 pixels
    main([*start, "--detector-size", "128", "--detector-threshold", "0.99", "--smallest-face", "32"])
    assert len(open_face_set(tmp_path / "set")) == len(FACES)


def test_landmarks_outside_of_the_photo(fit: Fit) -> None:
    """A face of which almost nothing is in the picture is left out with the reason; bytes that are no image raise."""
    assert fit.detection is not None
    detector = fitting.FaceDetector(fit.detection.path, 0.5, INPUT)
    out = find_and_fit(encode_png(photo(0, (15, 3))), "x.png", fit, detector, "largest")
    assert out == LeftOut("x.png", "the landmarks, around (136, 44), lie outside of its 128x96")
    found = find_and_fit(encode_png(photo(0, (13, 3))), "x.png", fit, detector, "largest")
    assert found == Fitted(aligned(photo(0, (13, 3)), (13, 3)), True)
    with pytest.raises(ImageError, match=r"x\.png: its 4 bytes are no image"):
        find_and_fit(b"oops", "x.png", fit, detector, "largest")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_detector_is_told(tmp_path: Path, photos: Path, workers: int) -> None:
    """What is wrong with the detector comes out of the worker processes as it is, and there is no set."""
    fit = Fit(SIZE, "refuse", 95, Detection(tmp_path / "no.onnx", 0.5, INPUT, "largest"))
    with pytest.raises(DetectorError, match=r"there is no detector at .*no\.onnx"):
        packed_from(photos, tmp_path / "set", fit, workers)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_each_call_has_its_own_detector(tmp_path: Path, photos: Path, fit: Fit) -> None:
    """A second call in the same process does not look with the detector of the first."""
    assert fit.detection is not None
    blind = Fit(SIZE, "refuse", 95, Detection(fit.detection.path, 0.999, INPUT, "largest"))
    faces = open_source(photos)
    counts = [
        sum(isinstance(image, Fitted) for image in fit_images(faces, np.arange(len(faces)), chosen, 0))
        for chosen in (fit, blind, fit)
    ]
    assert counts == [3, 0, 3]


def test_face2rec_needs_landmarks_or_a_detector(tmp_path: Path, photos: Path) -> None:
    """Without a detector, a face that is neither aligned nor has landmarks is refused, with what to do."""
    source = as_face2rec(photos)
    message = r"a\.lst, line 1: the face is not aligned .*--detector, or write 1"
    with pytest.raises(FaceSetError, match=message):
        open_source(source)
    with pytest.raises(SystemExit, match=message):
        main(["--source", str(source), "--output", str(tmp_path / "set"), "--workers", "0"])


@pytest.mark.parametrize("workers", [0, 2])
def test_verification_set_of_photos(tmp_path: Path, photos: Path, fit: Fit, workers: int) -> None:
    """Pairs of photos become pairs of aligned faces, in order; those without a face are an error that names them."""
    header = "path1,path2,same\n"
    pairs = written(tmp_path / "pairs", f"{header}1/a.png,1/c.png,1\n3/f.png,1/a.png,0\n")
    assert pack_bin(pairs, photos, tmp_path / "a.bin", fit, workers) == (2, 1)
    found = read_bin(tmp_path / "a.bin")
    images = [image for _, image in FACES]
    assert [found.images[i] for i in found.index.ravel()] == [images[0], images[1], images[2], images[0]]
    pairs = written(tmp_path / "pairs", f"{header}1/a.png,1/b.png,1\n3/f.png,2/e.png,0\n2/d.png,2/e.png,1\n")
    with pytest.raises(PairsError) as error:
        pack_bin(pairs, photos, tmp_path / "b.bin", fit, workers)
    first, *missed = str(error.value).splitlines()
    assert first.startswith("no face was found in 3 of 5 images: lower --detector-threshold")
    assert missed == [
        f"  {pairs}, line {line}: {photos / name}: no face found in its 128x96 pixels"
        for line, name in ((2, "1/b.png"), (3, "2/e.png"), (4, "2/d.png"))
    ]
    assert not (tmp_path / "b.bin").exists()


def test_verification_set_from_the_command_line(tmp_path: Path, photos: Path) -> None:
    """pack_bin has the same flags."""
    (photos / "1" / "two.png").write_bytes(encode_png(photo(9, (0, 0), (7, 4))))
    red_block_detector(tmp_path / "net.onnx")
    written(tmp_path / "pairs", "path1,path2,same\n1/a.png,1/two.png,1\n")
    flags = {"pairs": "pairs", "images": "photos", "detector": "net.onnx", "output": "a.bin"}
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(tmp_path / value))]
    arguments += ["--image-size", str(SIZE), "--detector-size", "128", "--face", "central", "--workers", "0"]
    with pytest.raises(SystemExit, match="no face was found in 2 of 2 images"):
        pack_bin_main([*arguments, "--smallest-face", "33"])
    with pytest.raises(SystemExit, match="no face was found in 2 of 2 images"):
        pack_bin_main([*arguments, "--detector-threshold", "0.999"])
    pack_bin_main([*arguments, "--detector-threshold", "0.99"])
    assert read_bin(tmp_path / "a.bin").images == [FACES[0][1], aligned(photo(9, (0, 0), (7, 4)), (7, 4))]


def test_a_detector_is_tried_before_the_first_image(tmp_path: Path) -> None:
    """A file that is no detector is an error at once, also where no image has needed it yet."""
    (tmp_path / "x.onnx").write_text("not onnx")
    with pytest.raises(DetectorError, match=r"x\.onnx"):
        check_detector(Fit(112, "refuse", 95, Detection(tmp_path / "x.onnx", 0.5, 640, "largest")))
