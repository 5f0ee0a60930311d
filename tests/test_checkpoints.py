"""What a run leaves on disk: complete, readable by others, and refused when it is not what it should be."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from models.embedders import load_embedder
from models.weights import model_file
from utils.checkpoints import (
    CheckpointError,
    Progress,
    load_backbone,
    newest_run,
    run_settings,
    save_backbone,
)
from utils.files import atomic_folder, atomic_write

SETTINGS = '{"model": {"network": "demo"}}'


def a_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_backbone_file_is_plain_safetensors_with_its_settings(tmp_path: Path) -> None:
    """Anyone can read the weights without this project; this project needs nothing but the file."""
    from safetensors import safe_open

    layer = a_layer()
    save_backbone(tmp_path / "b.safetensors", layer, SETTINGS, Progress(3, 0.25))
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert set(file.keys()) == {"weight", "bias"}
        assert file.metadata()["best_accuracy"] == "0.25"
    state, settings = load_backbone(tmp_path / "b.safetensors")
    assert torch.equal(state["weight"], layer.weight)
    assert settings == {"model": {"network": "demo"}}


@pytest.mark.parametrize("size", [0, -1, 2**63, True, 32.0])
@pytest.mark.parametrize("field", ["embedding_size", "image_size"])
def test_settings_that_no_network_can_have(field: str, size: object) -> None:
    """A file may say anything of itself: no network of a size that torch refuses, or memory cannot hold, is made."""
    good: dict[str, object] = {"network": "demo", "embedding_size": 16, "image_size": 32}
    for found, usable in ((good, True), ({**good, field: size}, False)):
        text = json.dumps({"model": found, "data": found})
        assert bool(run_settings({"settings": text})) == usable
    assert run_settings({"settings": "[" * 100_000}) == {}


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of a save costs the new checkpoint, never the old one."""
    layer = a_layer()
    save_backbone(tmp_path / "b", layer, SETTINGS, Progress(1, 0.0))
    before = (tmp_path / "b").read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.checkpoints.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_backbone(tmp_path / "b", layer, SETTINGS, Progress(2, 0.0))
    assert (tmp_path / "b").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Damaged, foreign and missing files name themselves."""
    from safetensors.torch import save_file

    (tmp_path / "damaged").write_bytes(b"\xff" * 100)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    for name, message in (("damaged", "cannot be read"), ("foreign", "has no settings"), ("missing", "cannot be read")):
        with pytest.raises(CheckpointError, match=f"{name} .*{message}"):
            load_backbone(tmp_path / name)


def test_a_checkpoint_is_no_model(tmp_path: Path) -> None:
    """Whoever names a checkpoint's file instead of the run is told so, not shown a wall of key names."""
    from safetensors.torch import save_file

    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    for name in ("backbone", "whole"):
        save_file({"network.weight": torch.zeros(1)}, checkpoint / f"{name}.safetensors")
    for path, what in ((checkpoint / "whole.safetensors", "is part of"), (checkpoint, "is")):
        message = f"{path} {what} a checkpoint to resume from: name its run, {tmp_path}/run, its best.safetensors, or"
        with pytest.raises(CheckpointError, match=message):
            load_embedder(path)
    assert model_file(checkpoint / "backbone.safetensors").exists()


def test_newest_run_is_the_one_that_saved_last(tmp_path: Path) -> None:
    """Testing without --model takes the run whose best model is newest, whatever the names say."""
    with pytest.raises(CheckpointError, match="no model is named"):
        newest_run(tmp_path)
    for name, age in (("z", 30), ("a", 10), ("m", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.safetensors").touch()
        os.utime(tmp_path / name / "best.safetensors", (1e9 - age, 1e9 - age))
    (tmp_path / "unfinished").mkdir()
    assert newest_run(tmp_path) == tmp_path / "a"


def test_atomic_write_is_all_or_nothing(tmp_path: Path) -> None:
    """An error while writing leaves the old content and no temporary file."""
    with atomic_write(tmp_path / "f") as file:
        file.write(b"old")
    with (tmp_path / "f").open("rb") as reader:
        with atomic_write(tmp_path / "f") as file:
            file.write(b"new")
        assert reader.read() == b"old", "renamed into place: who reads the old file goes on reading it"
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "f") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "f").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_atomic_folder_never_replaces_anything(tmp_path: Path) -> None:
    """A folder appears whole or not at all, and one with content is never touched."""
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "d") as working:
        (working / "x").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "d") as working:
        (working / "x").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty"), atomic_folder(tmp_path / "d"):
        pass
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["x"]
