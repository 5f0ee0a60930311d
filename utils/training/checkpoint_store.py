"""The checkpoints of a run: written in a thread while training goes on, atomic, and readable on any number of ranks.

Unfinished ones lie in `.checkpoints.partial` beside the folder (utils/files.py). Each rank writes its own rows there,
and a small file that says so; when all have, the first rank writes the manifest and gives the folder its name. The
ranks communicate through these files alone: the process group of the training must not be used from a second thread.
All ranks have to see the folder.
"""

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor

from utils.files import (
    LOCK,
    SEEN_WITHIN,
    BusyError,
    look_again,
    naming,
    partial_folder,
    publish,
    remove,
    seen,
    unfinished,
)
from utils.progress import say
from utils.ranks import Ranks, lost_another
from utils.training.checkpoint_checks import checked_by_all
from utils.training.host_copy import DTYPES, HostCopy, wait_for_copies
from utils.training.saved_checkpoints import (
    BACKBONE,
    FORMAT,
    MANIFEST,
    WHOLE,
    Saved,
    add_up,
    checkpoint_folders,
    free_name,
    manifest_text,
    shard_name,
    step_of,
)

_OUTCOME = ".outcome.json"

# How long to wait for the lock: the workers of a killed run hold it until they notice that it is gone.
_LOCK_SECONDS = 30.0

# Seconds without progress for which a save is waited for when another rank is known to be lost.
_LOST_SECONDS = 60.0

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Rows:
    """This rank's part `tensor` [n, ...] of a matrix of `total` rows that is spread over ranks, from row `first` on."""

    tensor: Tensor
    first: int
    total: int


@dataclass(frozen=True)
class _Save:
    """One save, as the writer thread needs it. `number` counts those of this store."""

    number: int
    step: int
    working: Path
    notes: Any
    rows: dict[str, dict[str, Any]]
    has_backbone: bool


