"""all_pair_test.py on every kind of set, with several models and processes: its report says what was measured."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import all_pair_test
from data.face_sets import open_face_set
from data.images import encode_jpeg
from data.prepare_data import prepare
from data.verification_bin import write_bin
from models import create_network
from models.embedders import NetworkEmbedder
from tiny_runs import configure
from utils.checkpoints import Progress, save_backbone
from utils.evaluation.report_json import pictures_of
from utils.ranks import Ranks
from utils.settings import to_json

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("--workers", "0", "--no-cache", "--draws", "40", "--hardest", "2")


def run(output: Path, *arguments: object) -> dict[str, Any]:
    """Run the program with little to draw; the report."""
    all_pair_test.main([*map(str, arguments), *QUICK, "--output", str(output)])
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def untrained(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt nothing."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models") / "untrained.safetensors"
    settings = to_json(configure(tiny_set, path.parent))
    save_backbone(path, create_network("demo", 16, 32), settings, Progress(0, 0.0))
    return path


def test_two_models_are_compared_and_the_page_has_it_all(
    tiny_set: Path, tiny_run: Path, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--model A B`: both on the same pairs, a sentence with interval and p, one page with every picture in it."""
    report = run(tmp_path, tiny_set, tiny_set / "tiny.bin", "--model", tiny_run, untrained, "--training-set", "none")
    assert list(report["models"]) == ["tiny", "untrained"]
    assert not report["findings"], "there is no training set to say anything of"
    names = list(report["sets"])
    assert len(names) == 2
    shown, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for name, one in report["sets"].items():
        assert list(one["models"]) == ["tiny", "untrained"]
        accuracy = [model["eer"] for model in one["models"].values()]
        assert accuracy[0] <= accuracy[1]
        for found in one["comparisons"]:
            low, high = found["interval"]
            assert low <= found["difference"] <= high
            assert found["difference"] == pytest.approx(found["value_b"] - found["value_a"])
            assert 0 <= found["p_value"] <= 1
        assert {found["measure"] for found in one["comparisons"]} >= {"AUC", "EER", "TAR at FAR 1e-01"}
        assert name in page
        assert any(found["sentence"] in shown for found in one["comparisons"])
        for picture in one["pictures"]:
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    pictures = {picture for one in report["sets"].values() for picture in one["pictures"]} | {"roc.png", "det.png"}
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search("https?:", page.replace("http://www.w3.org", ""))
    for kind in ("scores", "hardest_false_accepts", "hardest_false_rejects", "roc"):
        assert any(kind in picture for picture in pictures)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sets"] == {name: one["models"]["tiny"] for name, one in report["sets"].items()}


def test_points_and_intervals_are_the_measured_ones(tiny_set: Path, untrained: Path, tmp_path: Path) -> None:
    """Every number lies within its interval; FAR points without impostor pairs enough are marked, not hidden."""
    for found in run(tmp_path, tiny_set, tiny_set / "tiny.bin", "--model", untrained)["sets"].values():
        numbers = found["models"]["untrained"]
        assert any(point["interval"] for point in numbers["points"])
        for point in numbers["points"]:
            assert point["supported"] == (point["far"] * numbers["impostor_pairs"] >= 1)
            assert point["support"] in ("good", "weak", "none")
            if point["interval"] is None:  # all draws agree
                assert point["tar"] in (0, 1)
            else:
                assert point["interval"][0] - 1e-9 <= point["tar"] <= point["interval"][1] + 1e-9
        low, high = numbers["intervals"]["eer"]
        assert low <= numbers["eer"] <= high


