"""Loading: the order of faces, where it can be entered, the pixels, and what a broken image says."""

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.face_sets import RecFaceSet, open_face_set
from data.images import ImageError, encode_png
from data.loading import DecodedFaces, EpochBatches, flips, sequential_loader, to_network_input, training_loader
from data.orders import exact_order
from data.recordio import IndexedRecordWriter, pack_image

CPU = torch.device("cpu")
SIZE = 16
IMAGES = 23


def picture(key: int) -> np.ndarray:
    """An RGB image of its own for each key."""
    return np.random.default_rng(key).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def write_set(folder: Path, broken: dict[int, bytes] | None = None) -> RecFaceSet:
    images = {key: encode_png(picture(key)) for key in range(1, IMAGES + 1)} | (broken or {})
    with IndexedRecordWriter(folder / "train.rec") as writer:
        for key, image in images.items():
            writer.write(key, pack_image(float(key % 5), key, image))
    return RecFaceSet(folder / "train.rec")


@pytest.fixture
def faces(tmp_path: Path) -> DecodedFaces:
    """23 faces of 5 identities."""
    records = write_set(tmp_path)
    return DecodedFaces(records, records.labels, SIZE)


# --- order ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 50))
def test_an_epoch_is_a_permutation(images: int, batch_size: int, seed: int, epoch: int) -> None:
    """Every image at most once, all but the incomplete last batch, in full batches, the same each time."""
    batches = EpochBatches(partial(exact_order, images, seed), images, batch_size)
    batches.start_at(epoch, 0)
    order = list(batches)
    seen = [i for batch in order for i in batch]
    assert len(seen) == len(set(seen)) == images - images % batch_size
    assert set(seen) <= set(range(images))
    assert all(len(batch) == batch_size for batch in order)
    assert len(order) == len(batches) == batches.batches == images // batch_size
    again = EpochBatches(partial(exact_order, images, seed), images, batch_size)
    again.start_at(epoch, 0)
    assert list(again) == order


@given(st.integers(0, 3), st.integers(0, 12))
def test_entering_an_epoch_midway(epoch: int, first: int) -> None:
    """From batch k on, the batches are those that a whole epoch has from k on: resuming repeats and skips nothing."""
    batches = EpochBatches(partial(exact_order, 64, 3), 64, 5)
    batches.start_at(epoch, 0)
    whole = list(batches)
    batches.start_at(epoch, first)
    assert list(batches) == whole[first:]
    assert len(batches) == len(whole) - first


def test_seed_and_epoch_decide_the_order() -> None:
    """Another epoch or seed is another order; seed and epoch do not stand for each other."""

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = EpochBatches(partial(exact_order, 100, seed), 100, 10)
        batches.start_at(epoch, 0)
        return tuple(i for batch in batches for i in batch)

    orders = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(100)) not in orders


def test_order_does_not_depend_on_global_generators() -> None:
    """Random numbers drawn elsewhere change nothing."""
    batches = EpochBatches(partial(exact_order, 50, 0), 50, 10)
    first = list(batches)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert list(batches) == first


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_flips_are_decided_by_their_arguments(seed: int, epoch: int, batch: int) -> None:
    """The same arguments, the same flips; of many faces about half; no two neighbouring batches alike."""
    flipped = flips(seed, epoch, batch, 400)
    assert flipped.dtype == torch.bool
    assert flipped.shape == (400,)
    assert torch.equal(flipped, flips(seed, epoch, batch, 400))
    assert 120 < flipped.sum() < 280
    for other in ((seed + 1, epoch, batch), (seed, epoch + 1, batch), (seed, epoch, batch + 1)):
        assert not torch.equal(flipped, flips(*other, 400))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_pixels_are_what_opencv_decodes(faces: DecodedFaces) -> None:
    """uint8, height x width x RGB, with the labels of the same images."""
    pixels, labels, _ = faces.__getitems__([4, 0, 22])
    assert pixels.dtype == torch.uint8
    assert labels.dtype == torch.int64
    for row, key in enumerate((5, 1, 23)):
        bgr = cv2.imdecode(np.frombuffer(faces.images.encoded(key - 1), np.uint8), cv2.IMREAD_COLOR)
        assert np.array_equal(pixels[row], bgr[:, :, ::-1])
        assert np.array_equal(pixels[row], picture(key))
        assert labels[row] == key % 5


def test_real_faces(face_data: Path) -> None:
    """JPEGs of a real set, by the record keys, as OpenCV decodes them."""
    records = open_face_set(face_data / "faces_glint24")
    pixels, labels, _ = DecodedFaces(records, records.labels, 112).__getitems__([0, 2000, 4193])
    for row, i in enumerate((0, 2000, 4193)):
        bgr = cv2.imdecode(np.frombuffer(records.encoded(i), np.uint8), cv2.IMREAD_COLOR)
        assert np.array_equal(pixels[row], bgr[:, :, ::-1])
    assert labels.tolist() == records.labels[[0, 2000, 4193]].tolist()


