"""Worker processes: how many to use, and maps over them."""

import errno
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

# Items given out at a time bound the memory of results that wait; fewer would let processes idle behind a slow one.
ITEMS_PER_WORKER = 4


class WorkerError(OSError):
    """A worker process died, could not be started, or raised an error that cannot be pickled."""


def cause_of_death(exit_codes: Iterable[int | None]) -> str:
    """Why a worker process died, judged by the exit codes of all."""
    if hasattr(signal, "SIGBUS") and -signal.SIGBUS in exit_codes:
        return (
            "a worker process died of a bus error: a file could not be read (disk error?), or changed while in use, or "
            "/dev/shm is full"
        )
    return "a worker process died (out of memory?); try fewer with --workers"


@contextmanager
def starting_workers() -> Iterator[None]:
    """WorkerError when worker processes cannot be started in the block: no memory, or too many processes.

    They have Ctrl-C blocked from their first moment: it comes to them, too, and would end them with a traceback each
    while they still import. In this process it takes effect at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EAGAIN) or error.filename is not None:
            raise
        place = " on /dev/shm" if error.errno == errno.ENOSPC else ""  # where locks between processes are
        raise WorkerError(
            f"worker processes cannot be started ({error.strerror}{place}); try fewer with --workers, or 0"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_count(workers: int) -> int:
    """Resolve the setting `common.workers`: -1 means one per usable core, 8 at most; processes that torchrun started on
    this machine share the cores."""
    if workers >= 0:
        return workers
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def map_ordered(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, initialise: Callable[..., None], *arguments: Any
) -> Iterator[Any]:
    """`function(item)` for every item, results in order; `initialise(*arguments)` runs once in each process.

    Only a few items are taken, and results made, ahead of those that were taken. With `workers` 0 all of it happens in
    this process. An error in a worker is raised here; WorkerError when one died.
    """
    return _map(_take_first, function, items, workers, initialise, arguments)


def map_unordered(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, initialise: Callable[..., None], *arguments: Any
) -> Iterator[Any]:
    """As `map_ordered`, with results as they come."""
    return _map(_take_finished, function, items, workers, initialise, arguments)


def _map(
    take: Callable[[list[Future]], Future],
    function: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int,
    initialise: Callable[..., None],
    arguments: tuple,
) -> Iterator[Any]:
    if workers == 0:
        initialise(*arguments)
        yield from map(function, items)
        return
    waiting: list[Future] = []
    with _executor(workers, initialise, arguments) as pool:
        for item in items:
            with starting_workers():
                waiting.append(pool.submit(_answer, function, item))
            if len(waiting) == workers * ITEMS_PER_WORKER:
                yield take(waiting).result()
        while waiting:
            yield take(waiting).result()


def _take_first(waiting: list[Future]) -> Future:
    return waiting.pop(0)


def _take_finished(waiting: list[Future]) -> Future:
    finished = wait(waiting, return_when=FIRST_COMPLETED).done.pop()
    waiting.remove(finished)
    return finished


@contextmanager
def _executor(workers: int, initialise: Callable[..., None], arguments: tuple) -> Iterator[ProcessPoolExecutor]:
    # Forking a process that runs threads (OpenCV, torch) can deadlock, so workers start afresh. Unlike
    # multiprocessing.Pool, the executor notices when one is killed (out of memory, say) instead of waiting for ever.
    context = multiprocessing.get_context("spawn")
    with starting_workers():
        executor = ProcessPoolExecutor(workers, context, _start_worker, (initialise, *arguments))
    with executor as pool:
        try:
            yield pool
        except BrokenProcessPool:
            processes = list((pool._processes or {}).values())  # the pool itself does not tell how they ended
            pool.shutdown(wait=True, cancel_futures=True)
            raise WorkerError(cause_of_death(process.exitcode for process in processes)) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _answer(function: Callable[[Any], Any], item: Any) -> Any:
    """`function(item)` in a worker. An error that cannot be pickled, which would look like a worker's death, becomes a
    WorkerError with its message."""
    try:
        return function(item)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise WorkerError(f"{type(error).__name__}: {error}") from None
        raise


def _start_worker(initialise: Callable[..., None], *arguments: Any) -> None:
    """Make the worker end when the main process does, even by a kill: it began with Ctrl-C blocked."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    initialise(*arguments)
