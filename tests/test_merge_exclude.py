"""Who is a person of a test set, and who only looks like one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.face_set_writer import write_face_set
from data.images import decode_rgb
from data.verification_bin import write_bin
from dataset_merge.centres import identity_centres
from dataset_merge.decisions import Match
from dataset_merge.exclude import Leaks, find_leaks, open_held_out
from models.embedders import load_embedder
from tiny_faces import tiny_face


def at(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane."""
    angles = np.deg2rad(degrees)
    return np.stack((np.cos(angles), np.sin(angles)), 1).astype(np.float32)


def test_every_image_of_a_bin_counts_and_every_identity_of_a_set(tmp_path: Path) -> None:
    """A .bin says nothing about who is who, so that one image is enough; of a set the mean of each person counts."""
    write_bin(tmp_path / "b.bin", [tiny_face(0, shot) for shot in range(4)], [True, False])
    with write_face_set(tmp_path / "other", 32) as out:
        for person in (1, 2):
            out.add_identity(tiny_face(person, shot) for shot in range(2))
    sets = [open_held_out(str(tmp_path / name)) for name in ("b.bin", "other")]
    probes = [(sets[0], torch.from_numpy(at(0, 20, 40, 60))), (sets[1], torch.from_numpy(at(90, 110, 180, 180)))]
    leaks = find_leaks(torch.from_numpy(at(21, 99, 178, 300)), probes, t=np.cos(np.deg2rad(3)))
    assert sorted(leaks.excluded) == [0, 1, 2]
    assert leaks.match[0][:2] == (str(tmp_path / "b.bin"), "b, image B of pair 0")
    assert leaks.match[1][:2] == (str(tmp_path / "other"), "0")
    assert leaks.match[2][:2] == (str(tmp_path / "other"), "1")
    assert leaks.scores == pytest.approx(np.cos(np.deg2rad([1, 1, 2, 60])), abs=1e-6)


def test_a_person_is_named_once(tmp_path: Path) -> None:
    """To name an image of a .bin its pairs are searched through: not once more for each of millions of identities."""
    write_bin(tmp_path / "b.bin", [tiny_face(0, shot) for shot in range(4)], [True, False])
    probe, asked = open_held_out(str(tmp_path / "b.bin")), []
    images = SimpleNamespace(describe=lambda i: asked.append(i) or f"image {i}")
    leaks = find_leaks(
        torch.from_numpy(at(*range(50))), [(replace(probe, images=images), torch.from_numpy(at(0, 90, 180, 270)))], 0.5
    )
    assert {match.label for match in leaks.match} == {"image 0", "image 1"}
    assert sorted(asked) == [0, 1]


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many processes share the comparing: who reaches the threshold by a hair does so in all of them."""
    write_bin(tmp_path / "b.bin", [tiny_face(0, shot) for shot in range(50)], [True] * 25)
    generator = torch.Generator().manual_seed(0)
    centres, images = (torch.nn.functional.normalize(torch.randn(n, 128, generator=generator)) for n in (40, 50))
    probe = open_held_out(str(tmp_path / "b.bin")), images
    whole = find_leaks(centres, [probe], 0.2)
    for block in (1, 3, 7):
        monkeypatch.setattr("dataset_merge.matching.usual_block", lambda _, block=block: block)
        assert find_leaks(centres, [probe], 0.2).match == whole.match


def test_people_of_lfw_are_found_by_one_image(face_data: Path, tmp_path: Path) -> None:
    """People who are in both: found at insightface's threshold of 0.4; strangers hardly ever."""
    folders = sorted((face_data / "lfw" / "images").iterdir())
    albums = [files for folder in folders[::7] if 3 <= len(files := sorted(folder.iterdir())) <= 6][:40]
    faces = np.stack([decode_rgb(file.read_bytes(), file) for album in albums for file in album])
    embedder = load_embedder(face_data / "models" / "mobilefacenet_y1_128d.onnx", torch.device("cpu"))
    embeddings = embedder.embed(torch.from_numpy(faces), False).numpy()
    labels = np.repeat(np.arange(len(albums)), [len(album) for album in albums])
    first = np.searchsorted(labels, np.arange(len(albums)))
    training = np.setdiff1d(np.arange(len(labels)), first)
    centres = identity_centres(torch.from_numpy(embeddings[training]), torch.from_numpy(labels[training]), len(albums))
    shown = first[:20]  # the test set has an image of every other one, and of nobody else
    images = [albums[i][0].read_bytes() for i in range(20)]
    write_bin(tmp_path / "test.bin", images, [False] * 10)
    probe = open_held_out(str(tmp_path / "test.bin")), torch.from_numpy(embeddings[shown])
    leaks = find_leaks(centres.vectors, [probe], 0.4)
    assert len(set(leaks.excluded) & set(range(20))) >= 19
    assert len(set(leaks.excluded) - set(range(20))) <= 1


def test_many_left_out_is_warned_of() -> None:
    """A threshold too low for the model leaves out strangers by the thousand: said with what higher ones leave out."""
    scores = np.concatenate([np.linspace(0.401, 0.449, 10), np.linspace(0.0, 0.399, 90)])
    few, many = (Leaks([Match("lfw.bin", "a", float(s)) for s in part], 0.4) for part in (scores[6:], scores))
    assert few.warning is None
    assert many.warning is not None
    assert "10 of 100 identities (10%) reach --exclude-t 0.4, 0 reach 0.45" in many.warning
    assert "are they all people of the test sets?" in many.warning  # sets of one source may well share so many


def test_what_is_no_test_set_is_refused(tmp_path: Path) -> None:
    """By its name, before any image is embedded."""
    (tmp_path / "lfw.bin").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"lfw\.bin is no verification set"):
        open_held_out(str(tmp_path / "lfw.bin"))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_held_out(str(tmp_path / "nowhere"))


def test_an_identity_at_the_threshold_is_left_out() -> None:
    """From --exclude-t on, as its help has it."""
    assert list(Leaks([Match("a", "b", 0.4), Match("a", "b", 0.5)], 0.5).excluded) == [1]