def test_workers_make_no_difference(faces: DecodedFaces) -> None:
    """Over two epochs, the second entered midway, no worker and two give the same batches in the same order."""
    seen = []
    for workers in (0, 2):
        batches = EpochBatches(partial(exact_order, len(faces), 7), len(faces), 4)
        loader = training_loader(faces, batches, workers, CPU)
        epochs = []
        for epoch, first in ((0, 0), (1, 2)):
            batches.start_at(epoch, first)
            epochs.append([(pixels.numpy().tobytes(), labels.tolist()) for pixels, labels, _ in loader])
        seen.append(epochs)
    assert seen[0] == seen[1]
    assert [len(epoch) for epoch in seen[0]] == [5, 3]
    batches = EpochBatches(partial(exact_order, len(faces), 7), len(faces), 4)
    assert seen[0][0][0][1] == [(i + 1) % 5 for i in next(iter(batches))]


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential_loader(faces: DecodedFaces, workers: int) -> None:
    """Testing goes through all faces once, in order, the last batch as large as it is."""
    loaded = list(sequential_loader(faces, 10, workers, CPU))
    assert [len(batch.labels) for batch in loaded] == [10, 10, 3]
    pixels = torch.cat([batch.faces for batch in loaded])
    assert all(np.array_equal(pixels[key - 1], picture(key)) for key in range(1, IMAGES + 1))
    assert torch.cat([batch.labels for batch in loaded]).tolist() == faces.labels.tolist()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"\xff\xd8\xff\xe0 no picture", r"its 15 bytes are no image"),
        (encode_png(np.zeros((SIZE, SIZE + 1, 3), np.uint8)), r"is 17x16 pixels, expected 16x16: .*data\.image_size"),
    ],
    ids=["broken", "wrong size"],
)
def test_unusable_images_are_named(tmp_path: Path, workers: int, image: bytes, message: str) -> None:
    """Through a worker process too, the error says which record of which file, and where."""
    records = write_set(tmp_path, {9: image})
    loader = sequential_loader(DecodedFaces(records, records.labels, SIZE), 5, workers, CPU)
    where = rf"train\.rec, record 9 at byte {records._offsets[8]}:? "
    with pytest.raises(ImageError, match=where + message):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tolerant_loader_labels_broken_images(tmp_path: Path, workers: int) -> None:
    """In training a broken image is a row of zeros that no loss counts, with a message that names it."""
    records = write_set(tmp_path, {9: b"no picture", 12: encode_png(np.zeros((4, 4, 3), np.uint8))})
    faces = DecodedFaces(records, records.labels, SIZE, tolerant=True)
    batches = list(sequential_loader(faces, 10, workers, CPU))
    labels = torch.cat([batch.labels for batch in batches])
    assert np.flatnonzero(labels == -1).tolist() == [8, 11]
    assert not batches[0].faces[8].any()
    assert ["record 9 at" in message for message in batches[0].broken] == [True]
    assert ["record 12 at" in message for message in batches[1].broken] == [True]
    assert batches[2].broken == []
    assert faces.labels[8] == 9 % 5, "the set's own labels must stay"


def test_other_sizes_are_scaled_when_asked(tmp_path: Path) -> None:
    """`resize` takes images of any size; what has the right size already is not touched."""
    large = np.full((2 * SIZE, 2 * SIZE, 3), (200, 30, 90), np.uint8)
    records = write_set(tmp_path, {9: encode_png(large)})
    faces, _, _ = DecodedFaces(records, records.labels, SIZE, resize=True).__getitems__([8, 9])
    assert (faces[0] == torch.tensor([200, 30, 90])).all()
    assert np.array_equal(faces[1], picture(10))


# --- to the network ---------------------------------------------------------------------------------------------------


def test_network_input_values() -> None:
    """(rgb - 127.5) / 127.5 in float32: 0 is -1, 255 is 1, red stays first; the uint8 faces are left alone."""
    faces = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    kept = faces.clone()
    inputs = to_network_input(faces)
    assert inputs.shape == (1, 3, 16, 16)
    assert inputs.dtype == torch.float32
    expected = (faces.double().permute(0, 3, 1, 2) - 127.5) / 127.5
    torch.testing.assert_close(inputs.double(), expected, rtol=0, atol=1e-7)
    assert (inputs.min(), inputs.max()) == (-1, 1)
    assert torch.equal(faces, kept)
    red = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    red[..., 0] = 255
    assert to_network_input(red)[0, :, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("mirror", [False, True, torch.tensor([True, False, True])])
def test_network_input_is_channels_last(mirror: torch.Tensor | bool) -> None:
    """Channels lie together in memory, as they were decoded: convolutions need no copy."""
    faces = torch.randint(0, 256, (3, 8, 6, 3), dtype=torch.uint8)
    assert to_network_input(faces, mirror).is_contiguous(memory_format=torch.channels_last)


def test_mirroring() -> None:
    """Left and right change places, up and down do not, and only for the faces that are to be mirrored."""
    faces = torch.randint(0, 256, (4, 8, 6, 3), dtype=torch.uint8)
    plain = to_network_input(faces)
    mirrored = plain.flip(3)
    assert torch.equal(to_network_input(faces, True), mirrored)
    some = to_network_input(faces, torch.tensor([True, False, False, True]))
    assert torch.equal(some, torch.stack([mirrored[0], plain[1], plain[2], mirrored[3]]))
