"""Saves checkpoints in processes that are killed on the way, or that end by an interrupt, for test_checkpoint_store.py.

    python tests/killed_saving.py operations FOLDER        kill -9 before each operation on files in turn
    python tests/killed_saving.py moments FOLDER SEED N    kill -9 at N random moments
    python tests/killed_saving.py interrupt FOLDER         be interrupted while a save is under way

After each kill the newest checkpoint has to be whole, have the values of its step, and be no older than the last whose
save was finished. The first two print a JSON object: kills, and by how many steps the state went on.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from utils.ranks import Ranks
from utils.training.checkpoint_store import CheckpointStore, Rows
from utils.training.host_copy import HostCopy
from utils.training.saved_checkpoints import Saved, checkpoint_folders

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir"}


def save(store: CheckpointStore, step: int, size: int) -> None:
    values = torch.full((size, 4), step)
    store.save(step, {"weight": values}, {"centres": Rows(values + 1, 0, size)}, {"step": step})


def checked_step(folder: Path, size: int) -> int:
    """The step of the newest checkpoint, 0 without one; an error if its values are not those of its step.

    Older ones, too, have to be whole, and nothing else is left.
    """
    complaints: list[str] = []
    with CheckpointStore(folder, Ranks(), say=complaints.append) as store:
        saved = store.newest()
    assert not complaints, complaints
    left = sorted(path.name for path in folder.parent.iterdir())
    assert left == [folder.name], left
    found = checkpoint_folders(folder)
    assert found == sorted(folder.iterdir()), sorted(folder.iterdir())
    for path in found:
        older = Saved(path)
        older.check(older.files)
    if saved is None:
        return 0
    assert saved.notes == {"step": saved.step}
    assert saved.whole()["weight"].eq(saved.step).all()
    assert saved.rows("centres", 0, size).eq(saved.step + 1).all()
    return saved.step


def save_until_killed(folder: Path, first: int, saves: int, size: int, report: int) -> None:
    """Save `saves` steps from `first` on; `report` is told each that is finished, when the save after it returns."""
    with CheckpointStore(folder, Ranks()) as store:
        for step in range(first, first + saves):
            save(store, step, size)
            os.pwrite(report, f"{step - 1:020}".encode(), 0)
    os.pwrite(report, f"{first + saves - 1:020}".encode(), 0)


def kill_before(operation: int, folder: Path) -> None:
    """Have this process killed before its so-many-th operation on a file of the run."""
    left = operation

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in OPERATIONS or not isinstance(arguments[0], str | Path):
            return
        path = Path(arguments[0])
        if not path.is_absolute() or path.is_relative_to(folder.parent):  # relative: in a folder that is being removed
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    how, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    torch.set_num_threads(1)
    if how == "interrupt":
        write = HostCopy.write

        def write_slowly(self: HostCopy, path: Path) -> Any:
            time.sleep(0.2)
            return write(self, path)

        HostCopy.write = write_slowly  # type: ignore[method-assign]
        save(CheckpointStore(folder, Ranks()), 1, 100)
        raise KeyboardInterrupt
    chance = random.Random(int(sys.argv[3]) if how == "moments" else 0)
    size = 100_000 if how == "moments" else 10
    report, kills, step = os.memfd_create("finished"), 0, 0
    while how == "operations" or kills < int(sys.argv[4]):
        os.ftruncate(report, 0)
        child = os.fork()
        if not child:
            if how == "operations":
                kill_before(kills, folder)
            save_until_killed(folder, step + 1, 3 if how == "operations" else 10**6, size, report)
            os._exit(0)
        if how == "moments":
            time.sleep(chance.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finished = int(os.pread(report, 20, 0) or 0)
        now = checked_step(folder, size)
        assert now >= max(finished, step), (kills, now, finished, step)
        step = now
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        kills += 1
    print(json.dumps({"kills": kills, "steps": step}))


if __name__ == "__main__":
    main()
