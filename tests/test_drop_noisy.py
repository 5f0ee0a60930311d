"""Mislabelled faces found by their angles with sub-centers: the formulas, a real little run, and what is refused."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from config import Config, DropNoisyConfig
from data import drop_noisy
from data.drop_noisy import (
    Measured,
    load_centres,
    main,
    measure,
    newest_checkpoint,
    open_set_of,
    run_settings,
    write_clean,
)
from data.face_set_writer import write_face_set
from data.face_sets import FaceSetError, RecFaceSet, open_face_set
from data.images import ImageError, decode_rgb, encode_png
from models import create_network
from models.embedders import load_embedder
from models.heads.sub_centers import angles, dominant, nearest, own_cosines
from saved_steps import take_notes_away
from tiny_faces import tiny_face
from tiny_runs import configure
from train import CHECKPOINTS, train
from utils.checkpoints import BEST, CheckpointError
from utils.ranks import Ranks
from utils.settings import ConfigError, build
from utils.training.checkpoint_store import CheckpointStore
from utils.training.saved_checkpoints import BACKBONE, checkpoint_folders

PEOPLE, RIGHT, WRONG = 10, 17, 3  # faces of an identity: 15 % are of somebody else
#: What parts the right faces of the tiny net (up to about 40 degrees) from the wrong ones (from about 60).
ANGLE = 50.0


def wrong_person(identity: int, shot: int) -> int:
    """Whose face lies among those of `identity`."""
    return (identity + 1 + 3 * shot) % PEOPLE


@pytest.fixture(scope="module")
def noisy_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Identities of 17 faces of their own, followed by 3 of other people."""
    folder = tmp_path_factory.mktemp("sets") / "noisy"
    with write_face_set(folder, 32) as out:
        for identity in range(PEOPLE):
            right = [tiny_face(identity, shot) for shot in range(RIGHT)]
            out.add_identity([*right, *(tiny_face(wrong_person(identity, n), 100 + identity) for n in range(WRONG))])
    return folder


