"""The detector: SCRFD's outputs become boxes and landmarks in pixels of the photo, for every layout of such files."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest

from conftest import ROOT
from data.detect import (
    DetectorError,
    Face,
    FaceDetector,
    anchor_centres,
    choose_face,
    scale_into,
    without_overlaps,
)
from tiny_detectors import ANCHORS, BOX, LANDMARKS, STRIDES, linear_detector, random_weights, red_block_detector

RED = np.array([255, 0, 0], np.uint8)


def random_photo(height: int, width: int) -> np.ndarray:
    blocks = np.random.default_rng([height, width]).integers(0, 256, (9, 11, 3), np.uint8)
    return cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boxes, their corners being whole pixels of them."""
    common = np.maximum(0, np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]) + 1).prod()
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (first, second)]
    return float(common / (sum(areas) - common))


def by_definition(
    photo: np.ndarray, weights: list[np.ndarray], biases: list[np.ndarray], height: int, width: int, threshold: float
) -> list[Face]:
    """What a linear detector finds, place by place, in float64."""
    own_height, own_width = photo.shape[:2]
    ratio = min(height / own_height, width / own_width)
    new_height, new_width = int(own_height * ratio + 1e-9), int(own_width * ratio + 1e-9)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:new_height, :new_width] = cv2.resize(photo, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    inputs = (pixels.astype(np.float64) - 127.5) / 128
    scale = np.array([new_width / own_width, new_height / own_height])
    levels = len(weights)
    anchors = ANCHORS[levels]
    faces = []
    for stride, weight, bias in zip(STRIDES[levels], weights, biases, strict=True):
        for y in range(0, height, stride):
            for x in range(0, width, stride):
                out = weight @ inputs[y : y + stride, x : x + stride].mean(axis=(0, 1)) + bias
                for anchor in range(anchors):
                    left, top, right, bottom = stride * out[anchors:][4 * anchor : 4 * anchor + 4]
                    points = np.array([x, y]) + stride * out[5 * anchors :][10 * anchor : 10 * anchor + 10].reshape(
                        5, 2
                    )
                    corners = np.array([(x - left, y - top), (x + right, y + bottom)]) / scale
                    if out[anchor] >= threshold:
                        faces.append(Face(corners.ravel(), out[anchor], points / scale))
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if all(overlap(face.box, other.box) <= 0.4 for other in kept):
            kept.append(face)
    assert 3 < len(kept) < len(faces), "the picture must try suppression"
    return kept


@pytest.mark.parametrize("batched", [False, True], ids=["rows", "leading 1"])
@pytest.mark.parametrize(
    ("levels", "height", "width", "fixed"),
    [(3, 128, 128, False), (3, 128, 128, True), (3, 64, 160, True), (5, 256, 256, False), (5, 128, 256, True)],
)
@pytest.mark.parametrize("photo", [(112, 112), (301, 207), (90, 233)], ids=lambda shape: "x".join(map(str, shape)))
def test_every_layout_as_defined(
    tmp_path: Path, levels: int, height: int, width: int, photo: tuple[int, int], fixed: bool, batched: bool
) -> None:
    """9 and 15 outputs, with and without leading 1, of fixed and open size: all faces equal the plain formula's.

    The net's answers depend on each colour, so this holds the order of colours, normalisation, scaling, padding, order
    of anchors and outputs, decoding and suppression.
    """
    weights, biases = random_weights(levels)
    path = linear_detector(tmp_path / "net.onnx", weights, biases, (height, width) if fixed else ("h", "w"), batched)
    detector = FaceDetector(path, 0.6, 992 if fixed else height)
    found = detector.detect(random_photo(*photo))
    expected = by_definition(random_photo(*photo), weights, biases, height, width, 0.6)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-5)
        np.testing.assert_allclose(ours.box, theirs.box, atol=2e-3)
        np.testing.assert_allclose(ours.landmarks, theirs.landmarks, atol=2e-3)
    assert ours.box.dtype == ours.landmarks.dtype == np.float32
    assert ours.landmarks.shape == (5, 2)


@pytest.mark.parametrize("scale", [0.5, 1, 2])
@pytest.mark.parametrize("landscape", [True, False])
def test_one_face_by_hand(tmp_path: Path, scale: float, landscape: bool) -> None:
    """The box and landmarks of a face at a known place, in pixels of a photo that is shrunk, kept or enlarged."""
    long, short = int(128 / scale), int(64 / scale)
    photo = np.zeros((short, long, 3) if landscape else (long, short, 3), np.uint8)
    pixels = int(8 / scale)
    photo[pixels : 2 * pixels, 2 * pixels : 3 * pixels] = RED
    (face,) = FaceDetector(red_block_detector(tmp_path / "net.onnx"), 0.5, 128).detect(photo)
    assert np.array_equal(face.box, np.array([16 - 8, 8 - 16, 16 + 24, 8 + 32]) / scale)
    assert np.array_equal(face.landmarks, ((16, 8) + 8 * LANDMARKS) / scale)
    assert (BOX * 8).tolist() == [8, 16, 24, 32]
    assert face.score == pytest.approx(127.5 / 128, abs=1e-6) or scale == 2  # enlarged red has soft edges


