"""Decoding in the main process (`data.decode` gpu): the same batches as the workers', whatever the device refuses."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data import jpeg_decoding
from data.face_sets import RecFaceSet, open_face_set
from data.images import ImageError, decode_face, decode_rgb, encode_jpeg, encode_png, plain_jpeg_size
from data.jpeg_decoding import decode_jpegs, decode_what_can_be, device_decoder, join_encoded
from data.loading import Batch, DecodedFaces, EpochBatches, training_loader
from data.orders import exact_order
from data.recordio import pack_image, write_records
from data.synthetic_faces import draw_face
from utils.settings import ConfigError

CPU = torch.device("cpu")
SIZE = 112
TORCHCODEC = importlib.util.find_spec("torchcodec") is not None


def encoded_faces() -> list[bytes]:
    """12 drawn faces, odd ones as PNG; 4 is smaller than the others; 7 and 8 are broken."""
    images = [(encode_png if i % 2 else encode_jpeg)(draw_face(i, 0)) for i in range(12)]
    images[4] = encode_jpeg(draw_face(4, 0)[:90, :90])
    images[7], images[8] = b"no picture", b"\xff\xd8\xff\xe0 no picture"
    return images


@pytest.fixture
def records(tmp_path: Path) -> RecFaceSet:
    """The faces as a set whose record 11, a JPEG, was damaged after it was opened."""
    with write_records(tmp_path / "train.rec") as writer:
        for key, image in enumerate(encoded_faces(), 1):
            writer.write(key, pack_image(float(key % 3), key, image))
    faces = RecFaceSet(tmp_path / "train.rec")
    with (tmp_path / "train.rec").open("r+b") as file:
        file.seek(int(faces._offsets[10]))
        file.write(b"gone")
    return faces


def loaded(records: RecFaceSet, decode: str, workers: int, resize: bool) -> list[Batch]:
    faces = DecodedFaces(records, records.labels, SIZE, resize, tolerant=True)
    batches = EpochBatches(partial(exact_order, 12, 1), 12, 4)
    return list(training_loader(faces, batches, workers, CPU, decode))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("device_decodes", [False, True])
def test_both_ways_give_the_same_batches(
    records: RecFaceSet, monkeypatch: pytest.MonkeyPatch, workers: int, resize: bool, device_decodes: bool
) -> None:
    """Pixels, labels and messages are those of decoding in the workers, in a device's way of decoding too: JPEGs of
    the right size from its decoder, PNGs, other sizes and what it refuses from OpenCV, broken ones labelled -1."""
    decoded_there = []

    def decode(jpegs: list[Tensor]) -> list[Tensor]:
        """As torchcodec does: channels first, and no result at all when one is refused."""
        sizes = [plain_jpeg_size(bytes(jpeg.numpy())) for jpeg in jpegs]
        assert sizes == [(SIZE, SIZE)] * len(jpegs), "no JPEG of the size, no need to try it"
        if any(bytes(jpeg.numpy()) == encode_jpeg(draw_face(2, 0)) for jpeg in jpegs):
            raise RuntimeError("refused")
        try:
            pixels = [decode_rgb(bytes(jpeg.numpy()), "") for jpeg in jpegs]
        except ImageError as error:
            raise RuntimeError("broken") from error
        decoded_there.extend(pixels)
        return [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]

    if device_decodes:
        monkeypatch.setattr(jpeg_decoding, "device_decoder", lambda device: decode)
    pairs = list(zip(loaded(records, "gpu", workers, resize), loaded(records, "cpu", workers, resize), strict=True))
    assert len(pairs) == 3
    for there, here in pairs:
        assert torch.equal(there.faces, here.faces)
        assert torch.equal(there.labels, here.labels)
        assert there.broken == here.broken
        assert there.faces.is_contiguous()
    labels = torch.cat([there.labels for there, _ in pairs])[torch.from_numpy(np.argsort(exact_order(12, 1, 0)))]
    assert torch.nonzero(labels == -1).flatten().tolist() == ([7, 8, 10] if resize else [4, 7, 8, 10])
    kept = [i for i in (0, 6) if device_decodes]  # those of 0, 2, 4, 6, 8 and 10 that it can decode
    assert len(decoded_there) >= len(kept)
    for i in kept:
        assert any(np.array_equal(image, decode_rgb(records.encoded(i), "")) for image in decoded_there)


def test_a_broken_image_is_an_error_when_none_is_expected(records: RecFaceSet) -> None:
    """Without `tolerant` it stops both ways, naming the record."""
    faces = DecodedFaces(records, records.labels, SIZE, resize=True)
    batches = EpochBatches(lambda epoch: np.arange(12), 12, 4)
    with pytest.raises(ImageError, match=r"train\.rec, record 8 at byte .* no image"):
        list(training_loader(faces, batches, 0, CPU, "gpu"))


def with_segment(jpeg: bytes, marker: bytes, content: bytes) -> bytes:
    """The JPEG with one more segment at its start."""
    return jpeg[:2] + b"\xff" + marker + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:]


TURNED = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"


def test_what_a_card_would_take_otherwise_than_opencv_is_not_given_to_it(
    records: RecFaceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture to be turned by its EXIF would lie on its side, one that was cut off would have grey in it, and one
    that claims 65500 x 65500 pixels would take the card's memory."""
    face = encode_jpeg(draw_face(0, 0))
    claim = face.index(b"\xff\xc0") + 5
    images = [
        face,
        with_segment(face, b"\xe1", TURNED),
        face[: len(face) // 2],
        face[:claim] + b"\xff\xdc\xff\xdc" + face[claim + 4 :],
    ]
    given_to_it: list[int] = []

    def decode(jpegs: list[Tensor]) -> list[Tensor]:
        given_to_it.append(len(jpegs))
        return [torch.from_numpy(decode_rgb(bytes(jpeg.numpy()), "")).permute(2, 0, 1) for jpeg in jpegs]

    monkeypatch.setattr(jpeg_decoding, "device_decoder", lambda device: decode)
    batch = join_encoded(images, range(4), SIZE, {}, partial(torch.empty, dtype=torch.uint8))
    faces, broken = decode_jpegs(batch, SIZE, CPU, False, str)
    assert given_to_it == [1]
    assert "was cut off" in broken[2]
    assert "claim to be a gigantic image" in broken[3]
    assert torch.equal(faces[1], faces[0].rot90(-1))


def test_a_size_is_told_only_where_all_headers_were_seen() -> None:
    """EXIF may come behind the frame's header, and say that the picture is to be turned."""
    face = encode_jpeg(draw_face(0, 0))
    scan = face.index(b"\xff\xda")
    exif = with_segment(face[:2], b"\xe1", TURNED)[2:]
    assert plain_jpeg_size(face) == (SIZE, SIZE)
    assert plain_jpeg_size(face[:scan] + exif + face[scan:]) is None


def test_faces_are_not_squashed() -> None:
    """Of another shape than the wanted one: that is an error with `resize` too, and a broken image in training."""
    wide = encode_png(draw_face(0, 0)[:90])
    with pytest.raises(ImageError, match=r"a face is 112x90 pixels: resizing it to a square would distort the face"):
        decode_face(wide, SIZE, True, "a face")
    batch = join_encoded([wide], [0], SIZE, {}, partial(torch.empty, dtype=torch.uint8))
    faces, broken = decode_jpegs(batch, SIZE, CPU, True, str)
    assert "distort" in broken[0]
    assert not faces.any()


@given(st.integers(1, 400), st.integers(1, 400), st.booleans(), st.booleans())
def test_the_size_in_a_jpeg_s_header(height: int, width: int, progressive: bool, commented: bool) -> None:
    """That of its pixels, whatever kind of JPEG, and with what may come before the header; no size for other bytes."""
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    jpeg = cv2.imencode(".jpg", np.zeros((height, width, 3), np.uint8), options)[1].tobytes()
    if commented:
        jpeg = with_segment(jpeg, b"\xfe", b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01")
    assert plain_jpeg_size(jpeg) == (width, height)
    assert plain_jpeg_size(jpeg[:-1]) is None
    assert plain_jpeg_size(with_segment(jpeg, b"\xe1", TURNED)) is None
    assert plain_jpeg_size(b"\xff\xd8\xff" + bytes(range(9)) + b"\xff\xd9") is None
    assert plain_jpeg_size(encode_png(np.zeros((4, 4, 3), np.uint8))) is None


@given(st.sets(st.integers(0, 19)), st.integers(1, 20))
def test_refused_images_are_found(refused: set[int], count: int) -> None:
    """Exactly the refused ones are None; a batch without any is decoded in one call."""
    calls = []

    def decode(images: list[Tensor]) -> list[Tensor]:
        calls.append(len(images))
        if any(int(image) in refused for image in images):
            raise RuntimeError("refused")
        return [image + 100 for image in images]

    found = decode_what_can_be(decode, [torch.tensor(i) for i in range(count)])
    assert [None if image is None else int(image) for image in found] == [
        None if i in refused else i + 100 for i in range(count)
    ]
    if not refused & set(range(count)):
        assert calls == [count]


def test_a_full_card_is_no_broken_image() -> None:
    """Running out of memory ends the step instead of being taken for a refusal."""

    def decode(images: list[Tensor]) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        decode_what_can_be(decode, [torch.zeros(1), torch.zeros(1)])


def test_what_to_install_is_said(records: RecFaceSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchcodec, decoding on a card is refused before training starts, naming setting and package."""
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    faces = DecodedFaces(records, records.labels, SIZE)
    batches = EpochBatches(partial(exact_order, 12, 1), 12, 4)
    with pytest.raises(ConfigError, match=r"data\.decode: gpu needs torchcodec .*pip install 'torchcodec>=0\.16'"):
        training_loader(faces, batches, 0, torch.device("cuda"), "gpu")
    assert device_decoder(CPU) is None


@pytest.mark.skipif(not (torch.cuda.is_available() and TORCHCODEC), reason="needs a CUDA card and torchcodec")
def test_cuda_agrees_with_opencv(face_data: Path) -> None:
    """Real JPEGs decoded by the card are OpenCV's pixels but for rounding; a PNG between them is exact."""
    faces = open_face_set(face_data / "faces_glint24")
    positions = list(range(0, 4194, 131))
    images = [faces.encoded(i) for i in positions]
    expected = np.stack([decode_rgb(image, "") for image in images])
    images[5] = encode_png(expected[5])
    images[6] = b"\xff\xd8\xff\xe0 no picture"
    expected[6] = 0
    batch = join_encoded(images, positions, 112, {}, partial(torch.empty, dtype=torch.uint8))
    decoded, broken = decode_jpegs(batch, 112, torch.device("cuda"), False, str)
    assert decoded.is_cuda
    assert list(broken) == [6]
    difference = np.abs(decoded.cpu().numpy().astype(int) - expected).mean((1, 2, 3))
    assert difference[5] == difference[6] == 0
    assert difference.max() < 2  # decoders differ in how they enlarge the colour planes
    swapped = cv2.cvtColor(expected[0], cv2.COLOR_RGB2BGR)
    assert np.abs(decoded[0].cpu().numpy().astype(int) - swapped).mean() > 5
