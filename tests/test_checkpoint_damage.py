"""Damaged checkpoints are seen, whatever was done to them, and what may be whole is left as it is."""

import errno
import json
import os
import re
from pathlib import Path

import pytest

from saved_steps import is_step, names, save_step
from utils.checkpoints import CheckpointError
from utils.ranks import Ranks
from utils.training import saved_checkpoints
from utils.training.checkpoint_store import CheckpointStore
from utils.training.host_copy import FileSum
from utils.training.saved_checkpoints import manifest_text


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


@pytest.mark.parametrize("change", [{"format": "x"}, {"step": None}, {"notes": []}, {"rows": 3}, {"files": "x"}])
def test_a_manifest_of_somebody_else_is_damage(tmp_path: Path, change: dict[str, object]) -> None:
    """One with a right checksum over something else is passed over, with a word, for the checkpoint before it."""
    said: list[str] = []
    with CheckpointStore(tmp_path / "checkpoints", Ranks(), say=said.append) as store:
        for step in (1, 2):
            save_step(store, step, Ranks(), wait=True)
        manifest = tmp_path / "checkpoints" / "step-000000002" / "manifest.json"
        manifest.write_text(manifest_text({**json.loads(manifest.read_text())["content"], **change}))
        newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    assert said[0] == f"{manifest} is not as it was written"
