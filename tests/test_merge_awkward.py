"""Merges of awkward sets by the program: odd names, a set with itself, single images, broken embeddings."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config import MergeConfig
from data.face_set_writer import write_face_set
from data.face_sets import open_face_set
from data.images import encode_png
from data.verification_bin import write_bin
from dataset_merge import dataset_merge, opening
from dataset_merge.decisions import DecisionsError
from dataset_merge.disk_space import needed, stored_sizes
from dataset_merge.opening import open_sets
from dataset_merge.table_sources import check_sources, write_sources
from dataset_merge.unit_rows import UnitRows
from models.embedders import NetworkEmbedder
from tiny_faces import tiny_face


def merge(sets: list[Path], output: Path, run: Path, *flags: str) -> list[dict[str, str]]:
    """Run the program with t 0.99, which parts the drawn people; the rows of merge.csv."""
    command = ["--merge", ",".join(map(str, sets)), "--output", str(output), "--model", str(run), "--t", "0.99"]
    dataset_merge.main([*command, "--workers", "0", "--device", "cpu", *flags])
    with (output / "merge.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as table:
        return list(csv.DictReader(table))


def images(folder: Path) -> list[list[bytes]]:
    """The images of each identity of a set."""
    faces = open_face_set(folder)
    found: list[list[bytes]] = [[] for _ in faces.identities]
    for i, label in enumerate(faces.labels.tolist()):
        found[label].append(faces.encoded(i))
    return found


def folder_set(folder: Path, people: dict[str, list[bytes]]) -> Path:
    """A folder with a folder of images for each name."""
    for name, shots in people.items():
        (folder / name).mkdir(parents=True)
        for number, shot in enumerate(shots):
            (folder / name / f"{number}.png").write_bytes(shot)
    return folder


NAMES = ['Zoë, "the" 1st', "王菲", os.fsdecode(b"latin-1 \xe9"), "7", "007", "$x_1$ <b>"]


def test_names_of_folders_come_through(tmp_path: Path, tiny_run: Path) -> None:
    """Commas, quotes, other scripts, bytes that are no UTF-8, numbers with zeros, markup: in the table, in the report,
    and back by --decisions.
    """
    one = folder_set(tmp_path / "one", {name: [tiny_face(i, s) for s in range(3)] for i, name in enumerate(NAMES)})
    two = folder_set(tmp_path / "two", {name: [tiny_face(i, 5)] for i, name in enumerate(NAMES[::-1])})
    rows = merge([one, two], tmp_path / "a", tiny_run)
    assert sorted(row["label"] for row in rows) == sorted(2 * NAMES)
    again = merge([one, two], tmp_path / "b", tiny_run, "--decisions", str(tmp_path / "a" / "merge.csv"))
    assert again == rows
    assert images(tmp_path / "b") == images(tmp_path / "a")
    report = (tmp_path / "a" / "report.html").read_bytes().decode()
    assert "<b>" not in report.replace("<body", "")
    assert sum(map(len, images(tmp_path / "a"))) == 24


def test_a_set_with_itself_is_that_set(tmp_path: Path, tiny_run: Path) -> None:
    """Everybody joins themselves, and every picture is taken once."""
    with write_face_set(tmp_path / "one", 32) as out:
        for person in range(4):
            out.add_identity(tiny_face(person, shot) for shot in range(2))
    rows = merge([tmp_path / "one"] * 2, tmp_path / "merged", tiny_run)
    assert [row["decision"] for row in rows] == ["added"] * 4 + ["joined"] * 4
    assert images(tmp_path / "merged") == images(tmp_path / "one")


def test_identities_of_one_image(tmp_path: Path, tiny_run: Path) -> None:
    """One image each, one of them a copy: nobody is lost, no label is empty; a robust centre does not mind."""
    for name, people in (("one", (0, 1)), ("two", (1, 2))):
        with write_face_set(tmp_path / name, 32) as out:
            for person in people:
                out.add_identity([tiny_face(person, 0)])
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged", tiny_run, "--centre", "trimmed")
    assert images(tmp_path / "merged") == [[tiny_face(0, 0)], [tiny_face(1, 0)], [tiny_face(2, 0)]]


def test_nothing_left_is_said(tmp_path: Path, tiny_run: Path) -> None:
    """A merge that would write no identity at all ends with a message, and leaves no set."""
    with write_face_set(tmp_path / "one", 32) as out:
        out.add_identity([tiny_face(0, 0)])
    with pytest.raises(SystemExit, match="every identity is excluded: nothing is left to write"):
        merge([tmp_path / "one"], tmp_path / "merged", tiny_run, "--exclude", str(tmp_path / "one"))
    assert not (tmp_path / "merged").exists()


def test_embeddings_that_are_no_numbers_are_refused(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One would hide the matches of all identities that are compared with it in a block."""
    with write_face_set(tmp_path / "one", 32) as out:
        for person in range(3):
            out.add_identity([tiny_face(person, 0)])
    features = NetworkEmbedder.features

    def broken(self: NetworkEmbedder, *arguments: object) -> object:
        rows = features(self, *arguments).clone()  # type: ignore[arg-type]
        rows[1:2, 2] = float(np.nan)
        return rows

    monkeypatch.setattr(NetworkEmbedder, "features", broken)
    with pytest.raises(
        SystemExit, match=r"no finite embedding for .*one.*, record 2 at byte \d+: is the model damaged"
    ):
        merge([tmp_path / "one"] * 2, tmp_path / "merged", tiny_run)