def test_scaling_and_padding() -> None:
    """The photo fills one side, cut to whole pixels on the other, up and left; the scale is what was really done."""
    photo = random_photo(33, 100)
    pixels, scale = scale_into(photo, 128, 128)
    assert np.array_equal(pixels[:42], cv2.resize(photo, (128, 42)))
    assert not pixels[42:].any()
    assert scale.tolist() == [128 / 100, 42 / 33]
    pixels, scale = scale_into(photo.transpose(1, 0, 2), 96, 160)
    assert np.array_equal(pixels[:, :31], cv2.resize(photo.transpose(1, 0, 2), (31, 96)))
    assert not pixels[:, 31:].any()
    assert scale.tolist() == [31 / 33, 96 / 100]
    pixels, scale = scale_into(np.full((1, 500, 3), 9, np.uint8), 64, 64)
    assert pixels[0].min() == 9
    assert not pixels[1:].any()
    assert scale.tolist() == [64 / 500, 1]


def test_anchors_lie_in_rows() -> None:
    """Places in rows from the upper left, anchors of a place in turn; a side that is no multiple counts as longer."""
    expected = [(x, y) for y in (0, 16) for x in (0, 16, 32) for _ in range(2)]
    assert anchor_centres(32, 48, 16, 2).tolist() == [list(map(float, place)) for place in expected]
    assert anchor_centres(320, 192, 128, 1).tolist() == [[x, y] for y in (0, 128, 256) for x in (0, 128)]


def test_suppression() -> None:
    """Of overlapping boxes the best stays; one that is dropped drops no other; an overlap of 0.4 is allowed."""
    boxes = np.array([(0, 0, 9, 4), (0, 0, 9, 9), (0, 0, 9, 3), (50, 50, 59, 59), (51, 50, 60, 59)], np.float64)
    assert without_overlaps(boxes, np.array([0.8, 0.9, 0.7, 0.5, 0.6])) == [1, 2, 4]
    assert without_overlaps(boxes, np.array([0.9, 0.8, 0.7, 0.6, 0.6])) == [0, 3]
    chain = np.array(
        [(0, 0, 9, 9), (3, 0, 12, 9), (6, 0, 15, 9)], np.float64
    )  # 0.54 with the next, 0.25 from end to end
    assert without_overlaps(chain, np.array([0.9, 0.8, 0.7])) == [0, 2]
    assert without_overlaps(np.empty((0, 4)), np.empty(0)) == []


def test_choice() -> None:
    """Largest by the area of the box, most central by the middle of the box, whatever the order and the scores."""
    zeros = np.zeros((5, 2), np.float32)
    large = Face(np.array([0, 0, 50, 40], np.float32), 0.6, zeros)
    central = Face(np.array([90, 40, 110, 60], np.float32), 0.7, zeros)
    near = Face(np.array([60, 30, 100, 70], np.float32), 0.9, zeros + 50)
    for faces in ([large, central, near], [near, central, large]):
        assert choose_face(faces, 100, 200, "largest") is large
        assert choose_face(faces, 100, 200, "central") is central


def test_threshold(tmp_path: Path) -> None:
    """A score that equals the threshold is enough, the next smaller one is not."""
    path = red_block_detector(tmp_path / "net.onnx", constant_score=0.75)
    black = np.zeros((64, 64, 3), np.uint8)
    assert {face.score for face in FaceDetector(path, 0.75, 64).detect(black)} == {0.75}
    assert FaceDetector(path, float(np.nextafter(0.75, 1)), 64).detect(black) == []


def test_no_face(tmp_path: Path) -> None:
    """A photo without a face gives an empty list, whatever its shape."""
    detector = FaceDetector(red_block_detector(tmp_path / "net.onnx"), 0.5, 64)
    for shape in ((64, 64), (1, 300), (300, 1), (1, 1)):
        assert detector.detect(np.full((*shape, 3), 255, np.uint8)) == []


