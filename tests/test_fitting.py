"""Images made to fit a set: errors say which image cannot be, and why, and few results wait for the writer."""

from pathlib import Path

import numpy as np
import pytest

from data import fitting
from data.align import TEMPLATE
from data.detect import Detection
from data.face_sets import open_face_set
from data.fitting import Fit, Fitted, fit_image, fit_images
from data.images import ImageError, encode_png
from tiny_detectors import linear_detector, random_weights
from utils import processes

PHOTO = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
POINTS = (TEMPLATE * 0.4 + [10, 5]).astype(np.float32)


@pytest.mark.parametrize(
    ("image", "landmarks", "message"),
    [
        (encode_png(PHOTO), None, "a face has 80x60 pixels: resizing it to a square would distort the face"),
        (encode_png(PHOTO), POINTS + 100, r"a face: the landmarks, around \(132, 134\), lie outside of its 80x60"),
        (encode_png(PHOTO), np.full((5, 2), 9.0), "a face: no transform"),
        (
            encode_png(PHOTO),
            POINTS / 80,
            r"a face: the landmarks span 0\.\d+ pixels: are they fractions",
        ),
        (encode_png(PHOTO), POINTS[[1, 0, 2, 4, 3]], "a face: left and right of the landmarks are exchanged"),
        (encode_png(PHOTO)[:100], POINTS, "a face: its 100 bytes are no image"),
        (b"", None, "a face: its 0 bytes are no image"),
    ],
)
def test_images_that_cannot_be_made_to_fit(image: bytes, landmarks: np.ndarray | None, message: str) -> None:
    """Each error says which image, what was found, and, where there is a way, what to do."""
    with pytest.raises(ImageError, match=message):
        fit_image(image, "a face", Fit(32, "resize", 95), landmarks)


@pytest.mark.parametrize("detected", [False, True])
def test_few_results_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_set: Path, detected: bool) -> None:
    """Images are read a few blocks ahead of the writer, however many there are: the set is never held in memory.

    Photos whose faces have to be found come in blocks of their own size: with a large net each takes a second, all
    workers are to have some of a small set, and a broken-off run is to lose few.
    """
    faces = open_face_set(tiny_set)
    detection = None
    if detected:
        detection = Detection(linear_detector(tmp_path / "net.onnx", *random_weights(3)), 0.5, 64, "largest")
    monkeypatch.setattr(fitting, "PHOTOS_PER_BLOCK" if detected else "IMAGES_PER_BLOCK", 2)
    monkeypatch.setattr(processes, "ITEMS_PER_WORKER", 2)
    submitted: list[object] = []
    submit = processes.ProcessPoolExecutor.submit
    monkeypatch.setattr(
        processes.ProcessPoolExecutor, "submit", lambda *items: (submitted.append(items), submit(*items))[1]
    )
    images = fit_images(faces, np.arange(len(faces)), Fit(32, "refuse", 95, detection), 1)
    for taken in range(len(faces)):
        image = next(images)
        if not detected:
            assert image == Fitted(faces.encoded(taken), False)
        assert len(submitted) <= taken // 2 + 2
    assert len(submitted) == len(faces) / 2
