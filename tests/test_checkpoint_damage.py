"""Damaged checkpoints are seen, whatever was done to them, and what may be whole is left as it is."""

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from saved_steps import is_step, names, save_step
from utils.checkpoints import CheckpointError
from utils.ranks import Ranks
from utils.training import saved_checkpoints
from utils.training.checkpoint_store import CheckpointStore, Rows
from utils.training.host_copy import FileSum, file_sum
from utils.training.run_notes import require_run_notes
from utils.training.saved_checkpoints import DamagedError, Saved, manifest_text


def damaged_by(damage: str, checkpoint: Path) -> None:
    """Do to a checkpoint what disks, copies and people do."""
    rows, manifest = checkpoint / "rows-00000-of-00001.safetensors", checkpoint / "manifest.json"
    data = bytearray(rows.read_bytes())
    match damage:
        case "truncated":
            rows.write_bytes(data[:-1])
        case "longer":
            rows.write_bytes(data + b"\0")
        case "flipped":
            data[-5] ^= 16
            rows.write_bytes(data)
        case "no shard":
            rows.unlink()
        case "no manifest":
            manifest.unlink()
        case "empty manifest":
            manifest.write_bytes(b"")
        case "other manifest":
            manifest.write_text("[1]")
        case "edited":
            manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("truncated", r"rows-00000-of-00001.safetensors has [\d,]+ bytes instead of [\d,]+$"),
        ("longer", r"rows-00000-of-00001.safetensors has [\d,]+ bytes instead of [\d,]+$"),
        ("flipped", r"rows-00000-of-00001.safetensors has CRC-32 \w{8} instead of \w{8}$"),
        ("no shard", r"rows-00000-of-00001.safetensors is not there$"),
        ("no manifest", r"manifest.json is not there$"),
        ("empty manifest", r"manifest.json is not as it was written$"),
        ("other manifest", r"manifest.json is not as it was written$"),
        ("edited", r"manifest.json is not as it was written$"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, named: str) -> None:
    """The one before it is taken, a line names the file, and what is left of it is out of the way of later ones."""
    folder = tmp_path / "checkpoints"
    said: list[str] = []
    with CheckpointStore(folder, Ranks(), say=said.append) as store:
        save_step(store, 1, Ranks())
        save_step(store, 2, Ranks(), wait=True)
        damaged_by(damage, folder / "step-000000002")
        assert is_step(store, 1)
        (problem, passed_over) = said
        assert re.search(named, problem)
        assert "step-000000002 is damaged and passed over" in passed_over
        assert is_step(store, 1)
        assert len(said) == 2
        save_step(store, 2, Ranks())
        assert is_step(store, 2)
    assert [name[:22] for name in names(folder)] == ["damaged-step-000000002", "step-000000001", "step-000000002"]


def test_a_checkpoint_that_cannot_be_read_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away is no damage: going on from an older one, or from the start, would be lost work."""
    folder = tmp_path / "checkpoints"

    def fail(path: Path) -> FileSum:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with CheckpointStore(folder, Ranks(), say=print) as store:
        save_step(store, 1, Ranks())
        save_step(store, 2, Ranks(), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(saved_checkpoints, "file_sum", fail)
            message = r"step-000000002 could not be checked, and is left as it is: .* cannot be read: Stale file handle"
            with pytest.raises(CheckpointError, match=message):
                store.newest()
        assert is_step(store, 2)
    assert names(folder) == ["step-000000001", "step-000000002"]


def test_no_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    """A bit turned over in any byte of any file is either seen or, in white space of the manifest, changes nothing."""
    folder = tmp_path / "checkpoints"
    with CheckpointStore(folder, Ranks(), say=lambda line: None) as store:
        save_step(store, 1, Ranks(), wait=True)
        checkpoint = folder / "step-000000001"
        unseen = 0
        for file in sorted(checkpoint.iterdir()):
            data = file.read_bytes()
            for place in range(len(data)):
                damaged = bytearray(data)
                damaged[place] ^= 1 << place % 8
                file.write_bytes(damaged)
                if saved := store.newest():
                    assert file.name == "manifest.json"
                    assert (saved.step, saved.notes) == (1, {"best": 1 / 7})
                    unseen += 1
                else:
                    (aside,) = folder.glob("damaged-*")
                    aside.rename(checkpoint)
            file.write_bytes(data)
        assert is_step(store, 1)
    assert unseen < 200


def test_another_versions_format_is_not_taken_for_damage(tmp_path: Path) -> None:
    """Nothing is passed over or renamed: the user is told to use the version that wrote it."""
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        save_step(store, 1, Ranks(), wait=True)
        manifest = tmp_path / "checkpoints" / "step-000000001" / "manifest.json"
        content = json.loads(manifest.read_text())["content"]
        manifest.write_text(manifest_text({**content, "format": 2}))
        with pytest.raises(CheckpointError, match=r"manifest.json has format 2, this version reads 1"):
            store.newest()
    assert names(tmp_path / "checkpoints") == ["step-000000001"]


def replaced(content: dict[str, Any], place: str, value: object) -> dict[str, Any]:
    """A copy of a manifest's content with another value in a place: the names that lead there."""
    *way, last = place.split()
    copied = json.loads(json.dumps(content))
    reduce(getitem, way, copied)[last] = value
    return copied


