"""Exports and detectors in the real `insightface` package, which has its own environment. Run by `make conformance`."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from config import Config
from data.detect import FaceDetector
from data.images import decode_face, decode_rgb
from models import create_network, load_embedder
from tiny_detectors import linear_detector, random_weights
from utils.checkpoints import Progress, save_backbone
from utils.export import main
from utils.settings import build, to_json

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parents[1] / ".venv-insightface" / "bin" / "python"
CPU = torch.device("cpu")
NETWORKS = ("demo", "r18", "mbf", "vit_t", "edgeface_xxs")
WEIGHTS = ("mobilefacenet_y1_mxnetkeys_state_dict.pth", "mobilefacenet_xiaoccer_068.ckpt")


@pytest.fixture(scope="module")
def faces(face_data: Path) -> np.ndarray:
    """uint8 [16, 112, 112, 3] RGB: people of LFW."""
    files = sorted((face_data / "lfw" / "images").glob("*/*_0001.jpg"))[::300][:16]
    return np.stack([decode_face(file.read_bytes(), 112, False, file) for file in files])


def in_insightface(faces: np.ndarray, files: list[Path], folder: Path) -> dict[str, np.ndarray]:
    """What insightface_side.py says of `files`."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} does not exist: `make conformance` makes it")
    np.save(folder / "faces.npy", faces)
    subprocess.run([PYTHON, HERE / "insightface_side.py", folder / "faces.npy", folder / "out.npz", *files], check=True)
    with np.load(folder / "out.npz") as out:
        return dict(out)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of the rows of two [n, D], in float64."""
    left, right = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (left.astype(float), right))
    return (left * right).sum(1)


def make_run(network: str, folder: Path) -> Path:
    """A run folder of `network` with random weights, its norms having seen faces."""
    torch.manual_seed(0)
    module = create_network(network, 64, 112)
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(16, 3, 112, 112))
    config = build(Config, {"model.network": network, "model.embedding_size": 64, "data.root": ("sets/some",)})
    save_backbone(folder / network / "best.safetensors", module.eval(), to_json(config), Progress(1, 0.5))
    return folder / network


def test_same_embeddings_in_insightface(faces: np.ndarray, face_data: Path, tmp_path: Path) -> None:
    """Each network, with normalisation folded in and without, gives there what it gives here from the same crops."""
    models = [make_run(network, tmp_path) for network in NETWORKS]
    models += [face_data / "models" / name for name in WEIGHTS]
    files, expected = [], {}
    for model in models:
        vectors = load_embedder(model, CPU).embed(faces, mirror=False)
        for folded in (False, True):
            file = tmp_path / f"{model.stem}{'_folded' if folded else ''}.onnx"
            flags = ["--fold-normalisation"] if folded else []
            main([str(model), "--output", str(file), "--images", "4", "--device", "cpu", *flags])
            files.append(file)
            expected[file.stem] = (vectors, ["ArcFaceONNX", *(("0.0", "1.0") if folded else ("127.5", "127.5"))])
    found = in_insightface(faces, files, tmp_path)
    print(f"\nexports in insightface {found['version']}:")
    for name, (vectors, how) in expected.items():
        assert found[f"{name}:how"].tolist() == how
        deviation = 1 - cosines(found[name], vectors).min()
        print(f"  {name:55} mean {how[1]:>5}, std {how[2]:>5}   1 - cosine {deviation:.1e}")
        assert deviation < 1e-5, name


def test_fp16_and_int8_in_insightface(faces: np.ndarray, face_data: Path, tmp_path: Path) -> None:
    """The small files, folded and not, are taken for what they are there too."""
    model = make_run("demo", tmp_path)
    files, expected = [], {}
    for precision in ("fp16", "int8"):
        for folded in (False, True):
            file = tmp_path / f"{precision}{'_folded' if folded else ''}.onnx"
            flags = ["--fold-normalisation"] if folded else []
            sets = ["--set", str(face_data / "faces_glint24"), "--images", "8", "--calibration-images", "32"]
            main([str(model), "--output", str(file), "--precision", precision, *sets, *flags])
            files.append(file)
            expected[file.stem] = load_embedder(file, CPU).embed(faces, mirror=False)
    found = in_insightface(faces, files, tmp_path)
    for name, vectors in expected.items():
        assert float(found[f"{name}:how"][2]) == (1.0 if "folded" in name else 127.5)
        assert cosines(found[name], vectors).min() > 1 - 1e-4, name


def test_same_faces_found_in_insightface(face_data: Path, tmp_path: Path) -> None:
    """Photos of LFW, square ones and ones whose sides scale alike: boxes, scores and landmarks of every face that both
    layouts of SCRFD's outputs tell, after suppression, are those of insightface's own class.

    The nets' answers depend on each colour and are dense: thousands of boxes overlap. (Where the sides scale
    differently insightface divides x by the scale of y; that is not followed here.)
    """
    photos = {}
    for file in sorted((face_data / "lfw_raw").glob("*.jpg"))[:6]:
        photo = decode_rgb(file.read_bytes(), file)
        photos |= {file.stem: photo, f"{file.stem} portrait": photo[:, 60:185], f"{file.stem} landscape": photo[60:185]}
    np.savez(tmp_path / "photos.npz", **photos)
    files = [linear_detector(tmp_path / f"levels{levels}.onnx", *random_weights(levels)) for levels in (3, 5)]
    side = [PYTHON, HERE / "insightface_detect_side.py", tmp_path / "photos.npz", tmp_path / "out.npz", "128", "0.5"]
    subprocess.run([*side, *files], check=True)
    found = 0
    with np.load(tmp_path / "out.npz") as theirs:
        for file in files:
            detector = FaceDetector(file, 0.5, 128)
            for name, photo in photos.items():
                faces = detector.detect(photo)
                boxes, landmarks = theirs[f"{file.stem}:{name}"], theirs[f"{file.stem}:{name}:landmarks"]
                for face, box, points in zip(faces, boxes, landmarks, strict=True):
                    np.testing.assert_allclose([*face.box, face.score], box, rtol=1e-4, atol=2e-3)
                    np.testing.assert_allclose(face.landmarks, points, rtol=1e-4, atol=2e-3)
                found += len(faces)
    print(f"\n{found} faces found in {2 * len(photos)} photos by both")
    assert found > 100