@pytest.fixture(scope="module")
def noisy_run(noisy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo net, trained on `noisy_set` with three sub-centers."""
    config = configure(
        noisy_set, tmp_path_factory.mktemp("runs"), loss__sub_centers=3, train__epochs=7, train__batch_size=16,
        train__log_every=1000,
    )  # fmt: skip
    return train(config)


@pytest.fixture
def run_copy(noisy_run: Path, tmp_path: Path) -> Path:
    """A copy of the run to spoil."""
    return Path(shutil.copytree(noisy_run, tmp_path / "run"))


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as table:
        return list(csv.DictReader(table))


def refusal(*argv: object) -> str:
    """What the script says when it refuses."""
    with pytest.raises(SystemExit) as stopped:
        main(["--common.device", "cpu", "--workers", "0", *map(str, argv)])
    return str(stopped.value.code)


# --- the formulas -----------------------------------------------------------------------------------------------------


def plain_formula(
    embeddings: np.ndarray, labels: np.ndarray, centres: np.ndarray, k: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Class by class, as the paper says it: (dominant, the faces, their nearest sub-centers, their angles)."""
    for label in range(len(centres) // k):
        own = np.flatnonzero(labels == label)
        unit = [centre / np.linalg.norm(centre) for centre in centres[label * k : (label + 1) * k]]
        near, votes = [], [0] * k
        for i in own:
            cosines = [float(embeddings[i] @ centre) for centre in unit]
            near.append(cosines.index(max(cosines)))
            votes[near[-1]] += 1
        found = votes.index(max(votes)) if len(own) else -1
        degrees = [np.degrees(np.arccos(np.clip(embeddings[i] @ unit[found], -1, 1))) for i in own]
        yield found, own, np.array(near, int), np.array(degrees)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_formulas_are_those_of_a_loop_over_classes(k: int, block: int) -> None:
    """Dominant, nearest and angle, in any order of faces and blocks, with centres of any length and an empty class."""
    rng = np.random.default_rng(k)
    labels = rng.permutation(np.repeat([0, 1, 2, 4, 5], [9, 1, 4, 30, 6]))  # class 3 has no faces
    embeddings = rng.normal(size=(50, 8))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    centres = rng.normal(size=(6 * k, 8)) * rng.uniform(0.01, 30, (6 * k, 1))
    owned = torch.from_numpy(labels)
    cosines = own_cosines(torch.from_numpy(embeddings), owned, torch.from_numpy(centres), k, block)
    dominants = dominant(cosines, owned, 6)
    degrees, near = angles(cosines, owned, dominants).numpy(), nearest(cosines).numpy()
    for label, (found, own, expected_near, expected) in enumerate(plain_formula(embeddings, labels, centres, k)):
        assert dominants[label] == found
        np.testing.assert_array_equal(near[own], expected_near)
        np.testing.assert_allclose(degrees[own], expected, atol=1e-6)
    assert dominants[3] == -1


def test_of_equal_sub_centers_the_first_is_taken() -> None:
    """Ties, of a face between two centres and of two centres in the number of faces, do not depend on chance."""
    cosines = torch.tensor([[0.2, 0.7, 0.7], [0.1, 0.1, 0.9], [0.5, 0.5, 0.5]])
    assert nearest(cosines).tolist() == [1, 2, 0]
    labels = torch.tensor([0, 0, 1])
    assert dominant(cosines, labels, 2).tolist() == [1, 0]
    assert dominant(cosines.flip(0), torch.zeros(3, dtype=torch.int64), 1).tolist() == [0]


def test_faces_without_a_label_have_no_say() -> None:
    """Broken images, labelled -1, do not decide which sub-center is dominant, and have no angle."""
    unit, centres = torch.eye(3)[[0, 1, 1, 1, 2]], 5 * torch.eye(3)
    labels = torch.tensor([0, -1, -1, -1, 0])
    cosines = own_cosines(unit, labels, centres, 3)
    assert cosines[labels < 0].isnan().all()
    dominants = dominant(cosines, labels, 1)
    assert dominants.tolist() == [0]
    degrees = angles(cosines, labels, dominants)
    torch.testing.assert_close(degrees, torch.tensor([0, torch.nan, torch.nan, torch.nan, 90]), equal_nan=True)
    assert dominant(cosines[1:4], labels[1:4], 2).tolist() == [-1, -1]


# --- a real little run ------------------------------------------------------------------------------------------------


def test_the_wrong_faces_of_a_noisy_set_are_dropped(noisy_set: Path, noisy_run: Path, tmp_path: Path) -> None:
    """Most of what is dropped is wrong, hardly anything right is lost, and what is kept has the bytes that it had."""
    clean = tmp_path / "clean"
    main(["--run", str(noisy_run), "--output", str(clean), "--angle", str(ANGLE), "--common.device", "cpu"])
    kept, original = open_face_set(clean), open_face_set(noisy_set)
    assert isinstance(original, RecFaceSet)
    assert kept.identities == original.identities
    dropped = PEOPLE * (RIGHT + WRONG) - len(kept)
    per_identity = [
        [original.encoded(int(i)) for i in np.flatnonzero(original.labels == label)] for label in range(PEOPLE)
    ]
    wrong_left = right_left = 0
    for label, images in enumerate(per_identity):
        left = [kept.encoded(int(i)) for i in np.flatnonzero(kept.labels == label)]
        assert left == [image for image in images if image in left]
        wrong_left += sum(image in left for image in images[RIGHT:])
        right_left += sum(image in left for image in images[:RIGHT])
    assert right_left >= 0.97 * PEOPLE * RIGHT
    assert wrong_left <= 0.1 * PEOPLE * WRONG
    listed = rows(clean / "noisy.csv")
    assert len(listed) == dropped
    assert {int(row["image"].split("record ")[1].split()[0]) for row in listed} >= {RIGHT + 1, 2 * (RIGHT + WRONG)}
    assert (clean / "angles.png").read_bytes().startswith(b"\x89PNG")


def test_network_and_centres_are_those_of_the_newest_checkpoint(run_copy: Path, tmp_path: Path) -> None:
    """The angles in noisy.csv follow from the tensors of that checkpoint alone, by a formula written out here."""
    (run_copy / BEST).unlink()
    main(["--run", str(run_copy), "--output", str(tmp_path / "clean"), "--angle", "20", "--workers", "0"])
    newest = checkpoint_folders(run_copy / CHECKPOINTS)[-1]
    spread = load_file(newest / "rows-00000-of-00001.safetensors")
    network = create_network("demo", 16, 32).eval()
    network.load_state_dict(load_file(newest / "backbone.safetensors"))
    faces = open_face_set(newest_set(run_copy))
    pixels = np.stack([decode_rgb(faces.encoded(i), i) for i in range(len(faces))]).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        found = network(torch.from_numpy((pixels.astype(np.float32) - 127.5) / 127.5)).double().numpy()
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    expected = []
    centres = spread["head.weight"].double().numpy()
    for label, (_, own, near, degrees) in enumerate(plain_formula(found, faces.labels, centres, 3)):
        expected += [(faces.describe(int(own[n])), str(label), angle, near[n]) for n, angle in enumerate(degrees)]
    expected = [row for row in expected if row[2] > 20]
    listed = rows(tmp_path / "clean" / "noisy.csv")
    assert 0 < len(expected) < len(faces)
    assert [(row["image"], row["identity"], int(row["sub_center"])) for row in listed] == [
        (image, name, near) for image, name, _, near in expected
    ]
    np.testing.assert_allclose([float(row["angle"]) for row in listed], [row[2] for row in expected], atol=0.02)


def newest_set(run: Path) -> str:
    """The training set of a run."""
    return run_settings(newest_checkpoint(run)).data.root[0]


def test_a_run_is_only_read(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that has its checkpoints locked can be read; a damaged one is said, passed over, and stays where it is."""
    folders = checkpoint_folders(run_copy / CHECKPOINTS)
    assert len(folders) == 2
    with CheckpointStore(run_copy / CHECKPOINTS, Ranks()):
        assert newest_checkpoint(run_copy).folder == folders[-1]
    file = folders[-1] / "rows-00000-of-00001.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert newest_checkpoint(run_copy).folder == folders[0]
    assert str(file) in capsys.readouterr().out
    assert checkpoint_folders(run_copy / CHECKPOINTS) == folders
    take_notes_away(folders[0])
    (folders[1] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        newest_checkpoint(run_copy)


def measured_by(run: Path, source: Path, **options: object) -> Measured:
    saved = newest_checkpoint(run)
    trained = run_settings(saved)
    faces = open_set_of(run, trained, [str(source)])
    embedder = load_embedder(saved.folder / BACKBONE, torch.device("cpu"))
    centres = load_centres(saved, trained, PEOPLE)
    arguments = {"batch_size": 64, "workers": 0, "mirror": False, **options}
    return measure(faces, embedder, centres, 3, **arguments)  # type: ignore[arg-type]


def rewritten(original: Path, output: Path, change: object) -> Path:
    """The set with `change`(position, bytes) in place of every image."""
    faces = open_face_set(original)
    with write_face_set(output, 32) as out:
        for label in range(len(faces.identities)):
            out.add_identity(change(int(i), faces.encoded(int(i))) for i in np.flatnonzero(faces.labels == label))  # type: ignore[operator]
    return output


def test_batches_workers_and_sizes_change_no_angle(noisy_set: Path, noisy_run: Path, tmp_path: Path) -> None:
    """Odd last batches and worker processes measure the same; larger faces do when the run scales its faces."""
    plain = measured_by(noisy_run, noisy_set)
    other = measured_by(noisy_run, noisy_set, batch_size=33, workers=2)
    np.testing.assert_allclose(other.angle, plain.angle, atol=0.02)
    large = rewritten(noisy_set, tmp_path / "large", lambda i, image: encode_png(
        decode_rgb(image, i).repeat(2, 0).repeat(2, 1)))  # fmt: skip
    np.testing.assert_allclose(measured_by(noisy_run, large, resize=True).angle, plain.angle, atol=0.02)
    mirrored = measured_by(noisy_run, noisy_set, mirror=True)
    assert not np.allclose(mirrored.angle, plain.angle, atol=0.5)


@pytest.mark.parametrize("mirror", [False, True])
def test_the_mirror_image_is_added_when_asked(
    noisy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: bool
) -> None:
    """The flag of the program reaches the measuring."""
    asked: list[object] = []

    def stop(*arguments: object) -> None:
        asked.append(arguments[6])
        raise ValueError("seen enough")

    monkeypatch.setattr(drop_noisy, "measure", stop)
    flags = ["--mirror"] if mirror else []
    assert "seen enough" in refusal("--run", noisy_run, "--output", tmp_path / "clean", *flags)
    assert asked == [mirror]


def test_broken_images_are_dropped_and_named(
    noisy_set: Path, noisy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in training: left out and named, up to data.broken_limit of the run; they do not move the others' angles."""
    spoilt = rewritten(noisy_set, tmp_path / "spoilt", lambda i, image: b"junk" if i in (0, 25) else image)
    clean = tmp_path / "clean"
    main(["--run", str(noisy_run), "--source", str(spoilt), "--output", str(clean), "--angle", "179", "--workers", "0"])
    said = capsys.readouterr().out
    assert said.count("left out: ") == 2
    assert "198 faces of 10 identities kept, 2 dropped (1.0%)" in said
    assert "2 of them broken" in said
    faces = open_face_set(spoilt)
    names = [(row["image"], row["identity"], row["angle"], row["sub_center"]) for row in rows(clean / "noisy.csv")]
    assert names == [(faces.describe(0), "0", "", ""), (faces.describe(25), "1", "", "")]
    with pytest.raises(ImageError, match=r"data\.broken_limit allows 1: .*record 26"):
        measured_by(noisy_run, spoilt, broken_limit=1)


def test_the_set_is_opened_as_the_run_opened_it(noisy_set: Path, tmp_path: Path) -> None:
    """Several sets, joined; rare identities left out; faces of another size scaled for the network only."""
    with write_face_set(tmp_path / "more", 64) as out:
        for identity, count in ((20, 2), (21, 6), (22, 6)):
            small = (decode_rgb(tiny_face(identity, shot), shot) for shot in range(count))
            out.add_identity(encode_png(face.repeat(2, 0).repeat(2, 1)) for face in small)
    roots = (str(noisy_set), str(tmp_path / "more"))
    run = train(
        configure(
            noisy_set, tmp_path, data__root=roots, data__min_images=3, data__resize=True, loss__sub_centers=2,
            train__epochs=1,
        )
    )  # fmt: skip
    main(["--run", str(run), "--output", str(tmp_path / "clean"), "--angle", "179", "--workers", "0"])
    listed = rows(tmp_path / "clean" / "identities.csv")
    more = open_face_set(tmp_path / "more")
    assert [row["identity"] for row in listed[-3:]] == [
        f"{noisy_set / 'train.rec'}: {PEOPLE - 1}", f"{more.path}: 1", f"{more.path}: 2"
    ]  # fmt: skip
    clean = open_face_set(tmp_path / "clean")
    assert len(clean) == PEOPLE * (RIGHT + WRONG) + 12
    assert [clean.encoded(i) for i in range(len(clean) - 12, len(clean))] == [more.encoded(i) for i in range(2, 14)]
    assert rows(tmp_path / "clean" / "noisy.csv") == []


# --- what is written --------------------------------------------------------------------------------------------------


def test_identities_without_a_face_drop_out_and_are_named(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others keep their order under new labels; identities.csv says who is who, and what nobody measured is out."""
    faces = open_face_set(tiny_set)
    angle = np.full(len(faces), 30, np.float32)
    angle[np.isin(faces.labels, (1, 4))] = 80
    angle[[0, 17]] = 75.5, np.nan
    angle[18] = 75
    measured = Measured(angle, np.full(len(faces), 2), np.array([0, 1, 2, 0, -1, 2]))
    cleaned = write_clean(faces, measured, 75, tmp_path / "clean", 32)
    assert (cleaned.kept, cleaned.dropped, cleaned.broken, cleaned.identities) == (30, 18, 1, 4)
    assert cleaned.lost == ["1", "4"]
    assert [(r["identity"], r["label"], r["kept"], r["dropped"], r["dominant"])
            for r in rows(tmp_path / "clean" / "identities.csv")] == [
        ("0", "0", "7", "1", "0"), ("1", "", "0", "8", "1"), ("2", "1", "7", "1", "2"), ("3", "2", "8", "0", "0"),
        ("4", "", "0", "8", ""), ("5", "3", "8", "0", "2"),
    ]  # fmt: skip
    clean = open_face_set(tmp_path / "clean")
    kept = [i for i in range(len(faces)) if angle[i] <= 75]
    assert [clean.encoded(i) for i in range(len(clean))] == [faces.encoded(i) for i in kept]
    assert clean.labels.tolist() == np.unique(faces.labels[kept], return_inverse=True)[1].tolist()
    assert (tmp_path / "clean" / "property").read_text() == "4,32,32"
    with pytest.raises(FaceSetError, match="no face is within 1 degrees: raise --angle"):
        write_clean(faces, measured, 1, tmp_path / "none", 32)
    assert not (tmp_path / "none").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_in_words(
    noisy_set: Path, noisy_run: Path, tiny_set: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """One sub-center, another set, a set that is gone, an output that is there, and settings left out: a line each."""
    output = tmp_path / "clean"
    assert "--run runs/NAME" in refusal("--output", output)
    assert "--output CLEAN" in refusal("--run", noisy_run)
    assert "--loss.sub-centers 3" in refusal("--run", tiny_run, "--output", output)
    assert "6 identities" in refusal("--run", noisy_run, "--output", output, "--source", tiny_set)
    assert "--source" in refusal("--run", noisy_run, "--output", output, "--source", tmp_path / "gone")
    assert "no whole checkpoint" in refusal("--run", tmp_path / "gone", "--output", output)
    assert not output.exists()
    output.mkdir()
    (output / "mine").touch()
    for run in (noisy_run, tmp_path / "gone"):  # said before anything is read
        assert "exists and is not empty" in refusal("--run", run, "--output", output)
    assert [file.name for file in output.iterdir()] == ["mine"]


def test_joined_sets_may_have_moved(tmp_path: Path) -> None:
    """Their paths, which classes.csv has, may be others; their identities, and the order of the sets, may not."""
    for name, people in (("a", 1), ("b", 2)):
        for person in range(people):
            (tmp_path / name / f"{name}{person}").mkdir(parents=True)
            (tmp_path / name / f"{name}{person}" / "1.png").write_bytes(tiny_face(person, 0))
    (tmp_path / "classes.csv").write_text("class,identity\n0,/old/a: a0\n1,/old/b: b0\n2,/old/b: b1\n")
    trained = build(Config, {"data.root": ("/old/a", "/old/b")})
    assert len(open_set_of(tmp_path, trained, [str(tmp_path / "a"), str(tmp_path / "b")])) == 3
    with pytest.raises(FaceSetError, match=r"identity 0 is '0: b0', in .* it is '/old/a: a0'"):
        open_set_of(tmp_path, trained, [str(tmp_path / "b"), str(tmp_path / "a")])


def test_a_set_with_other_names_is_refused(noisy_set: Path, noisy_run: Path, run_copy: Path, tmp_path: Path) -> None:
    """As many identities are not enough: the names have to be those of classes.csv, in their order."""
    table = run_copy / "classes.csv"
    table.write_text(table.read_text().replace("3,3\n", "3,three\n"))
    said = refusal("--run", run_copy, "--output", tmp_path / "clean")
    assert "identity 3 is '3'" in said
    assert "'three'" in said
    assert str(table) in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"classes\.csv: its header '' lacks identity"),
        ("class,person\n0,0\n", r"classes\.csv: its header 'class,person' lacks identity"),
        ("class,identity\n0,0\n1\n", r"classes\.csv, line 3: 1 columns, expected 2"),
        ("class,identity\n0,0\n1," + "x" * 200_000, r"classes\.csv, line 3: field larger than"),
        ('class,identity\n0,"0\n1,1\n', r"classes\.csv, line 2: .* is a quote"),
    ],
)
def test_a_damaged_table_of_classes(tiny_set: Path, tmp_path: Path, text: str, message: str) -> None:
    """Is named, with the line: it was a traceback."""
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(FaceSetError, match=message):
        open_set_of(tmp_path, Config(), [str(tiny_set)])


def test_the_checkpoint_has_to_fit_its_settings(noisy_run: Path) -> None:
    """Centres for another number of classes are not taken for those of the set."""
    saved = newest_checkpoint(noisy_run)
    with pytest.raises(CheckpointError, match="30 centres, not 3 for each of 9 identities"):
        load_centres(saved, run_settings(saved), 9)


def test_settings_out_of_range_are_refused() -> None:
    """An angle is between 0 and 180 degrees, a batch has an image; 75 degrees is the default."""
    assert Config().drop_noisy.angle == 75
    for angle in (0.0, -1.0, 180.0):
        with pytest.raises(ConfigError, match=r"drop_noisy\.angle"):
            DropNoisyConfig(angle=angle)
    with pytest.raises(ConfigError, match=r"drop_noisy\.batch_size"):
        DropNoisyConfig(batch_size=0)