SHARD = "rows-00000-of-00001.safetensors"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", "x"),
        ("step", None),
        ("step", True),
        ("step", -5),
        ("ranks", 0),
        ("ranks", 10**9),
        ("notes", []),
        ("files", "x"),
        ("files", {}),
        (f"files {SHARD}", None),
        (f"files {SHARD}", {"size": 1}),
        (f"files {SHARD}", {"bytes": 1.5, "crc32": 0}),
        ("files ../passwd.safetensors", {"bytes": 1, "crc32": 0}),
        ("rows", 3),
        ("rows centres", None),
        ("rows centres dtype", "F99"),
        ("rows centres dtype", ["F64"]),
        ("rows centres shape", []),
        ("rows centres shape", "x"),
        ("rows centres shape", [11, 10**9]),
        ("rows centres ranges", []),
        ("rows centres ranges", [[0, 10]]),
        ("rows centres ranges", [[-1, 11]]),
        ("rows centres ranges", [[0, 5], [5, 11]]),
        ("rows centres ranges", [[0]]),
    ],
)
def test_a_manifest_of_somebody_else_is_damage(tmp_path: Path, place: str, value: object) -> None:
    """One with a right checksum over something else is passed over, with a word, for the checkpoint before it: no
    centres come out of memory that nobody filled, no file out of another folder, no error out of Python."""
    said: list[str] = []
    with CheckpointStore(tmp_path / "checkpoints", Ranks(), say=said.append) as store:
        for step in (1, 2):
            save_step(store, step, Ranks(), wait=True)
        manifest = tmp_path / "checkpoints" / "step-000000002" / "manifest.json"
        manifest.write_text(manifest_text(replaced(json.loads(manifest.read_text())["content"], place, value)))
        newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    assert said[0] == f"{manifest} is not as it was written"


def read_centres(saved: Saved) -> torch.Tensor:
    """All of them."""
    return saved.rows("centres", 0, 11)


@pytest.mark.parametrize(
    ("file", "content", "read", "message"),
    [
        ("whole.safetensors", b"x", Saved.whole, "cannot be read"),
        ("backbone.safetensors", b"x", Saved.backbone, "cannot be read"),
        (SHARD, b"x", read_centres, "cannot be read"),
        (SHARD, save({"counts": torch.zeros(11, 3)}), read_centres, "cannot be read"),
        (SHARD, save({"centres": torch.zeros(1, 3)}), read_centres, "does not have the rows of centres"),
    ],
)
def test_a_file_of_somebody_else_is_named(
    tmp_path: Path, file: str, content: bytes, read: Callable[[Saved], object], message: str
) -> None:
    """One whose checksum is in the manifest, but which is no file of tensors, or has other ones than are said."""
    with CheckpointStore(tmp_path, Ranks()) as store:
        state = {"weight": torch.ones(9)}
        store.save(1, state, {"centres": Rows(torch.ones(11, 3), 0, 11)}, {}, wait=True, backbone=state)
        checkpoint = tmp_path / "step-000000001"
        (checkpoint / file).write_bytes(content)
        found = json.loads((checkpoint / "manifest.json").read_text())["content"]
        found["files"][file] = asdict(file_sum(checkpoint / file))
        (checkpoint / "manifest.json").write_text(manifest_text(found))
        saved = store.newest()
    assert saved is not None
    with pytest.raises(DamagedError, match=f"{file} {message}"):
        read(saved)