def test_what_cannot_be_merged_is_told_before_it_is_embedded(tmp_path: Path, tiny_run: Path) -> None:
    """Test sets too, and with a way round that the flags of a merge do not have."""
    one, two = strangers(tmp_path)
    write_bin(tmp_path / "large.bin", [encode_png(np.zeros((48, 48, 3), np.uint8))] * 2, [True])
    with pytest.raises(SystemExit, match=r"large\.bin has faces of 48x48 pixels .*of 32x32: .*data/pack_bin\.py"):
        merge([one, two], tmp_path / "merged", Path("/nowhere"), "--exclude", str(tmp_path / "large.bin"))
    tree = folder_set(tmp_path / "tree", {"anna": [tiny_face(0, 0)], "bert": [tiny_face(1, 0)[:-40]]})
    with pytest.raises(SystemExit, match=r"bert/0\.png: .*--source .*tree --output NAME: .*--bad-images skip leaves"):
        merge([one, tree], tmp_path / "merged", Path("/nowhere"))


def test_a_broken_image_of_many_is_told_with_a_way_round(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that no sample sees stops the embedding."""
    monkeypatch.setattr("data.images_fingerprint.SAMPLE", 1)
    one, _ = strangers(tmp_path)
    tree = folder_set(
        tmp_path / "tree", {"anna": [tiny_face(0, 0)], "bert": [encode_png(np.zeros((9, 9, 3), np.uint8))]}
    )
    with pytest.raises(SystemExit, match=r"bert/0\.png is 9x9 pixels, expected 32x32: .*--other-sizes resize --image"):
        merge([one, tree], tmp_path / "merged", tiny_run)


def test_a_table_with_odd_matches_is_written(tmp_path: Path, tiny_run: Path) -> None:
    """Match columns that name no set matter to nobody who is not joined by them; the report does without."""
    for name, shot in (("one", 0), ("two", 1)):
        with write_face_set(tmp_path / name, 32) as out:
            for person in range(2):
                out.add_identity([tiny_face(person, shot)])
    sets = [tmp_path / "one", tmp_path / "two"]
    merge(sets, tmp_path / "a", tiny_run)
    lines = (tmp_path / "a" / "merge.csv").read_text().splitlines()
    cells = lines[1].split(",")
    cells[4:6] = ["9", "nobody"]
    (tmp_path / "edited.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    merge(sets, tmp_path / "b", tiny_run, "--decisions", str(tmp_path / "edited.csv"))
    assert images(tmp_path / "b") == images(tmp_path / "a")


def strangers(folder: Path) -> list[Path]:
    """Two sets with the same names and numbers of images, in another order of the people."""
    for name, people, shot in (("one", (0, 1, 2), 0), ("two", (1, 2, 3), 1)):
        with write_face_set(folder / name, 32) as out:
            for person in people:
                out.add_identity([tiny_face(person, shot)])
    return [folder / "one", folder / "two"]


def test_a_table_is_of_its_sets_in_their_order(tmp_path: Path, tiny_run: Path) -> None:
    """Names and numbers of images agree in any order; applied to swapped sets the table would join strangers."""
    one, two = strangers(tmp_path)
    rows = merge([one, two], tmp_path / "a", tiny_run)
    assert [row["decision"] for row in rows] == ["added"] * 3 + ["joined"] * 2 + ["added"]
    table = ("--decisions", str(tmp_path / "a" / "merge.csv"), "--duplicates", "bytes")
    with pytest.raises(SystemExit, match=f"in another order: give --merge {one},{two}"):
        merge([two, one], tmp_path / "b", tiny_run, *table)
    with pytest.raises(SystemExit, match=r"made with uncleaned sets .*, not with --clean apply --clean-outlier 0\.2 "):
        merge([one, two], tmp_path / "b", tiny_run, *table, "--clean", "apply", "--clean-outlier", "0.2")
    with write_face_set(tmp_path / "three", 32) as out:
        for person in (4, 5, 6):
            out.add_identity([tiny_face(person, 1)])
    with pytest.raises(SystemExit, match=r"made of other images than those of set 1 \(.*three"):
        merge([one, tmp_path / "three"], tmp_path / "b", tiny_run, *table)
    with pytest.raises(SystemExit, match=r"made of 2 sets, .*: give these to --merge"):
        merge([one], tmp_path / "b", tiny_run, *table)
    assert not (tmp_path / "b").exists()
    assert merge([one, two], tmp_path / "b", tiny_run, *table) == rows


def test_a_table_is_checked_before_anything_is_embedded(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in it need not wait for hours of embedding."""
    sets = strangers(tmp_path)
    (tmp_path / "merge.csv").write_text("nonsense\n")

    def features(*_: object) -> object:
        raise AssertionError("embedded")

    merge(sets, tmp_path / "a", tiny_run)
    monkeypatch.setattr(NetworkEmbedder, "features", features)
    monkeypatch.setattr("dataset_merge.dataset_merge.tell_size", lambda *_: "")
    for flags in ([], ["--clean", "report"]):
        with pytest.raises(SystemExit, match=r"merge\.csv, line 1: the first line must be source,label"):
            merge(sets, tmp_path / "b", tiny_run, "--decisions", str(tmp_path / "merge.csv"), *flags)


def test_a_table_of_unknown_sets_is_applied_with_a_remark(
    tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture
) -> None:
    """One that was saved elsewhere, without what lies beside it."""
    sets = strangers(tmp_path)
    rows = merge(sets, tmp_path / "a", tiny_run)
    (tmp_path / "edited.csv").write_bytes((tmp_path / "a" / "merge.csv").read_bytes())
    assert merge(sets, tmp_path / "b", tiny_run, "--decisions", str(tmp_path / "edited.csv")) == rows
    assert "merge.sets.json is not there" in capsys.readouterr().out
    assert "merge.sets.json is not there" in (tmp_path / "b" / "report.html").read_text()
    for damaged in (
        "{}",
        "[]",
        "{",
        '{"sets": [], "cleaning": 3}',
        '{"sets": [{"images": 1, "labels": 2, "path": 3}], "cleaning": null}',
        '{"sets": [{"images": [], "labels": "a", "path": "b"}], "cleaning": null}',
        '{"sets": [{"images": "a", "labels": "b", "path": {}}], "cleaning": null}',
        "[" * 100_000,
    ):
        (tmp_path / "merge.sets.json").write_text(damaged)
        with pytest.raises(SystemExit, match=r"merge\.sets\.json is damaged"):
            merge(sets, tmp_path / "c", tiny_run, "--decisions", str(tmp_path / "edited.csv"))


@pytest.mark.parametrize("damage", [b"kept,dropped\n1\n", b"a,b\nx,2,near,0.5\n", b"\xff\n"])
def test_kept_duplicates_that_are_damaged(tmp_path: Path, tiny_run: Path, damage: bytes) -> None:
    """What an earlier merge found and a disk has changed names itself and how to have it again."""
    sets = strangers(tmp_path)
    merge(sets, tmp_path / "a", tiny_run, "--cache", str(tmp_path / "cache"))
    (table,) = (tmp_path / "cache").glob("duplicates-*/duplicates.csv")
    table.write_bytes(damage)
    with pytest.raises(SystemExit, match=r"duplicates\.csv is damaged .*: remove .*duplicates-"):
        merge(sets, tmp_path / "b", tiny_run, "--cache", str(tmp_path / "cache"))


def test_a_table_names_what_has_changed(tmp_path: Path) -> None:
    """The order in which to give three sets; the set whose images or labels are others; how the sets were cleaned, by
    each limit. Looking for wrong images changes no set."""
    strangers(tmp_path)
    with write_face_set(tmp_path / "three", 32) as out:
        out.add_identity([tiny_face(7, 0)])
    paths = tuple(str(tmp_path / name) for name in ("one", "two", "three"))
    sets = [open_face_set(path) for path in paths]
    table, written = tmp_path / "merge.csv", tmp_path / "merge.sets.json"
    plain = MergeConfig(sets=paths)
    write_sources(tmp_path, plain, sets)
    assert check_sources(table, plain, sets) is None
    assert check_sources(table, replace(plain, clean="report"), sets) is None
    turned = replace(plain, sets=(paths[1], paths[2], paths[0]))
    with pytest.raises(DecisionsError, match=f"in another order: give --merge {','.join(paths)}$"):
        check_sources(table, turned, [sets[1], sets[2], sets[0]])
    known = json.loads(written.read_text())
    for number, what in ((1, "labels"), (2, "images")):
        changed = json.loads(json.dumps(known))
        changed["sets"][number][what] = "0"
        written.write_text(json.dumps(changed))
        with pytest.raises(
            DecisionsError, match=rf"made of other {what} than those of set {number} \(.*; then {paths[number]}"
        ):
            check_sources(table, plain, sets)
    cleaned = MergeConfig(sets=paths, clean="apply", clean_outlier=0.2, clean_mixed=0.3)
    write_sources(tmp_path, cleaned, sets)
    assert check_sources(table, cleaned, sets) is None
    for other in (
        replace(cleaned, clean_outlier=0.1),
        replace(cleaned, clean_mixed=0.1),
        replace(cleaned, clean="off"),
    ):
        with pytest.raises(
            DecisionsError, match=r"made with --clean apply --clean-outlier 0\.2 --clean-mixed 0\.3, not"
        ):
            check_sources(table, other, sets)


def test_sets_are_opened_as_the_settings_allow(tmp_path: Path) -> None:
    """One set is enough for what one set is for; a table is a file; nothing is written into a test set, nor where
    something is, unless nothing but a look was asked for; few identities matter to a threshold to be found alone."""
    one, two = map(str, strangers(tmp_path))
    table, there = tmp_path / "merge.csv", tmp_path / "there"
    table.touch()
    there.mkdir()
    (there / "photo").touch()
    pair = MergeConfig(sets=(one, two), output=str(tmp_path / "out"))
    alone = replace(pair, sets=(one,))
    for usable in (
        replace(alone, within=True),
        replace(alone, clean="report"),
        replace(alone, exclude=(two,)),
        replace(alone, decisions=str(table)),
        replace(pair, output=str(there), dry_run=True),
        replace(pair, t="auto", decisions=str(table)),
        replace(alone, t="auto", clean="report"),
    ):
        assert len(open_sets(usable).sets) == len(usable.sets)
    for refused, message in (
        (alone, "name two sets or more"),
        (replace(pair, decisions=str(there)), "no table of decisions"),
        (replace(pair, exclude=(two,), sets=(one,), output=f"{two}/out"), "out lies inside the set .*two"),
        (replace(pair, output="."), "name a folder for the merged set"),
        (replace(pair, cache=pair.output), "cache .*out lies inside the output .*out, .*outside of it with --cache"),
        (replace(pair, cache=f"{pair.output}/kept", dry_run=True), "cache .*kept lies inside the output"),
        (replace(alone, t="auto", within=True), "needs 200 identities"),
    ):
        with pytest.raises(ValueError, match=message):
            open_sets(refused)
    with pytest.raises(FileExistsError, match="there exists"):
        open_sets(replace(pair, output=str(there)))


def test_an_output_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the cache, which is written first, lies elsewhere."""
    one, two = map(str, strangers(tmp_path))
    pair = MergeConfig(sets=(one, two), output=str(tmp_path / "new" / "out"), cache=str(tmp_path / "cache"))
    (tmp_path / "file").touch()
    for dry_run in (False, True):
        with pytest.raises(OSError, match=r"out cannot be written, as .*file is a file"):
            open_sets(replace(pair, output=str(tmp_path / "file" / "new" / "out"), dry_run=dry_run))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OSError, match=rf"out cannot be written, as {tmp_path} may not be written to"):
        open_sets(pair)


def test_room_that_a_merge_is_sure_to_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first set's images, where all of them stay whatever is decided; embeddings count too, on the same disk."""
    one, two = map(str, strangers(tmp_path))
    asked: list[Path] = []
    monkeypatch.setattr(opening, "require_space", lambda output, size, embeddings: asked.append(output))
    monkeypatch.setattr(opening, "features_to_make", lambda *_: 100)
    pair = MergeConfig(sets=(one, two), output=str(tmp_path / "out"))
    opened, embedder = open_sets(pair), NetworkEmbedder.__new__(NetworkEmbedder)
    for sure, settings in (
        (True, pair),
        (True, replace(pair, on_match="drop")),
        (False, replace(pair, on_match="keep-larger")),
        (False, replace(pair, exclude=(two,))),
        (False, replace(pair, within=True)),
        (True, replace(pair, within=True, duplicates="keep")),
        (False, replace(pair, clean="apply")),
        (False, replace(pair, decisions="merge.csv")),
        (False, replace(pair, dry_run=True)),
    ):
        asked.clear()
        opening.tell_size(settings, opened, embedder)
        assert bool(asked) == sure, settings
    most = needed(np.concatenate([stored_sizes(faces) for faces in opened.sets]), 6)
    for free, fits in ((most + 200, True), (most + 199, False)):
        monkeypatch.setattr(opening, "available", lambda output, free=free: free)
        assert ("it may not fit" in opening.tell_size(pair, opened, embedder)) != fits


def test_taking_unit_vectors_leaves_the_features() -> None:
    """Their lengths are the model's, and the same memory may be a file's, or another part's."""
    features = np.full((3, 4), 2.0, np.float32)
    assert torch.equal(UnitRows(features, str)[0:2], torch.full((2, 4), 0.5))
    assert (features == 2).all()
