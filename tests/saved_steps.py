"""Checkpoints whose values tell their step: what the tests of the store share."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.ranks import Ranks
from utils.training.checkpoint_store import CheckpointStore, Rows
from utils.training.saved_checkpoints import manifest_text

TOTAL = 11


def matrix() -> Tensor:
    """The whole of a matrix that ranks share."""
    return torch.arange(TOTAL * 3, dtype=torch.float64).reshape(TOTAL, 3) ** 2


def own_range(ranks: Ranks) -> range:
    """The rows that a rank has: not as many on each."""
    return range(TOTAL * ranks.rank // ranks.size, TOTAL * (ranks.rank + 1) // ranks.size)


def own_rows(ranks: Ranks, whole: Tensor) -> Rows:
    """This rank's part."""
    held = own_range(ranks)
    return Rows(whole[held.start : held.stop], held.start, len(whole))


def save_step(store: CheckpointStore, step: int, ranks: Ranks, wait: bool = False) -> None:
    """Save values that tell the step."""
    rows = {"centres": own_rows(ranks, matrix() + step), "counts": own_rows(ranks, torch.arange(TOTAL) * step)}
    store.save(step, {"weight": torch.full((4,), step)}, rows, {"best": step / 7}, wait)


def take_notes_away(checkpoint: Path) -> None:
    """A manifest with the right checksum that says nothing of the run."""
    file = checkpoint / "manifest.json"
    content = json.loads(file.read_text())["content"]
    file.write_text(manifest_text({**content, "notes": {}}))


def write_three(folder: Path, ranks: Ranks) -> None:
    """Three saves, the last of them waited for."""
    with CheckpointStore(folder, ranks) as store:
        for step in (1, 2, 3):
            save_step(store, step, ranks, wait=step == 3)


def is_step(store: CheckpointStore, step: int) -> bool:
    """Whether the newest checkpoint is that of `step`, with all of its values."""
    saved = store.newest()
    return saved is not None and (
        (saved.step, saved.notes) == (step, {"best": step / 7})
        and torch.equal(saved.whole()["weight"], torch.full((4,), step))
        and saved.shape("centres") == (TOTAL, 3)
        and torch.equal(saved.rows("centres", 0, TOTAL), matrix() + step)
        and torch.equal(saved.rows("counts", 0, TOTAL), torch.arange(TOTAL) * step)
    )


def names(folder: Path) -> list[str]:
    """What is in `folder`."""
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails for this process, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def attempt(action: Callable[[], Any]) -> str:
    """The error that it raises, as text; empty when it raises none."""
    try:
        action()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__} {error}"
    return ""
