"""Checkpoints: whole or not there, never older than what was finished, and readable on any number of ranks."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from live_memory import LiveMemory
from saved_steps import files_up_to, is_step, names, save_step
from utils import files
from utils.checkpoints import CheckpointError
from utils.files import BusyError
from utils.ranks import Ranks
from utils.training import checkpoint_store, host_copy
from utils.training.checkpoint_store import CheckpointStore, Rows
from utils.training.host_copy import DTYPES, HostCopy


def tensors_of_all_dtypes() -> dict[str, Tensor]:
    """A few random numbers in each dtype, and awkward shapes."""
    generator = torch.Generator().manual_seed(0)
    found = {str(dtype): (torch.randn(3, 5, generator=generator) * 50).to(dtype) for dtype in DTYPES}
    images = torch.randn(2, 3, 4, 5, generator=generator)
    return found | {
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "empty": torch.empty(0, 7),
        "channels_last": images.to(memory_format=torch.channels_last),
        "transposed": images.permute(3, 1, 0, 2),
        "parameter": torch.nn.Parameter(images[0, 0]),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike to the last bit, NaN included."""
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


@pytest.mark.parametrize("chunk", [7, host_copy.CHUNK_BYTES])
def test_every_dtype_comes_back_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """All dtypes and shapes, in memory of any cut, and notes as JSON has them."""
    monkeypatch.setattr(host_copy, "CHUNK_BYTES", chunk)
    tensors = tensors_of_all_dtypes()
    notes = {"scaler": {"scale": 65536.0}, "best": 1 / 3, "text": "\u00e9\U0001f600", "list": [1, None, True]}
    rows = {name: Rows(tensor, 0, len(tensor)) for name, tensor in tensors.items() if tensor.ndim}
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        store.save(5, tensors, rows, notes)
        saved = store.newest()
    assert saved is not None
    assert (saved.step, saved.ranks, saved.notes) == (5, 1, notes)
    whole = saved.whole()
    assert set(whole) == set(tensors)
    assert all(same_bits(whole[name], tensor) for name, tensor in tensors.items())
    for name, part in rows.items():
        assert same_bits(saved.rows(name, 0, part.total), part.tensor)
        assert same_bits(saved.rows(name, part.total // 2, part.total), part.tensor[part.total // 2 :])


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """Byte for byte what its own `save_file` writes, so that any reader reads them; again after another set."""
    copy = HostCopy()
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors_of_all_dtypes().items()}
    for chosen in (tensors, {"a": torch.arange(3)}, {}, tensors):
        copy.take(chosen)
        copy.write(tmp_path / "ours")
        save_file(chosen, tmp_path / "theirs")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        assert set(load_file(tmp_path / "ours")) == set(chosen)


def test_what_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    """A dtype without a name in the format, and notes that are no JSON, fail where they are passed, not in a thread."""
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        with pytest.raises(ValueError, match=r"^phase: tensors of torch.complex64"):
            store.save(1, {"phase": torch.zeros(1, dtype=torch.complex64)}, {}, {})
        with pytest.raises(TypeError, match="JSON"):
            store.save(1, {}, {}, {"path": tmp_path})
        assert store.newest() is None


def test_the_host_holds_one_copy(tmp_path: Path) -> None:
    """The first save takes memory for the state, once; later ones none."""
    weight = torch.zeros(1000, 100)
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        peaks = []
        for step in range(3):
            with LiveMemory() as memory:
                store.save(step, {"a": weight}, {"b": Rows(weight, 0, 1000)}, {}, wait=True)
            peaks.append(memory.peak)
    assert peaks == [2 * weight.nbytes, 0, 0]


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, no file is written."""
    may_write, write = threading.Event(), HostCopy.write

    def write_later(self: HostCopy, path: Path) -> host_copy.FileSum:
        assert may_write.wait(30)
        return write(self, path)

    monkeypatch.setattr(HostCopy, "write", write_later)
    return may_write


def test_the_values_are_those_of_the_call(tmp_path: Path, held_back: threading.Event) -> None:
    """Training goes on before anything is written, and what it changes is not in the checkpoint."""
    weight, centres, notes = torch.ones(4), torch.ones(2, 2), {"list": [1]}
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        store.save(1, {"weight": weight}, {"centres": Rows(centres, 0, 2)}, notes)
        assert names(tmp_path / "checkpoints") == []
        weight.zero_()
        centres.zero_()
        notes["list"].append(2)
        held_back.set()
        saved = store.newest()
    assert saved is not None
    assert saved.notes == {"list": [1]}
    assert torch.equal(saved.whole()["weight"], torch.ones(4))
    assert torch.equal(saved.rows("centres", 0, 2), torch.ones(2, 2))


def test_copies_of_all_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card copies while the program goes on: weights of every kind are there before the next step may change them."""
    waited: list[Tensor] = []
    monkeypatch.setattr(checkpoint_store, "wait_for_copies", waited.extend)
    whole, centres, weight = torch.zeros(1), torch.zeros(2, 2), torch.zeros(3)
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        store.save(1, {"whole": whole}, {"centres": Rows(centres, 0, 2)}, {}, backbone={"weight": weight})
    assert {id(tensor) for tensor in waited} == {id(tensor) for tensor in (whole, centres, weight)}


def test_a_save_waits_for_the_one_before(tmp_path: Path, held_back: threading.Event) -> None:
    """Its memory is not written over while a file is made from it."""
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        save_step(store, 1, Ranks())
        threading.Timer(0.1, held_back.set).start()
        save_step(store, 2, Ranks())
        assert "step-000000001" in names(tmp_path / "checkpoints")
        assert is_step(store, 2)
        (tmp_path / "checkpoints" / "step-000000002" / "whole.safetensors").unlink()
        assert is_step(store, 1)


def test_the_last_two_stay(tmp_path: Path) -> None:
    """`keep` checkpoints are left, beside them nothing; with the modes that the umask gives."""
    before = os.umask(0o027)
    try:
        with CheckpointStore(tmp_path / "run" / "checkpoints", Ranks(), keep=2) as store:
            for step in (9, 10, 11, 1000):
                save_step(store, step, Ranks())
            assert is_step(store, 1000)
    finally:
        os.umask(before)
    assert names(tmp_path / "run") == ["checkpoints"]
    assert names(tmp_path / "run" / "checkpoints") == ["step-000000011", "step-000001000"]
    folder = tmp_path / "run" / "checkpoints" / "step-000001000"
    assert names(folder) == ["manifest.json", "rows-00000-of-00001.safetensors", "whole.safetensors"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o640}


def test_all_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, synced: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves a checkpoint with all its bytes or none by that name: synced are files, folder, new name."""
    real_replace = Path.replace
    published: list[Path] = []

    def replace(source: Path, target: Path) -> Path:
        if target.name.startswith("step-") and target.parent.name == "checkpoints":
            assert len(names(source)) == 3
            for path in (source, *source.iterdir()):
                assert synced[path.stat().st_ino] == path.stat().st_size
            synced.pop(target.parent.stat().st_ino, None)
            published.append(target)
        return real_replace(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        for step in (1, 2):
            save_step(store, step, Ranks(), wait=True)
            assert published == [tmp_path / "checkpoints" / f"step-{step:09}"]
            assert published.pop().parent.stat().st_ino in synced


def test_a_step_saved_again(tmp_path: Path) -> None:
    """The later save of a step counts; the earlier one is there until the later one is, and is not counted as kept."""
    folder = tmp_path / "checkpoints"
    with CheckpointStore(folder, Ranks(), keep=2) as store:
        save_step(store, 1, Ranks())
        for value in range(12):
            store.save(2, {"weight": torch.tensor(value)}, {}, {})
        saved = store.newest()
        assert saved is not None
        assert int(saved.whole()["weight"]) == 11
    assert names(folder) == ["step-000000001", "step-000000002-12"]


def test_what_cannot_be_removed_stops_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a removed checkpoint that somebody has open, on NFS, stays as long as they have it."""
    folder = tmp_path / "checkpoints"

    def remove(path: Path) -> None:
        if path.name.startswith("step-000000001"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        really(path)

    really = files.remove
    monkeypatch.setattr(checkpoint_store, "remove", remove)
    monkeypatch.setattr(files, "remove", remove)
    said: list[str] = []
    (folder.parent / ".checkpoints.partial" / "step-000000001-left").mkdir(parents=True)
    store = CheckpointStore(folder, Ranks(), keep=1, say=said.append)
    for step in (1, 2, 3, 4):
        save_step(store, step, Ranks(), wait=True)
    with pytest.warns(UserWarning, match=r"step-000000001.* could not be removed \(Device or resource busy\)"):
        store.finish()
    assert names(folder) == ["step-000000004"]
    assert len(said) == 1
    assert "step-000000001 could not be removed" in said[0]


def test_a_full_disk_costs_one_checkpoint(tmp_path: Path) -> None:
    """The training goes on, the old checkpoint stays, nothing is left behind, and the next save is whole."""
    said: list[str] = []
    big = {"weight": torch.zeros(50_000)}
    with CheckpointStore(tmp_path / "checkpoints", Ranks(), say=said.append) as store:
        save_step(store, 1, Ranks(), wait=True)
        with files_up_to(100_000):
            store.save(2, big, {}, {})
            assert is_step(store, 1)
        assert len(said) == 1
        assert "step 2 could not be written" in said[0]
        assert "whole.safetensors" in said[0]
        assert names(tmp_path / ".checkpoints.partial") == [".lock"]
        store.save(3, big, {}, {})
        saved = store.newest()
        assert saved is not None
        assert saved.step == 3
    assert len(said) == 1


def test_finish_raises_what_the_last_save_met(tmp_path: Path) -> None:
    """A run whose last state is not on the disk does not end as if it were; `wait` tells at once."""
    big = {"weight": torch.zeros(50_000)}
    for wait in (False, True):
        store = CheckpointStore(tmp_path / "checkpoints", Ranks(), say=lambda line: None)
        with files_up_to(100_000):
            if wait:
                with pytest.raises(OSError, match="File too large"):
                    store.save(2, big, {}, {}, wait=True)
            else:
                store.save(2, big, {}, {})
            with pytest.raises(OSError, match="File too large"):
                store.finish()
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        store.save(3, big, {}, {})
    with pytest.raises(ValueError, match="after finish"):
        store.save(4, big, {}, {})
    with pytest.raises(ZeroDivisionError), CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        store.save(5, big, {}, {})
        raise ZeroDivisionError
    assert names(tmp_path / "checkpoints") == ["step-000000003", "step-000000005"]


def test_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run resumed while it still goes on elsewhere is refused, and leaves the other's unfinished save alone."""
    monkeypatch.setattr("utils.training.checkpoint_store._LOCK_SECONDS", 0.1)
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        with pytest.raises(BusyError, match="another process"):
            CheckpointStore(tmp_path / "checkpoints", Ranks())
        save_step(store, 1, Ranks())
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        assert is_step(store, 1)


def test_the_lock_of_a_killed_run_is_waited_for(tmp_path: Path) -> None:
    """Its workers hold it a little longer than itself: a run that is started again at once gets the folder."""
    first = CheckpointStore(tmp_path / "checkpoints", Ranks())
    later = threading.Timer(0.5, first.finish)
    later.start()
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        save_step(store, 1, Ranks())
        assert is_step(store, 1)
    later.join()


def test_what_a_failed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Beside its own, all that lies in the folder of unfinished ones: a save whose files could not be removed, say."""
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        left = store._partial / "step-000000001-somebody"
        left.mkdir()
        (left / "whole.safetensors").touch()
        save_step(store, 2, Ranks(), wait=True)
        assert not left.exists()
        assert is_step(store, 2)


def test_a_checkpoint_that_cannot_be_removed_costs_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said; the new one is there."""
    said: list[str] = []

    def fail(path: Path) -> None:
        raise OSError(f"{path} is busy")

    with CheckpointStore(tmp_path / "checkpoints", Ranks(), keep=1, say=said.append) as store:
        save_step(store, 1, Ranks(), wait=True)
        monkeypatch.setattr(checkpoint_store, "remove", fail)
        save_step(store, 2, Ranks(), wait=True)
        monkeypatch.undo()
        assert is_step(store, 2)
    (line,) = said
    assert re.search("step-000000001 could not be removed: .* is busy", line)


def test_none_kept_is_refused(tmp_path: Path) -> None:
    """A run that keeps no checkpoint has nothing to go on from."""
    with pytest.raises(ValueError, match="keep: at least one"):
        CheckpointStore(tmp_path / "checkpoints", Ranks(), keep=0)
    assert not (tmp_path / "checkpoints").exists()


def test_the_folder_is_that_of_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the program goes to another one meanwhile."""
    monkeypatch.chdir(tmp_path)
    with CheckpointStore(Path("checkpoints"), Ranks()) as store:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        save_step(store, 1, Ranks(), wait=True)
    assert names(tmp_path / "checkpoints") == ["step-000000001"]


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    """A wrong name, and rows beyond the last, are errors that say what there is."""
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        save_step(store, 1, Ranks())
        saved = store.newest()
    assert saved is not None
    assert saved.rows("centres", 4, 4).shape == (0, 3)
    with pytest.raises(CheckpointError, match="no rows of 'centers'; it has centres, counts"):
        saved.rows("centers", 0, 1)
    with pytest.raises(CheckpointError, match="has 11 rows, so none from 10 to 12"):
        saved.rows("centres", 10, 12)


def run_killed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run killed_saving.py."""
    script = Path(__file__).with_name("killed_saving.py")
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_killed_before_any_operation(tmp_path: Path) -> None:
    """kill -9 before each file operation of three saves in turn: the newest is whole, and no finished step is lost."""
    ended = run_killed("operations", tmp_path / "run" / "checkpoints")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["kills"] > 50


@pytest.mark.parametrize("kills", [10, pytest.param(300, marks=pytest.mark.long)])
def test_killed_at_any_moment(tmp_path: Path, kills: int) -> None:
    """kill -9 at random moments, in the middle of writing, too."""
    ended = run_killed("moments", tmp_path / "run" / "checkpoints", 20261123, kills)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["kills"] == kills
    assert found["steps"] > 0


def test_an_interrupted_process_ends_what_it_began(tmp_path: Path) -> None:
    """A KeyboardInterrupt that nobody catches comes while a save is written; the process ends after it."""
    ended = run_killed("interrupt", tmp_path / "checkpoints")
    assert "KeyboardInterrupt" in ended.stderr
    with CheckpointStore(tmp_path / "checkpoints", Ranks()) as store:
        saved = store.newest()
    assert saved is not None
    assert saved.step == 1