class CheckpointStore:
    """Saves and finds the checkpoints in a folder, which it locks: one run at a time may have it.

    All ranks make one, call its methods in the same order, and `finish` it, which leaving its `with` block does.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, keep: int = 2, patience: float = 600.0, say: Callable[[str], object] = print
    ) -> None:
        """`keep`: how many checkpoints to keep. `patience`: seconds without progress after which a rank counts as dead.

        `say` is given lines for people. Raises BusyError (OSError) when another run has the folder.
        """
        if keep < 1:
            raise ValueError(f"keep: at least one checkpoint has to stay, got {keep}")
        self._folder, self._ranks, self._keep = Path(folder).resolve(), ranks, keep
        self._patience, self._say = patience, say
        self._partial = partial_folder(self._folder)
        self._held = ExitStack()
        try:
            self._token = self._claim()
        except BaseException:  # another rank may have failed
            self._held.close()
            raise
        self._backbone, self._whole, self._rows = HostCopy(), HostCopy(), HostCopy()
        self._saves = 0
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._finished = False

    def save(
        self,
        step: int,
        whole: Mapping[str, Tensor],
        rows: Mapping[str, Rows],
        notes: Mapping[str, Any],
        wait: bool = False,
        backbone: Mapping[str, Tensor] | None = None,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Save `whole` (the same on all ranks; the first writes it), this rank's `rows`, and `notes` (JSON).

        `backbone`, also the same on all ranks, gets a file of its own, useful by itself, with `about` as its metadata.

        Returns when all is copied to host memory: the tensors may change from then on. A thread writes, after an
        earlier save is done. If it fails (OSError: a full disk, a dead rank), the first rank says so, the existing
        checkpoints stay, and the next save tries again; with `wait`, for the writing to end, the error is raised.
        """
        self._join()
        if self._finished:
            raise ValueError(f"{self._folder}: nothing can be saved after finish()")
        if self._error and not isinstance(self._error, OSError):
            raise self._error
        noted = json.loads(json.dumps(notes))
        parts = {name: part.tensor for name, part in rows.items()}
        self._rows.take(parts)
        taken = [*parts.values()]
        if self._ranks.first:
            self._whole.take(whole)
            taken += whole.values()
            if backbone is not None:
                self._backbone.take(backbone, about)
                taken += backbone.values()
        wait_for_copies(taken)
        self._saves += 1
        working = self._partial / f"step-{step:09}-{self._token}-{self._saves}"
        described = {
            name: {
                "dtype": DTYPES[part.tensor.dtype],
                "shape": [part.total, *part.tensor.shape[1:]],
                "range": [part.first, part.first + len(part.tensor)],
            }
            for name, part in rows.items()
        }
        self._error = None
        # Not a daemon: Python waits for it before the process exits.
        self._writer = threading.Thread(
            target=self._write,
            args=(_Save(self._saves, step, working, noted, described, backbone is not None),),
            name="checkpoint",
        )
        self._writer.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the last save. Raises what made it fail."""
        self._join()
        if self._error:
            raise self._error

    def finish(self) -> None:
        """Wait for the last save and let go of the folder. Raises what made that save fail."""
        self._join()
        self._finished = True
        self._held.close()
        if self._error:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if lost_another(error):
            self._patience = min(self._patience, _LOST_SECONDS)
        try:
            self.finish()
        except OSError:
            if error is None:
                raise  # otherwise the error that ends the block matters more; this one was reported

    def newest(self, require: Callable[[Saved], object] = lambda saved: None) -> Saved | None:
        """The newest undamaged checkpoint; None: there is none. Every byte is checked, each rank taking some files.

        `require` raises DamagedError for what else it cannot be, of its notes, say.
        Newer ones that are damaged are reported, and renamed to `damaged-...`. Raises CheckpointError, and renames
        nothing, for a checkpoint in the format of another version, and for one that some rank cannot read or does not
        see, which may be whole.
        """
        self._join()
        found = [path.name for path in reversed(checkpoint_folders(self._folder))]
        for name in json.loads(self._ranks.agree(json.dumps(found))):
            path = self._folder / name
            saved, problems = checked_by_all(path, self._ranks, require)
            if not problems:
                return saved
            if self._ranks.first:
                for problem in problems:
                    self._say(problem)
                aside = path.with_name(f"damaged-{name}-{uuid.uuid4().hex[:8]}")
                path.rename(aside)
                self._say(f"{path} is damaged and passed over; what is left of it is in {aside.name}")
        return None

    def set_aside_from(self, step: int) -> None:
        """Rename the checkpoints of `step` and later ones to `exploded-...`, which are passed over from now on, and
        remove those that were before. Where there are no earlier ones, nothing is renamed.
        """
        self._join()

        def rename() -> None:
            found = checkpoint_folders(self._folder)
            later = [path for path in found if step_of(path) >= step]
            if not self._ranks.first or not later or len(later) == len(found):
                return
            for path in self._folder.glob("exploded-*"):
                remove(path)
            for path in later:
                aside = path.rename(path.with_name(f"exploded-{path.name}-{uuid.uuid4().hex[:8]}"))
                self._say(f"{path} may hold what went wrong: it is set aside as {aside.name}")

        self._ranks.together(rename)

    def _claim(self) -> str:
        """Lock the folder and remove what a killed run left unfinished; returns a name of this store, the same on all
        ranks."""

        def begin() -> str:
            if not self._ranks.first:
                return ""
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._clear()
            token = uuid.uuid4().hex[:8]
            if self._ranks.size > 1:
                (self._partial / token).touch()  # the first save removes it
            return token

        def see() -> None:
            if self._ranks.first:
                return
            # The folder itself may be another run's, of the same name on another disk.
            mark = self._partial / token
            if seen(lambda: mark.exists() or None, self._partial, SEEN_WITHIN) is None:
                raise TimeoutError(
                    f"waited {SEEN_WITHIN:g} s in vain for {mark}, which the first rank made: put the run where all "
                    "ranks see it"
                )
            own = self._partial / f"{token}-{self._ranks.rank}"  # better now than in the first save
            with naming(self._partial):
                own.touch()
                own.unlink()

        token = self._ranks.agree(self._ranks.together(begin))
        self._ranks.together(see)
        return token

    def _lock(self) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                # To resume, but from nothing: what is left there is cleared later, as far as it lets itself be removed.
                self._held.enter_context(unfinished(self._folder, wait=False, resume=True))
                return
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _clear(self, kept: str = LOCK) -> None:
        """Remove what is unfinished, but what is called `kept`, as far as it lets itself be removed: a file that
        somebody has open, on NFS, does not. It is tried again with every save."""
        for left in self._partial.iterdir():
            if left.name not in (LOCK, kept):
                with suppress(OSError):
                    remove(left)

    def _join(self) -> None:
        if self._writer:
            self._writer.join()
            self._writer = None

    def _write(self, save: _Save) -> None:
        """What the thread does. Its error, if any, is left in `_error`."""
        try:
            if self._ranks.first:
                self._write_first(save)
            else:
                self._write_shard(save)
                self._heed_outcome(save)
        except Exception as error:
            self._error = error
            if self._ranks.first and isinstance(error, OSError):
                self._say(
                    f"the checkpoint of step {save.step:,} could not be written ({error}); "
                    "earlier ones are kept, the next save tries again"
                )

    def _write_first(self, save: _Save) -> None:
        """Write the first rank's part, wait for the others', and publish the checkpoint."""
        error_text = None
        try:
            self._clear(save.working.name)
            save.working.mkdir(exist_ok=True)
            sums = {WHOLE: asdict(self._whole.write(save.working / WHOLE))}
            if save.has_backbone:
                sums[BACKBONE] = asdict(self._backbone.write(save.working / BACKBONE))
            self._write_shard(save)
            records = self._await("the rows of all ranks", lambda: self._records(save), save.working)
            content = {
                "format": FORMAT,
                "step": save.step,
                "ranks": self._ranks.size,
                "files": sums | {record["file"]: record["sum"] for record in records},
                "rows": _joined([record["rows"] for record in records]),
                "notes": save.notes,
            }
            manifest = save.working / MANIFEST
            with naming(manifest), manifest.open("w", encoding="utf-8") as file:
                file.write(manifest_text(content))
                file.flush()
                os.fsync(file.fileno())
            for rank in range(self._ranks.size):
                self._record(save, rank).unlink()
            publish(save.working, free_name(self._folder, save.step))
            self._prune()
        except Exception as error:
            error_text = str(error)
            shutil.rmtree(save.working, ignore_errors=True)  # the next save removes what is left
            raise
        finally:
            if self._ranks.size > 1:
                _put(self._folder / _OUTCOME, {"token": self._token, "number": save.number, "error": error_text})

    def _write_shard(self, save: _Save) -> None:
        """Write this rank's rows, and then a record of them, or of the error."""
        path = save.working / shard_name(self._ranks.rank, self._ranks.size)
        record: dict[str, Any]
        try:
            save.working.mkdir(exist_ok=True)
            record = {"file": path.name, "sum": asdict(self._rows.write(path)), "rows": save.rows}
        except OSError as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            record = {"error": f"rank {self._ranks.rank}: {error}"}
        try:
            _put(self._record(save, self._ranks.rank), record)
        except FileNotFoundError:
            pass  # the first rank gave up and removed the folder: its outcome says why
        except OSError as error:  # so that the first rank hears of nothing
            said = record.get("error", f"rank {self._ranks.rank}: {error}")
            say(f"the checkpoint of step {save.step:,} cannot be written on {socket.gethostname()}: {said}")

    def _record(self, save: _Save, rank: int) -> Path:
        return save.working / f"rank-{rank:05}.json"

    def _records(self, save: _Save) -> list[dict[str, Any]] | None:
        """The records of all ranks; None while some are not there. Raises OSError when a rank could not write."""
        paths = [self._record(save, rank) for rank in range(self._ranks.size)]
        records = [json.loads(path.read_text()) for path in paths if path.exists()]
        errors = [record["error"] for record in records if "error" in record]
        if errors:
            raise OSError("; ".join(errors))
        return records if len(records) == len(paths) else None

    def _heed_outcome(self, save: _Save) -> None:
        """Wait for the first rank to finish the save. Raises OSError if it failed."""

        def outcome() -> dict[str, Any] | None:
            with suppress(FileNotFoundError):
                said = json.loads((self._folder / _OUTCOME).read_text())
                if said["token"] == self._token and said["number"] >= save.number:
                    return said
            look_again(self._folder)
            return None

        said = self._await("the first rank", outcome, save.working)
        if said["number"] == save.number and said["error"] is not None:
            raise OSError(f"the checkpoint of step {save.step:,} could not be written: {said['error']}")

    def _await(self, what: str, probe: Callable[[], _Found | None], growing: Path) -> _Found:
        """What `probe` finds in the end. Raises TimeoutError when for so long as the patience, which may become less
        meanwhile, no file in `growing` grew."""
        pause, size, grew = 0.002, -1, time.monotonic()
        while (found := probe()) is None:
            if (now := _bytes_in(growing)) != size:
                size, grew = now, time.monotonic()
            patience = self._patience
            if time.monotonic() > grew + patience:
                raise TimeoutError(f"waited {patience:g} s in vain for {what}")
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        return found

    def _prune(self) -> None:
        """Remove all but the newest of each of the last `keep` steps."""
        newest_of_step = {step_of(path): path for path in checkpoint_folders(self._folder)}
        kept = [newest_of_step[step] for step in sorted(newest_of_step)[-self._keep :]]
        for path in checkpoint_folders(self._folder):
            if path not in kept:
                try:
                    # Renamed first: a process that is killed meanwhile leaves no checkpoint with a part of its files.
                    remove(path.rename(self._partial / path.name))
                except OSError as error:
                    self._say(f"{path} could not be removed: {error}")


def _joined(rows: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The manifest's entry for each matrix. Raises ValueError unless the ranks' rows add up to it."""
    entries = {}
    for name in sorted(set().union(*rows)):
        parts = [part[name] for part in rows if name in part]
        dtypes = {part["dtype"] for part in parts}
        shapes = {tuple(part["shape"]) for part in parts}
        ranges = [part["range"] for part in parts]
        alike = len(parts) == len(rows) and len(dtypes) == len(shapes) == 1
        if not (alike and add_up(ranges, parts[0]["shape"][0])):
            raise ValueError(f"the ranks' rows do not make up one {name}: {json.dumps(parts)} on {len(rows)} ranks")
        entries[name] = {"dtype": parts[0]["dtype"], "shape": parts[0]["shape"], "ranges": ranges}
    return entries


def _put(path: Path, content: dict[str, Any]) -> None:
    """Write a small file, atomically: others read it as soon as it is there."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content))
    new.replace(path)


def _bytes_in(folder: Path) -> int:
    """The bytes of the files in `folder`; 0 if it does not exist."""
    size = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # renamed meanwhile
                size += entry.stat().st_size
    return size
