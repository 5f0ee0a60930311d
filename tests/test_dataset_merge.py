"""Joining sets by the program: the rules of a merge at its command line, and a valid set at the end."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.face_set_writer import write_face_set
from data.face_sets import open_face_set
from data.images import decode_rgb, encode_jpeg
from data.verification_bin import write_bin
from dataset_merge import calibration, dataset_merge, deciding, matching, merging
from dataset_merge.calibration import Calibration
from dataset_merge.deciding import Decided
from dataset_merge.merge_report import PICTURES
from tiny_faces import tiny_face
from utils.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]


def make_set(folder: Path, people: Sequence[int], shots: range) -> Path:
    """A rec set with an identity for each of `people`."""
    with write_face_set(folder, 32) as out:
        for person in people:
            out.add_identity(tiny_face(person, shot) for shot in shots)
    return folder


@pytest.fixture
def two_sets(tmp_path: Path) -> str:
    """Two sets of three people each that have two in common, in other pictures; as --merge takes them."""
    one = make_set(tmp_path / "one", (0, 1, 2), range(4))
    two = make_set(tmp_path / "two", (2, 9, 1), range(4, 7))
    return f"{one},{two}"


def merge(sets: str, output: Path, run: Path, *flags: str) -> list[dict[str, str]]:
    """Run the program with t 0.99, which parts the drawn people; the rows of merge.csv."""
    command = ["--merge", sets, "--output", str(output), "--model", str(run), "--workers", "0", "--t", "0.99", *flags]
    dataset_merge.main([*command, "--device", "cpu"])
    folder = output.with_name(f"{output.name}.dry_run") if "--dry-run" in flags else output
    return list(csv.DictReader((folder / "merge.csv").open()))


def images(folder: Path) -> list[list[bytes]]:
    """The images of each identity of a set."""
    faces = open_face_set(folder)
    found: list[list[bytes]] = [[] for _ in faces.identities]
    for i, label in enumerate(faces.labels.tolist()):
        found[label].append(faces.encoded(i))
    return found


def drawn(person: int, shots: range) -> list[bytes]:
    return [tiny_face(person, shot) for shot in shots]


def test_merged_set_is_valid_and_complete(
    tmp_path: Path, two_sets: str, tiny_run: Path, capsys: pytest.CaptureFixture
) -> None:
    """All images of all sets, bytes as they were, under labels without holes, with a row for every identity."""
    merged = tmp_path / "merged"
    rows = merge(two_sets, merged, tiny_run)
    assert "merged" in capsys.readouterr().out
    assert list(rows[0]) == [
        "source",
        "label",
        "images",
        "new_label",
        "match_source",
        "match_label",
        "score",
        "decision",
    ]
    assert [(row["label"], row["decision"], row["new_label"], row["images"]) for row in rows[3:]] == [
        ("0", "joined", "2", "3"),
        ("1", "added", "3", "3"),
        ("2", "joined", "1", "3"),
    ]
    assert (rows[3]["match_source"], rows[3]["match_label"]) == ("0", "2")
    assert float(rows[3]["score"]) >= 0.99
    faces = open_face_set(merged)
    assert faces.identities == ["0", "1", "2", "3"]
    assert (merged / "property").read_text() == "4,32,32"
    wanted = [(0, range(4)), (1, range(4)), (1, range(4, 7)), (2, range(4)), (2, range(4, 7)), (9, range(4, 7))]
    assert [faces.encoded(i) for i in range(len(faces))] == [tiny_face(p, s) for p, shots in wanted for s in shots]
    report = (merged / "report.html").read_text()
    assert "0.99" in report
    assert report.count("<img") >= 2
    with pytest.raises(SystemExit, match=r"merged exists and is not empty"):
        merge(two_sets, merged, tiny_run)


def test_a_warning_of_the_calibration_is_shown(
    tmp_path: Path, two_sets: str, tiny_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What speaks against the threshold is on the screen and in the report."""

    def decide(*arguments: Any) -> Decided:
        nothing = np.zeros(1, np.int64)
        told = Calibration(0.99, np.array([0.0, 1.0]), nothing, nothing, [], 0, (0, 0), 1, False, 1, 1, 1, "odd labels")
        return replace(deciding.decide(*arguments), calibration=told)

    monkeypatch.setattr(merging, "decide", decide)
    merge(two_sets, tmp_path / "merged", tiny_run, "--dry-run")
    assert "odd labels" in capsys.readouterr().out
    assert "odd labels" in (tmp_path / "merged.dry_run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("known", "spelled", "t", "warned"),
    [
        ("tiny", "{set}", "auto", True),
        ("tiny", "{set}/train.rec", "auto", True),
        ("tiny", "{link}", "auto", True),
        ("by a link", "{set}", "auto", True),
        ("by a relative path", "{set}", "auto", True),
        ("tiny", "{set}", "0.99", False),  # somebody else's judgement
        ("other", "{set}", "auto", False),
    ],
)
def test_a_model_that_knows_a_set_by_heart_is_warned_of(
    tmp_path: Path, tiny_set: Path, tiny_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    known: str, spelled: str, t: str, warned: bool,
) -> None:  # fmt: skip
    """Its people are farther apart than new ones will be, however the set is spelled: --t auto cannot see that."""

    def decide(embeddings: Any, labels: Any, identities: Any, settings: Any, *more: Any) -> Decided:
        return deciding.decide(embeddings, labels, identities, replace(settings, t=0.99), *more)

    monkeypatch.setattr(merging, "decide", decide)  # the set is too small to find a threshold from
    monkeypatch.setattr(calibration, "_LEAST_IDENTITIES", 2)
    (tmp_path / "link").symlink_to(tiny_set)
    first = spelled.format(set=tiny_set, link=tmp_path / "link")
    if known.startswith("by "):
        tiny_run = Path(shutil.copytree(tiny_run, tmp_path / "runs" / "name"))
        trained_with = json.loads((tiny_run / "config.json").read_text())
        # Merged from another folder than the one where the training was started, in which `runs` is.
        trained_with["data"]["root"] = [str(tmp_path / "link") if known == "by a link" else "link"]
        (tiny_run / "config.json").write_text(json.dumps(trained_with))
    if known == "other":
        first = str(make_set(tmp_path / "other", (20, 21), range(2)))
    second = make_set(tmp_path / "two", (2, 9, 1), range(4, 7))
    merge(f"{first},{second}", tmp_path / "merged", tiny_run, "--dry-run", "--t", t)
    told = f"{tiny_run} was trained on {open_face_set(first).path}: " in capsys.readouterr().out
    assert told == warned
    assert ("was trained on" in (tmp_path / "merged.dry_run" / "report.html").read_text()) == warned