def test_stated_output_sizes_do_not_matter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Files exported at one input size state its output sizes and run at others; nothing is printed about it."""
    model = onnx.load(red_block_detector(tmp_path / "net.onnx", constant_score=0.75))
    for output in model.graph.output:
        for extent in (7, 1):
            output.type.tensor_type.shape.dim.add().dim_value = extent
    onnx.save(model, tmp_path / "net.onnx")
    assert FaceDetector(tmp_path / "net.onnx", 0.5, 64).detect(np.zeros((64, 64, 3), np.uint8))
    assert capfd.readouterr() == ("", "")


def without_outputs(path: Path, kept: int) -> Path:
    model = onnx.load(path)
    del model.graph.output[kept:]
    onnx.save(model, path)
    return path


def swapped_outputs(path: Path) -> Path:
    model = onnx.load(path)
    names = [output.name for output in model.graph.output]
    for output, name in zip(model.graph.output, names[3:] + names[:3], strict=True):
        output.name = name
    onnx.save(model, path)
    return path


def with_size_inside(path: Path, size: int) -> Path:
    """The net with a step that fits one size only, while its input promises any."""
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 3, size, size), np.float32), "zeros"))
    for node in model.graph.node:
        node.input[:] = ["sum" if name == "image" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Add", ["image", "zeros"], ["sum"]))
    onnx.save(model, path)
    return path


def with_input(path: Path, kind: int, shape: tuple[int, ...]) -> Path:
    weights, biases = random_weights(3)
    model = onnx.load(linear_detector(path, weights, biases))
    tensor = model.graph.input[0].type.tensor_type
    for dimension, value in zip(tensor.shape.dim, shape, strict=True):
        dimension.dim_value = value
    if kind != onnx.TensorProto.FLOAT:
        tensor.elem_type = kind
        model.graph.node.insert(0, onnx.helper.make_node("Cast", ["image"], ["image_float"], to=onnx.TensorProto.FLOAT))
        for node in model.graph.node[1:]:
            node.input[:] = ["image_float" if name == "image" else name for name in node.input]
    onnx.save(model, path)
    return path


BAD_FILES = {
    "nothing": (lambda path: path, "there is no detector at .*net.onnx"),
    "no ONNX": (lambda path: [path.write_bytes(b"oops"), path][1], "onnxruntime cannot run .*net.onnx"),
    "no landmarks": (
        lambda path: without_outputs(red_block_detector(path), 6),
        r"boxes without landmarks \(6 outputs\): .*SCRFD with key points",
    ),
    "other outputs": (
        lambda path: without_outputs(red_block_detector(path), 1),
        "has 1 inputs and 1 outputs: an SCRFD with key points has one input and 9 or 15",
    ),
    "order of outputs": (
        lambda path: swapped_outputs(red_block_detector(path)),
        r"an output for 64x64 pixels has the shape \[128, 4\], expected \[128, 1\]",
    ),
    "batch": (
        lambda path: with_input(path, onnx.TensorProto.FLOAT, (8, 3, 64, 64)),
        r"takes tensor\(float\) of shape \[8, 3, 64, 64\]: expected float \[1, 3, height, width\]",
    ),
    "gigantic": (
        lambda path: with_input(path, onnx.TensorProto.FLOAT, (1, 3, 10**6, 64)),
        r"of shape \[1, 3, 1000000, 64\]: expected float \[1, 3, height, width\], of 1 to 8,192 pixels",
    ),
    "no pixels": (
        lambda path: with_input(path, onnx.TensorProto.FLOAT, (1, 3, 64, 0)),
        r"of shape \[1, 3, 64, 0\]: expected float \[1, 3, height, width\], of 1 to 8,192 pixels",
    ),
    "bytes": (lambda path: with_input(path, onnx.TensorProto.UINT8, (1, 3, 64, 64)), r"takes tensor\(uint8\) of"),
    "another size inside": (
        lambda path: with_size_inside(red_block_detector(path), 48),
        r"net\.onnx cannot run on 64x64 pixels \(--detector-size\)",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_files_that_are_no_detector(tmp_path: Path, make, message: str) -> None:
    """Each says which file it is, what was found and what is expected."""
    with pytest.raises(DetectorError, match=message):
        FaceDetector(make(tmp_path / "net.onnx"), 0.5, 64).detect(np.zeros((64, 64, 3), np.uint8))


def test_onnxruntime_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not imported before a detector is opened; without it the message says what to install."""
    code = "import sys, data.fitting, data.pack_bin; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DetectorError, match=r"net\.onnx: finding faces .* pip install onnxruntime"):
        FaceDetector(red_block_detector(tmp_path / "net.onnx"))


def test_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector computes on one thread: there is one in each process, and a process for each core."""
    given = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: onnxruntime.SessionOptions, **more: object) -> None:
            given.append((options.intra_op_num_threads, options.inter_op_num_threads))
            super().__init__(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    FaceDetector(red_block_detector(tmp_path / "net.onnx"))
    assert given == [(1, 1)]
