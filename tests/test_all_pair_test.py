"""all_pair_test.py: what it finds by itself, what it writes, and that nothing is skipped in silence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import all_pair_test
from conftest import ROOT
from data.face_sets import open_face_set
from data.loading import to_network_input
from data.verification_bin import write_bin
from models import create_network
from tiny_faces import tiny_face
from utils.checkpoints import load_backbone
from utils.evaluation.test_sets import set_names


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    all_pair_test.main([str(argument) for argument in (*arguments, "--workers", 0, "--no-cache")])
    return capsys.readouterr().out


def test_without_arguments_it_tests_the_newest_run_on_the_configured_sets(
    tiny_set: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No --model: the newest run's best. No SET: what the run was verified on. Results in the run's folder."""
    shown = run(capsys, "--runs", tiny_run.parent)
    assert f"model: {tiny_run}" in shown
    assert "tiny" in shown
    report = json.loads((tiny_run / "test" / "results.json").read_text())
    assert list(report["sets"]) == ["tiny"]
    assert report["mirror"] is True
    for picture in ("roc.png", "tiny_scores.png"):
        assert (tiny_run / "test" / picture).read_bytes().startswith(b"\x89PNG")


def test_all_pairs_of_a_set_by_hand(
    tiny_set: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TAR, EER and counts of the report follow from embeddings computed step by step, sorted in full."""
    run(capsys, tiny_set, "--model", tiny_run, "--output", tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())["sets"]["tiny"]

    state, settings = load_backbone(tiny_run / "best.safetensors")
    network = create_network("demo", settings["model"]["embedding_size"], 32).eval()
    network.load_state_dict(state)
    faces = open_face_set(tiny_set)
    import cv2

    decoded = [cv2.imdecode(np.frombuffer(faces.encoded(i), np.uint8), cv2.IMREAD_COLOR) for i in range(len(faces))]
    pixels = torch.from_numpy(np.stack(decoded)[..., ::-1].copy())
    with torch.no_grad():
        both = network(to_network_input(pixels)) + network(to_network_input(pixels.flip(2)))
    unit = (both / both.norm(dim=1, keepdim=True)).double().numpy()
    upper = np.triu_indices(len(faces), 1)
    scores = (unit @ unit.T)[upper]
    genuine = (faces.labels[:, None] == faces.labels[None])[upper]
    impostor = np.sort(scores[~genuine])[::-1]
    assert (report["genuine_pairs"], report["impostor_pairs"]) == (genuine.sum(), len(impostor))
    for point in report["points"]:
        threshold = impostor[int(point["far"] * len(impostor))]
        assert point["threshold"] == pytest.approx(threshold, abs=1e-5)
        assert point["tar"] == pytest.approx((scores[genuine] > threshold).mean(), abs=2.1 / genuine.sum())


def test_results_of_a_runs_file_go_to_its_folder(
    tiny_set: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--model runs/X/best.safetensors is run X; a file from elsewhere gets a folder under its own name."""
    shown = run(capsys, tiny_set / "tiny.bin", "--model", tiny_run / "best.safetensors")
    assert f"numbers and pictures: {tiny_run / 'test'}" in shown
    shutil.copy(tiny_run / "best.safetensors", tmp_path / "x.safetensors")
    shown = run(capsys, tiny_set / "tiny.bin", "--model", tmp_path / "x.safetensors", "--runs", tmp_path)
    assert f"numbers and pictures: {tmp_path / 'test-x'}" in shown


def test_weights_beside_the_config_of_another_program(
    tiny_set: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models that are downloaded come with a config.json of their own, which is neither a run's nor damaged."""
    shutil.copy(tiny_run / "best.safetensors", tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["Recognition"], "conf": {"color_space": "RGB"}}')
    shown = run(capsys, tiny_set / "tiny.bin", "--model", tmp_path / "x.safetensors", "--runs", tmp_path)
    assert f"numbers and pictures: {tmp_path / 'test-x'}" in shown


def test_names_that_are_no_utf8(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """A set and people with names of older systems are tested like any others, with a run's board beside it; what the
    screen cannot show does not end the program."""
    from data.prepare_data import prepare

    folder, copy = tmp_path / os.fsdecode(b"lid\xe9"), tmp_path / "run"
    prepare(tiny_set / "train.rec", folder, 0)
    (folder / "000000").rename(folder / os.fsdecode(b"Andr\xe9"))
    shutil.copytree(tiny_run, copy)
    command = [sys.executable, ROOT / "all_pair_test.py", folder, "--model", copy, "--workers", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lid\\udce9" in done.stdout
    assert b"lid\xe9" in (copy / "test" / "report.html").read_bytes()


def test_numbers_survive_a_set_that_fails(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """What was measured before an error is in results.json; here a broken image, seen when it is read."""
    write_bin(tmp_path / "bad.bin", [tiny_face(0, 0)] + [b"nonsense"] * 19, [True, False] * 5)
    arguments = [tiny_set / "tiny.bin", tmp_path / "bad.bin", "--model", tiny_run, "--output", tmp_path]
    with pytest.raises(SystemExit, match="bad, image B of pair 0"):
        all_pair_test.main([*map(str, arguments), "--workers", "0"])
    assert list(json.loads((tmp_path / "results.json").read_text())["sets"]) == ["tiny"]


def test_a_folder_of_identities_is_a_set_too(
    tiny_set: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same faces as .rec and as folders give the same numbers."""
    from data.prepare_data import prepare

    prepare(tiny_set / "train.rec", tmp_path / "folders", 0)
    run(capsys, tiny_set, tmp_path / "folders", "--model", tiny_run, "--output", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]
    for numbers in report.values():  # but where the images of the hardest pairs are
        assert all(pair.pop("images") for kind in numbers["hardest_pairs"].values() for pair in kind)
    assert report["tiny"] == report["folders"]


def test_sets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """datasets/demo/demo.bin and datasets/demo are two sets, and so are a/lfw.bin and b/lfw.bin."""
    for folder in ("demo", "a", "b"):
        (tmp_path / folder).mkdir()
        for file in ("demo.bin", "lfw.bin", "train.rec"):
            (tmp_path / folder / file).touch()
    names = set_names([tmp_path / "demo" / "demo.bin", tmp_path / "demo", tmp_path / "a" / "lfw.bin"])
    assert names == ["demo_demo.bin", f"{tmp_path.name}_demo", "lfw"]
    assert set_names([tmp_path / "a" / "lfw.bin", tmp_path / "b" / "lfw.bin"]) == ["a_lfw.bin", "b_lfw.bin"]
    assert set_names([tmp_path / "a" / "train.rec", tmp_path / "b"]) == ["a", "b"]
    (tmp_path / "v1.5").mkdir()
    (tmp_path / "v1.5" / "train.rec").touch()
    assert set_names([tmp_path / "v1.5" / "train.rec"]) == set_names([tmp_path / "v1.5"]) == ["v1.5"]


def test_a_bin_made_elsewhere_whose_folds_are_of_one_kind(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody warned when it was packed: the report does. --images, which is for lists, is said to have no effect."""
    same = [True] * 10 + [False] * 10
    pairs = [
        tiny_face(i % 5, shot + 2 * (i // 10)) if s else tiny_face(i % 5 + shot, i)
        for i, s in enumerate(same)
        for shot in (0, 1)
    ]
    write_bin(tmp_path / "mine.bin", pairs, same)
    shown = run(capsys, tmp_path / "mine.bin", "--model", tiny_run, "--output", tmp_path / "out", "--images", tmp_path)
    assert "test.images not used: no list of pairs is among mine\n" in shown
    (tested,) = json.loads((tmp_path / "out" / "report.json").read_text())["sets"].values()
    (finding,) = [finding for finding in tested["findings"] if finding["check"] == "folds"]
    assert finding["text"].startswith("10 of the 10 folds of mine have pairs of one kind only")


def test_nothing_is_skipped_in_silence(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """A set that is missing, damaged or too small to test is an error, not a missing line."""
    (tmp_path / "bad.bin").write_bytes(b"nonsense")
    shutil.copytree(tiny_set, tmp_path / "nobin", ignore=shutil.ignore_patterns("*.bin"))
    (tmp_path / "one" / "person").mkdir(parents=True)
    for shot in range(2):
        (tmp_path / "one" / "person" / f"{shot}.png").write_bytes(open_face_set(tiny_set).encoded(shot))
    for arguments, message in (
        (["/nowhere.bin"], "nowhere.bin"),
        (["/nowhere"], "/nowhere does not exist"),
        ([tmp_path / "bad.bin"], "bad.bin is no verification set"),
        ([tmp_path / "one"], "no impostor pairs"),
        ([tiny_set, tiny_set], "a set is named twice"),
        (["--data.root", tmp_path / "nobin"], "nothing to test on: name a set"),
        ([tiny_run, "--data.root", tmp_path / "nobin"], f"{tiny_run}, named without a flag, is a model; name a set"),
    ):
        with pytest.raises(SystemExit, match=f"all_pair_test: .*{message}"):
            all_pair_test.main(
                [*map(str, arguments), "--model", str(tiny_run), "--output", str(tmp_path), "--workers=0"]
            )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "has no best.safetensors or model.safetensors; if it is a face set, name it without --model"),
        ("tiny.bin", "was not written by torch.save; if it is a verification set, name it without --model"),
    ],
)
def test_a_set_is_no_model(tiny_set: Path, tmp_path: Path, model: str, message: str) -> None:
    """A set named by `--model` is told so; nobody is advised to unpickle it all the same."""
    with pytest.raises(SystemExit) as caught:
        all_pair_test.main([str(tiny_set), "--model", str(tiny_set / model), "--output", str(tmp_path), "--workers=0"])
    assert str(caught.value).startswith(f"all_pair_test: {tiny_set / model} {message}")