def test_what_a_dry_run_compared_is_not_compared_again(
    tmp_path: Path, two_sets: str, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a dry run, or a kill while images are written, the same merge takes the matches from the cache."""
    monkeypatch.setattr(matching, "_SAVED_AFTER", 0.0)
    before = merge(two_sets, tmp_path / "merged", tiny_run, "--dry-run")

    def offer(*_: Any) -> None:
        raise AssertionError("compared again")

    monkeypatch.setattr(matching._Kept, "offer", offer)
    assert merge(two_sets, tmp_path / "merged", tiny_run) == before


@pytest.mark.parametrize(
    ("on_match", "second", "third"),
    [("drop", drawn(1, range(4)), drawn(2, range(4))), ("keep-larger", drawn(1, range(4)), drawn(2, range(4, 10)))],
)
def test_a_person_is_taken_from_one_set(
    tmp_path: Path, tiny_run: Path, on_match: str, second: list[bytes], third: list[bytes]
) -> None:
    """drop: that of the set named first; keep-larger: that of the set with more images."""
    make_set(tmp_path / "one", (0, 1, 2), range(4))
    with write_face_set(tmp_path / "two", 32) as out:
        out.add_identity(drawn(1, range(4, 7)))
        out.add_identity(drawn(2, range(4, 10)))
    sets = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    rows = merge(sets, tmp_path / "merged", tiny_run, "--on-match", on_match)
    assert sum(row["decision"] == "dropped" for row in rows) == 2
    assert images(tmp_path / "merged") == [drawn(0, range(4)), second, third]


def test_order_of_the_sets_decides_nothing_but_labels(tmp_path: Path, tiny_run: Path) -> None:
    """Three sets in any order: the same images together."""
    sets = [
        make_set(tmp_path / str(number), people, range(3 * number, 3 * number + 3))
        for number, people in enumerate(((0, 1, 2), (2, 3, 0), (4, 2, 1)))
    ]
    together = []
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        merge(",".join(str(sets[i]) for i in order), tmp_path / name, tiny_run)
        together.append({frozenset(identity) for identity in images(tmp_path / name)})
    assert together[0] == together[1]
    assert sorted(map(len, together[0])) == [3, 3, 6, 6, 9]


def test_within_joins_identities_of_one_set(tmp_path: Path, tiny_run: Path) -> None:
    """One set by itself, with a person in it twice."""
    with write_face_set(tmp_path / "one", 32) as out:
        for person, shots in ((0, range(4)), (1, range(4)), (0, range(4, 8))):
            out.add_identity(drawn(person, shots))
    merge(str(tmp_path / "one"), tmp_path / "merged", tiny_run, "--within")
    assert images(tmp_path / "merged") == [drawn(0, range(8)), drawn(1, range(4))]


def test_copies_are_taken_once(tmp_path: Path, tiny_run: Path) -> None:
    """The second set has pictures of the first again, one as a JPEG; --duplicates says which of them stay."""
    faces = drawn(0, range(4))
    copy = encode_jpeg(decode_rgb(faces[1], ""), 90)
    with write_face_set(tmp_path / "one", 32) as out:
        out.add_identity(faces)
        out.add_identity(drawn(1, range(4)))
    with write_face_set(tmp_path / "two", 32) as out:
        out.add_identity([faces[0], copy, tiny_face(0, 7)])
    sets = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    for flag, expected in (
        ("near", [*faces, tiny_face(0, 7)]),
        ("bytes", [*faces, copy, tiny_face(0, 7)]),
        ("keep", [*faces, faces[0], copy, tiny_face(0, 7)]),
    ):
        merge(sets, tmp_path / flag, tiny_run, "--duplicates", flag, "--cache", str(tmp_path / "cache"))
        assert images(tmp_path / flag)[0] == expected
    rows = list(csv.DictReader((tmp_path / "near" / "duplicates.csv").open()))
    assert [row["kind"] for row in rows] == ["bytes", "near"]
    assert "two" in rows[0]["image"]
    assert "one" in rows[0]["original"]


def test_copies_are_looked_for_anew_by_other_embeddings(tmp_path: Path, two_sets: str, tiny_run: Path) -> None:
    """Those with the mirror image added have other candidates among them: what the cache has of the same identities
    by the plain ones is no answer."""
    flags = ["--dry-run", "--cache", str(tmp_path / "cache")]
    merge(two_sets, tmp_path / "first", tiny_run, *flags)
    again = ["--decisions", str(tmp_path / "first.dry_run" / "merge.csv")]
    found = []
    for mirror in ("--no-mirror", "--mirror"):
        merge(two_sets, tmp_path / "second", tiny_run, *flags, *again, mirror)
        found.append(len(list((tmp_path / "cache").glob("duplicates-*"))))
    assert found == [1, 2]


def test_people_of_test_sets_are_left_out(tmp_path: Path, two_sets: str, tiny_run: Path) -> None:
    """By a .bin and by a set; who is joined with one of them goes, too, and merge.csv says whom they match."""
    write_bin(
        tmp_path / "test.bin", [tiny_face(1, 90), tiny_face(1, 91), tiny_face(50, 0), tiny_face(51, 0)], [True, False]
    )
    other = make_set(tmp_path / "other", (9, 60), range(50, 53))
    flags = ("--exclude", f"{tmp_path / 'test.bin'},{other}", "--exclude-t", "0.985")
    rows = merge(two_sets, tmp_path / "merged", tiny_run, *flags)
    assert [row["decision"] for row in rows] == ["added", "excluded", "added", "joined", "excluded", "excluded"]
    assert rows[4]["match_source"] == str(other)
    assert "test.bin" in rows[1]["match_source"]
    assert "pair 0" in rows[1]["match_label"]
    assert images(tmp_path / "merged") == [drawn(0, range(4)), drawn(2, range(7))]
    assert "People of test sets" in (tmp_path / "merged" / "report.html").read_text()


def test_cleaning_is_reported_and_applied_when_asked(tmp_path: Path, tiny_run: Path) -> None:
    """A picture of somebody else in an identity: listed by report, gone by apply."""
    with write_face_set(tmp_path / "one", 32) as out:
        out.add_identity([*drawn(0, range(6)), tiny_face(4, 0)])
        out.add_identity(drawn(1, range(6)))
    two = make_set(tmp_path / "two", (1,), range(6, 9))
    for flag, expected in (("report", [*drawn(0, range(6)), tiny_face(4, 0)]), ("apply", drawn(0, range(6)))):
        flags = ("--clean", flag, "--clean-outlier", "0.9", "--cache", str(tmp_path / "cache"))
        rows = merge(f"{tmp_path / 'one'},{two}", tmp_path / flag, tiny_run, *flags)
        assert rows[0]["images"] == str(len(expected))
        found = list(csv.DictReader((tmp_path / flag / "cleaning.csv").open()))
        assert [(row["label"], row["finding"]) for row in found] == [("0", "outlier")]
        assert "record 7" in found[0]["image"]
        assert images(tmp_path / flag) == [expected, drawn(1, range(9))]
    again = ("--decisions", str(tmp_path / "apply" / "merge.csv"))  # which is of the sets as they lie on the disk
    assert merge(f"{tmp_path / 'one'},{two}", tmp_path / "again", tiny_run, *flags, *again) == rows


def test_a_dry_run_writes_no_set_and_its_table_is_applied(
    tmp_path: Path, two_sets: str, tiny_run: Path, capsys: pytest.CaptureFixture
) -> None:
    """Look first, edit, then merge: without a model where bytes decide about duplicates."""
    merged, dry = tmp_path / "merged", tmp_path / "merged.dry_run"
    merge(two_sets, merged, tiny_run, "--dry-run")
    left = [dry / name for name in (*PICTURES, "duplicates.csv", "cleaning.csv")]
    for path in left:  # of a run with other settings, say
        path.write_text("stale")
    merge(two_sets, merged, tiny_run, "--dry-run")
    assert not [path.name for path in left if path.exists() and path.read_bytes() == b"stale"]
    assert not merged.exists()
    assert not list(dry.glob("*.rec"))
    assert "the set itself would take" in capsys.readouterr().out
    table = (dry / "merge.csv").read_text().replace(",joined", ",dropped", 1)
    (tmp_path / "edited.csv").write_text(table)
    again = ["--decisions", str(tmp_path / "edited.csv"), "--duplicates", "bytes", "--model", "/nowhere"]
    rows = merge(two_sets, merged, tiny_run, *again)
    assert [row["decision"] for row in rows[3:]] == ["dropped", "added", "joined"]
    assert images(merged) == [drawn(0, range(4)), drawn(1, range(7)), drawn(2, range(4)), drawn(9, range(4, 7))]
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith(f"train on it with: python train.py --data.root {merged} --data.image-size 32")


def test_embeddings_are_made_once(
    tmp_path: Path, two_sets: str, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another threshold costs no new pass over the images."""
    merge(two_sets, tmp_path / "a", tiny_run, "--cache", str(tmp_path / "cache"))

    def fail(*arguments: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr("models.embedders.NetworkEmbedder.features", fail, raising=False)
    rows = merge(two_sets, tmp_path / "b", tiny_run, "--t", "-1", "--cache", str(tmp_path / "cache"))
    assert sum(row["decision"] == "joined" for row in rows) >= 2


def test_embeddings_need_no_memory(
    tmp_path: Path, two_sets: str, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of large sets are mapped from the cache; the merge is the same, and nothing else of them is on the disk."""
    in_memory = merge(two_sets, tmp_path / "a", tiny_run)
    monkeypatch.setattr("models.feature_cache.MAPPED_FROM", 0)
    cache = tmp_path / "cache"
    assert merge(two_sets, tmp_path / "b", tiny_run, "--clean", "apply", "--cache", str(cache)) == in_memory
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) < 1 << 14


def test_a_killed_merge_goes_on(tmp_path: Path, two_sets: str, tiny_run: Path) -> None:
    """Killed while it writes: no set is there; the same command goes on, and the set is the same to the byte."""
    merge(two_sets, tmp_path / "whole", tiny_run)
    child = os.fork()
    if not child:
        merging.write_images = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        merge(two_sets, tmp_path / "merged", tiny_run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    merge(two_sets, tmp_path / "merged", tiny_run)
    for name in ("train.rec", "train.idx", "merge.csv"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".*.partial"))


def test_two_ranks_make_what_one_makes(tmp_path: Path, two_sets: str, tiny_run: Path) -> None:
    """Under torchrun the ranks share the embedding, and one of them writes."""
    merge(two_sets, tmp_path / "one_rank", tiny_run)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(ROOT / "dataset_merge" / "dataset_merge.py"), "--merge", two_sets, "--model", str(tiny_run)]
    flags = ["--output", str(tmp_path / "two_ranks"), "--t", "0.99", "--device", "cpu", "--workers", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*launch, *script, *flags], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html tells how") == 1
    for name in ("train.rec", "merge.csv"):
        assert (tmp_path / "two_ranks" / name).read_bytes() == (tmp_path / "one_rank" / name).read_bytes()


def test_a_full_disk_is_told_before_the_writing(
    tmp_path: Path, two_sets: str, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is begun for which there is no room."""
    monkeypatch.setattr("dataset_merge.disk_space.available", lambda output: 10_000)
    with pytest.raises(
        SystemExit, match=r"merged needs .* KiB beside 1\.3 KiB of embeddings, but its disk has 9\.8 KiB"
    ):
        merge(two_sets, tmp_path / "merged", tiny_run)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(SystemExit, match=r"embeddings need 1\.3 KiB in .*elsewhere, but its disk has 10 B"):
        merge(two_sets, tmp_path / "merged", tiny_run, "--cache", str(tmp_path / "elsewhere"))
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--merge", "a"], "two sets or more"),
        (["--merge", "a,b"], "name a folder for the merged set"),
        (["--merge", "a,b", "--output", "c"], "a does not exist"),
        (["--merge", "{sets}", "--output", "c", "--model", "/no", "--exclude", "/no.bin"], "/no.bin"),
        (["--merge", "{sets}", "--output", "{one}/c", "--model", "/no"], "one/c lies inside the set .*one"),
        (["--merge", "{sets}", "--output", "c", "--cache", "{one}", "--model", "/no"], "outside of it with --cache"),
        (["--merge", "{sets}", "--output", "c", "--runs", "/nowhere"], "no model is named"),
        (
            ["--merge", "{sets}", "--output", "c", "--runs", "/nowhere", "--decisions", "{one}/property"],
            "no model is named.*--duplicates bytes, or keep, goes without",
        ),
        (["--merge", "{sets}", "--output", "c", "--model", "/nowhere.onnx"], "there is no model at /nowhere.onnx"),
        (["--merge", "{sets}", "--output", "c", "--decisions", "/nowhere.csv"], "no table of decisions at /nowhere"),
        (["--merge", "a,b", "--output", "c", "--decisions", "d", "--exclude", "e"], "cannot be combined"),
        (["--merge", "{sets}", "--output", "c", "--t", "auto", "--model", "/no"], "needs 200 identities or more"),
        (["--merge", "{sets}", "--output", "c", "--wrong-joins", "0.02", "--model", "/no"], "--t 0.65 is one: leave"),
    ],
)
def test_errors_say_what_is_missing(flags: list[str], message: str, two_sets: str) -> None:
    """Each thing that a merge needs is asked for by its name."""
    with pytest.raises(SystemExit, match=f"dataset_merge: .*{message}"):
        dataset_merge.main([flag.format(sets=two_sets, one=two_sets.split(",")[0]) for flag in flags])


def test_processes_compare_settings_and_sets(
    tmp_path: Path, two_sets: str, tiny_set: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines with other flags, or another set under the same name, would join people who are none."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(Ranks, "require_alike", lambda ranks, facts: asked.append(dict(facts())))
    merge(two_sets, tmp_path / "merged", tiny_run, "--exclude", str(tiny_set / "tiny.bin"), "--exclude-t", "1")
    settings, sets = asked
    assert settings["merge.t"] == 0.99
    assert "common.workers" not in settings
    assert [Path(name).parent.name for name in sets] == ["one", "two", tiny_set.name]
    assert len(set(sets.values())) == 3