NOTES = {
    "settings": {"train": {"seed": 0}},
    "best_accuracy": 0.5,
    "best_measured": {"sets": {}, "image_size": 112, "mirror": True},
    "verify_due": False,
    "images": 1,
    "labels": 2,
    "identities": 3,
    "scaler": {},
    "skipped": [4],
    "torch": "2.11",
}


def saved_with(folder: Path, notes: dict[str, object], backbone: bool = True) -> Saved:
    """A checkpoint with these notes."""
    with CheckpointStore(folder, Ranks()) as store:
        store.save(1, {}, {}, notes, wait=True, backbone={"weight": torch.ones(2)} if backbone else None)
    return Saved(folder / "step-000000001")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", None),
        ("settings", {"train": 5}),
        ("best_accuracy", "x"),
        ("best_accuracy", True),
        ("best_accuracy", -3),
        ("best_accuracy", float("nan")),
        ("best_measured", None),
        ("best_measured", {"sets": []}),
        ("verify_due", "yes"),
        ("images", None),
        ("labels", 1.5),
        ("identities", None),
        ("scaler", None),
        ("scaler", {"scale": 1.0}),
        ("skipped", 3),
        ("skipped", ["x"]),
    ],
)
def test_notes_of_somebody_else_are_damage(tmp_path: Path, name: str, value: object) -> None:
    """Whatever a run goes on with is there, and of its kind; the message says where it is not."""
    with pytest.raises(DamagedError, match=f"manifest.json has no '{name}' of a run in its notes"):
        require_run_notes(saved_with(tmp_path, {**NOTES, name: value}))


@pytest.mark.parametrize("name", ["settings", "best_accuracy", "identities", "scaler", "skipped"])
def test_notes_that_are_not_there_are_damage(tmp_path: Path, name: str) -> None:
    """Every version wrote these; and none a checkpoint without a network."""
    with pytest.raises(DamagedError, match=f"manifest.json has no '{name}' of a run"):
        require_run_notes(saved_with(tmp_path / "notes", {key: value for key, value in NOTES.items() if key != name}))
    with pytest.raises(DamagedError, match=r"manifest.json has no backbone.safetensors"):
        require_run_notes(saved_with(tmp_path / "network", NOTES, backbone=False))


@pytest.mark.parametrize("scaler", [{}, torch.amp.GradScaler("cpu").state_dict()])
def test_notes_of_a_run_are_none(tmp_path: Path, scaler: dict[str, object]) -> None:
    """Of this version, and of older ones, which did not note so much."""
    require_run_notes(saved_with(tmp_path / "now", {**NOTES, "scaler": scaler}))
    later = {"best_measured", "verify_due", "images", "labels", "torch"}
    require_run_notes(saved_with(tmp_path / "then", {key: NOTES[key] for key in NOTES.keys() - later}))


def test_a_checkpoint_with_other_notes_is_passed_over(tmp_path: Path) -> None:
    """As any other damaged one, where the reader says what the notes have to be."""
    said: list[str] = []
    with CheckpointStore(tmp_path / "checkpoints", Ranks(), say=said.append) as store:
        for step, notes in ((1, NOTES), (2, {})):
            store.save(step, {}, {}, notes, wait=True, backbone={"weight": torch.ones(2)})
        newest = store.newest(require_run_notes)
    assert newest is not None
    assert newest.step == 1
    assert "step-000000002/manifest.json has no 'settings' of a run in its notes" in said[0]