def test_a_list_of_pairs_is_the_bin_it_would_make(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """pairs.txt with its folder gives the numbers of the same pairs packed as a `.bin`."""
    from data.verification_bin import write_bin

    faces = open_face_set(tiny_set)
    lines, images, same = ["1\t12"], [], []
    for person in range(6):
        folder = tmp_path / "images" / f"p{person}"
        folder.mkdir(parents=True)
        for shot in range(8):
            (folder / f"p{person}_{shot + 1:04d}.png").write_bytes(faces.encoded(8 * person + shot))
        for shot in (0, 2):
            lines.append(f"p{person}\t{shot + 1}\t{shot + 2}")
            images += [faces.encoded(8 * person + shot), faces.encoded(8 * person + shot + 1)]
            lines.append(f"p{person}\t{shot + 1}\tp{(person + 1) % 6}\t{shot + 1}")
            images += [faces.encoded(8 * person + shot), faces.encoded(8 * ((person + 1) % 6) + shot)]
            same += [True, False]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    write_bin(tmp_path / "packed.bin", images, same)
    sets = run(tmp_path / "out", tmp_path / "packed.bin", tmp_path / "pairs.txt", "--model", tiny_run, "--no-checks")
    numbers = [one["models"]["tiny"] for one in sets["sets"].values()]
    hardest = [[pair for kind in one["hardest_pairs"].values() for pair in kind] for one in numbers]
    named = [[pair.pop("images") for pair in pairs] for pairs in hardest]
    assert all(place.startswith("packed, image ") for pair in named[0] for place in pair)
    assert all(f"{tmp_path / 'pairs.txt'}, line " in place for pair in named[1] for place in pair)
    # Groups of pairs that share images are the same, so are all draws.
    assert numbers[0] == numbers[1]


def test_groups_qualities_and_identification(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """--breakdown, --quality and --identify: counts add up, and the pictures are there."""
    prepare(tiny_set / "train.rec", tmp_path / "folders", 0)
    faces = open_face_set(tmp_path / "folders")
    (tmp_path / "people.csv").write_text(
        "identity,side\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(faces.identities))
    )
    files = [faces.describe(i).split("folders/")[1] for i in range(len(faces))]
    (tmp_path / "images.csv").write_text("image,sharp\n" + "".join(f"{file},{i % 7}\n" for i, file in enumerate(files)))
    report = run(
        tmp_path / "out", tmp_path / "folders", "--model", tiny_run, "--identify", "--no-checks",
        "--breakdown", f"{tmp_path / 'people.csv'}:side", "--quality", f"norm,{tmp_path / 'images.csv'}:sharp",
    )  # fmt: skip
    numbers = report["sets"]["folders"]["models"]["tiny"]
    rates = numbers["breakdowns"]["side"]["rates"]
    assert sum(rate["genuine"] for rate in rates) == numbers["genuine_pairs"]
    assert sum(rate["impostor"] for rate in rates) == numbers["impostor_pairs"]
    assert set(numbers["error_versus_reject"]) == {"norm", "sharp"}
    found = numbers["identification"][""]
    assert (found["gallery"], found["mated_probes"], found["non_mated_probes"]) == (6, 42, 0)
    assert found["cmc"] == sorted(found["cmc"])
    pictures = report["sets"]["folders"]["pictures"]
    assert {"folders_by_side.png", "folders_reject_norm.png", "folders_reject_sharp.png"} <= set(pictures)


def test_images_and_people_of_the_training_set_are_told(
    tiny_set: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Testing on the training set warns, with a picture; a set of other people does not."""
    report = run(tmp_path, tiny_set, tiny_set / "tiny.bin", "--model", tiny_run)["sets"]
    shown = capsys.readouterr().out
    levels = {name: {finding["check"]: finding["level"] for finding in one["findings"]} for name, one in report.items()}
    trained, others = sorted(levels, key=lambda name: name.endswith("tiny.bin"))
    assert levels[trained]["duplicates"] == "warning"
    assert levels[others]["duplicates"] == "note"
    assert f"{trained}_shared_duplicates.png" in report[trained]["pictures"]
    assert "WARNING: " in shown
    # Drawn faces, of 32 pixels: whether they are aligned, nobody can tell.
    assert levels[others]["alignment"] == "unclear"
    assert "  note: tiny_tiny.bin: the mean face shows no clear eyes anywhere" in shown
    assert not [line for line in shown.splitlines() if "no warning" in line and "alignment" in line]
    for options in ([], ["--training-sample", "0"]):
        with pytest.raises(SystemExit, match="training-set: /nowhere does not exist"):
            run(tmp_path, tiny_set / "tiny.bin", "--model", tiny_run, "--training-set", "/nowhere", *options)


def test_reduced_precision_is_compared_with_float32(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """--precision bf16 says how far its scores are from those in float32."""
    report = run(tmp_path, tiny_set / "tiny.bin", "--model", tiny_run, "--precision", "bf16")
    texts = [finding["text"] for finding in report["sets"]["tiny"]["findings"] if finding["check"] == "precision"]
    assert len(texts) == 1
    assert "in bf16: scores differ by" in texts[0]


def test_kept_embeddings_are_used_again(
    tiny_set: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second test of the same model on the same images embeds nothing; without the mirror it does."""
    arguments = [str(tiny_set / "tiny.bin"), "--model", str(tiny_run), "--no-checks", "--draws", "0", "--hardest", "0"]
    arguments += ["--workers", "0", "--cache-folder", str(tmp_path / "kept"), "--output", str(tmp_path)]
    all_pair_test.main(arguments)
    first = json.loads((tmp_path / "results.json").read_text())
    assert list((tmp_path / "kept").iterdir())

    def embed(*_: object) -> None:
        raise RuntimeError("embedded again")

    monkeypatch.setattr(NetworkEmbedder, "features", embed)
    all_pair_test.main(arguments)
    assert json.loads((tmp_path / "results.json").read_text()) == first
    with pytest.raises(RuntimeError, match="embedded again"):
        all_pair_test.main([*arguments, "--no-mirror"])


def test_models_are_told_apart(tiny_run: Path, tmp_path: Path) -> None:
    """Files of one name get their folder's before it; a model that is named twice is an error."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.onnx").touch()
    paths = [tmp_path / "a" / "net.onnx", tmp_path / "b" / "net.onnx", tiny_run]
    assert all_pair_test.model_names(paths) == ["a_net.onnx", "b_net.onnx", "tiny"]
    assert all_pair_test.model_names([tiny_run / "best.safetensors"]) == ["tiny"]
    with pytest.raises(ValueError, match="named twice"):
        all_pair_test.model_names([tiny_run, tiny_run / "best.safetensors"])


def test_two_processes_report_what_one_does(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """torchrun with two processes over gloo: the same numbers, printed and written once."""
    arguments = [str(tiny_set), str(tiny_set / "tiny.bin"), "--model", str(tiny_run), "--no-checks", *QUICK]
    alone = run(tmp_path / "one", *arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, "all_pair_test.py", *arguments, "--device", "cpu", "--output", str(tmp_path / "two")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("numbers and pictures:") == 1
    together = json.loads((tmp_path / "two" / "report.json").read_text())
    for name, one in alone["sets"].items():
        mine, theirs = one["models"]["tiny"], together["sets"][name]["models"]["tiny"]
        assert mine["eer"] == pytest.approx(theirs["eer"], abs=1e-6)
        tars = [[point["tar"] for point in numbers["points"]] for numbers in (mine, theirs)]
        np.testing.assert_allclose(*tars, atol=1e-6)


def test_a_folder_of_ijb_gets_its_own_protocol(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """A small set in IJB-C's layout: 1:1 by its own rule and by rank, 1:N in both galleries."""
    from data.images import decode_rgb, encode_png

    faces = open_face_set(tiny_set)
    root = tmp_path / "IJBC"
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    points = "38.2946 51.6963 73.5318 51.5014 56.0252 71.7366 41.5493 92.3655 70.7299 92.2041"
    names, media, pairs = [], [], []
    for i in range(len(faces)):
        large = decode_rgb(faces.encoded(i), i).repeat(4, 0).repeat(4, 1)[:112, :112]
        (root / "loose_crop" / f"{i}.png").write_bytes(encode_png(np.ascontiguousarray(large)))
        names.append(f"{i}.png {points} 0.9")
        media.append(f"{i}.png {i // 2} {i}")  # two images a template, four templates a person
    for a in range(24):
        pairs += [f"{a} {b} {int(a // 4 == b // 4)}" for b in range(a + 1, 24)]
    for file, lines in (("name_5pts_score", names), ("face_tid_mid", media), ("template_pair_label", pairs)):
        (root / "meta" / f"ijbc_{file}.txt").write_text("\n".join(lines) + "\n")
    for gallery, people in (("G1", (0, 1, 2)), ("G2", (3, 4, 5))):
        rows = "".join(f"{4 * person},{person}\n" for person in people)
        (root / "meta" / f"ijbc_1N_gallery_{gallery}.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n" + rows)
    probes = "".join(f"{4 * person + 1},{person}\n" for person in range(6))
    (root / "meta" / "ijbc_1N_probe_mixed.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n" + probes)
    big = tmp_path / "big.safetensors"
    torch.manual_seed(0)
    settings = to_json(configure(tiny_set, tmp_path, data__image_size=112))
    save_backbone(big, create_network("demo", 16, 112), settings, Progress(0, 0.0))
    report = run(tmp_path / "out", root, "--model", big, "--training-set", "none")
    numbers = report["sets"]["IJBC"]["models"]["big"]
    assert (numbers["images"], numbers["genuine_pairs"], numbers["impostor_pairs"]) == (48, 36, 240)
    assert len(numbers["nearest_points"]) == len(numbers["points"]) == 6
    assert {"G1", "G2"} <= set(numbers["identification"])
    assert numbers["identification"]["G1"]["gallery"] == 3
    assert "detector" in numbers["pooling"]
    smaller = run(tmp_path / "small", root, "--model", tiny_run, "--training-set", "none", "--no-checks")
    assert smaller["sets"]["IJBC"]["images"] == 48, "faces are aligned to the size that the model takes"
    for table in (["--breakdown", "people.csv:age"], ["--quality", "norm,people.csv:sharp"]):
        with pytest.raises(SystemExit, match=f"{table[0]}.* is for face sets and pairs of images, not templates"):
            run(tmp_path / "small", root, "--model", tiny_run, *table)


@pytest.mark.parametrize(
    ("later", "options", "message"),
    [
        ("gone.bin", [], "gone.bin does not exist"),
        ("of_one_kind.csv", [], "of_one_kind: all of its 12 pairs are of one kind"),
        ("few.csv", [], "few: 3 pairs cannot make 10 folds"),
        ("tiny.bin", ["--breakdown", "people.csv:age"], "does not say who is who"),
        ("large.bin", [], "large, image A of pair 0 is 40x48 pixels, expected 32x32"),
    ],
)
def test_what_is_wrong_with_the_last_set_is_said_before_the_first_is_embedded(
    later: str, options: list[str], message: str, tiny_set: Path, tiny_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Protects hours of work on the sets before it."""
    prepare(tiny_set / "train.rec", tmp_path / "images", 0)
    files = sorted(path.relative_to(tmp_path / "images") for path in (tmp_path / "images").glob("*/*.png"))
    header = "path1,path2,same\n"
    (tmp_path / "of_one_kind.csv").write_text(header + "".join(f"{files[0]},{files[1 + i % 7]},1\n" for i in range(12)))
    (tmp_path / "few.csv").write_text(header + "".join(f"{files[0]},{files[7 + i]},{int(i < 1)}\n" for i in range(3)))
    (tmp_path / "people.csv").write_text("identity,age\n000000,3\n")
    shutil.copy(tiny_set / "tiny.bin", tmp_path)
    large = encode_jpeg(np.zeros((48, 40, 3), np.uint8))
    write_bin(tmp_path / "large.bin", [large] * 40, [pair % 2 == 0 for pair in range(20)])
    monkeypatch.chdir(tmp_path)
    for work in ("embed_by_all", "sample_training_set"):
        monkeypatch.setattr(all_pair_test, work, lambda *_: pytest.fail("something was embedded"))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", tmp_path / "images", later, "--model", tiny_run, *options)
    assert message in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_identification_needs_people(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """--identify with pairs alone is refused, not passed over: no ranks at the end would be all that told."""
    with pytest.raises(SystemExit, match="--identify: in tiny there are only pairs"):
        run(tmp_path / "out", tiny_set / "tiny.bin", "--model", tiny_run, "--identify")
    assert not (tmp_path / "out").exists()


def test_a_column_called_norm_is_not_the_models(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """A quality of a table is taken from the table, whatever its column is called."""
    scores = "".join(f"{i},{i % 7},{i % 7}\n" for i in range(80))
    (tmp_path / "q.csv").write_text("image,norm,sharp\n" + scores)
    columns = f"{tmp_path / 'q.csv'}:norm,{tmp_path / 'q.csv'}:sharp"
    report = run(tmp_path / "out", tiny_set / "tiny.bin", "--model", tiny_run, "--no-checks", "--quality", columns)
    curves = report["sets"]["tiny"]["models"]["tiny"]["error_versus_reject"]
    assert list(curves) == [f"norm of {tmp_path / 'q.csv'}", "sharp"]
    assert curves[f"norm of {tmp_path / 'q.csv'}"] == curves["sharp"]


def test_a_tested_run_gets_a_record_for_tensorboard(tiny_set: Path, tiny_run: Path, tmp_path: Path) -> None:
    """The numbers of a run's test are beside the run's own curves; testing again replaces them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy, ignore=shutil.ignore_patterns("test", "checkpoints"))
    (copy / "test").mkdir()
    (copy / "test" / "roc of mine.png").touch()
    (copy / "keep.png").touch()
    foreign = {"sets": {"x": {"pictures": ["..", "../keep.png", "results.json", "\0.png", "a" * 999 + ".png"]}}}
    (copy / "test" / "report.json").write_text(json.dumps(foreign))
    sets = [str(tiny_set / "tiny.bin"), str(tiny_set)]
    for chosen in (sets, sets[:1]):
        all_pair_test.main([*chosen, "--model", str(copy), "--no-checks", *QUICK])
    # Pictures of the first test would look as if they were of the second; other files are not the test's.
    pictures = {path.name for path in (copy / "test").glob("*.png")}
    assert pictures == pictures_of(json.loads((copy / "test" / "report.json").read_text())) | {"roc of mine.png"}
    assert not [name for name in pictures if name.startswith(tiny_set.name) and "roc" in name]
    assert (copy / "test" / "results.json").exists()
    assert (copy / "keep.png").exists()
    record = EventAccumulator(str(copy / "test"))
    record.Reload()
    accuracy = json.loads((copy / "test" / "results.json").read_text())["sets"]["tiny"]["accuracy"]
    assert [event.value for event in record.Scalars("test/tiny/accuracy")] == pytest.approx([accuracy])
    assert "test/roc" in record.Tags()["images"]
    assert "test/tiny/tiny_scores" in record.Tags()["images"]


def test_processes_compare_settings_and_sets(
    tiny_set: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines with other flags, or another set under the same name, would measure something between the two."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(Ranks, "require_alike", lambda ranks, facts: asked.append(dict(facts())))
    run(tmp_path, tiny_set / "tiny.bin", "--model", tiny_run, "--no-checks")
    settings, sets = asked
    assert settings["test.draws"] == 40
    assert "common.workers" not in settings
    assert list(sets) == [str(tiny_set / "tiny.bin")]
