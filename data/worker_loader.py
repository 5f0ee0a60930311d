"""torch's DataLoader with workers that end when they should: with the program, not by Ctrl-C, and never in silence."""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import cv2
from torch.utils.data import DataLoader, Dataset

from data.face_sets import EncodedImages
from data.read_ahead import why_unreadable
from utils.processes import WorkerError, cause_of_death, starting_workers

PREFETCH = 2  # batches that each worker makes ahead

T = TypeVar("T")
_REQUESTS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def forks() -> bool:
    """Whether workers are forked from the main process, and share its memory."""
    return sys.platform == "linux"


class Repeatable(Generic[T]):
    """An iterable that calls `begin(*arguments)` for the iterator of each pass."""

    def __init__(self, begin: Callable[..., Iterator[T]], *arguments: Any) -> None:
        self._begin, self._arguments = begin, arguments

    def __iter__(self) -> Iterator[T]:
        return self._begin(*self._arguments)


class WorkerLoader(DataLoader):
    """Batches that `workers` processes make by `dataset.__getitems__`, in order.

    `positions`: the batches of positions in `images`. `to_jobs`: turns them, as an iterator, into what the dataset gets
    in their place. `pin`: torch copies batches to pinned memory. `keep_workers`: from pass to pass.

    Workers leave requests to stop, which may come to the whole job, to the main process: it is its to heed them, and it
    still needs batches. They have the signals blocked from their first moment.
    """

    def __init__(
        self,
        dataset: Dataset,
        images: EncodedImages,
        positions: Iterable[Any],
        workers: int,
        pin: bool,
        keep_workers: bool,
        to_jobs: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    ) -> None:
        self._images = images
        #: The batches that workers may be at.
        self._recent: deque[Any] = deque(maxlen=workers * PREFETCH + 1)
        super().__init__(
            dataset,
            batch_sampler=Repeatable(_noted_jobs, positions, self._recent, to_jobs),
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            collate_fn=_as_it_is,
            pin_memory=pin,
            persistent_workers=keep_workers,
            # Python 3.14 would start every worker anew and pickle the index to it; forked ones share it.
            multiprocessing_context="fork" if workers and forks() else None,
            worker_init_fn=_set_up_worker,
        )

    def __iter__(self) -> Any:
        before, when_one_ends = signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS), signal.getsignal(signal.SIGCHLD)
        try:
            with starting_workers(), self._reasons():  # workers that stay may have died since the last epoch
                batches = super().__iter__()
            return self._with_reasons(batches)
        finally:
            if when_one_ends is not None and threading.current_thread() is threading.main_thread():
                # Torch's handler would raise wherever the program is, in the middle of a step or a save.
                signal.signal(signal.SIGCHLD, when_one_ends)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _with_reasons(self, batches: Any) -> Iterator[Any]:
        with self._reasons(batches):
            yield from batches

    @contextmanager
    def _reasons(self, batches: Any = None) -> Iterator[None]:
        """WorkerError when a worker died in the block, of which torch does not say why. `batches`: what it makes, None
        for what was made in the epoch before."""
        try:
            yield
        except RuntimeError as error:
            made = self._iterator if batches is None else batches
            exit_codes = [process.exitcode for process in getattr(made, "_workers", ())]
            if not any(exit_codes):
                raise
            reason = why_unreadable(self._images, [i for batch in self._recent for i in batch])
            raise WorkerError(cause_of_death(exit_codes) + (f"; {reason}" if reason else "")) from error


def _noted_jobs(
    positions: Iterable[Any], recent: deque[Any], to_jobs: Callable[[Iterator[Any]], Iterator[Any]]
) -> Iterator[Any]:
    """What the dataset gets, the last batches of positions noted in `recent`."""

    def noted() -> Iterator[Any]:
        for batch in positions:
            recent.append(batch)
            yield batch

    return to_jobs(noted())


def _as_it_is(batch: Any) -> Any:
    return batch


def _set_up_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism
    # The main process ends its workers by SIGTERM, which is heeded from nobody else.
    signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
