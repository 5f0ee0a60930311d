"""How many processes to use, and work spread over them."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class WorkerError(OSError):
    """A worker process ended without an answer."""


def worker_count(workers: int) -> int:
    """Resolve the setting `common.workers`: -1 means one per usable core, 8 at most."""
    if workers >= 0:
        return workers
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def map_unordered(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, initialise: Callable[..., None], *arguments: Any
) -> Iterator[Any]:
    """`function(item)` for every item, results as they come; `initialise(*arguments)` runs once in each process.

    With `workers` 0 all of it happens in this process. An error in a worker is raised here; WorkerError when one died.
    """
    if workers == 0:
        initialise(*arguments)
        yield from map(function, items)
        return
    # Forking a process that runs threads (OpenCV, torch) can deadlock, so workers start afresh. Unlike
    # multiprocessing.Pool, the executor notices when one is killed (out of memory, say) instead of waiting for ever.
    context = multiprocessing.get_context("spawn")
    processes = min(workers, max(1, len(items)))
    with ProcessPoolExecutor(processes, context, initialise, arguments) as pool:
        try:
            for done in as_completed([pool.submit(function, item) for item in items]):
                yield done.result()
        except BrokenProcessPool:
            raise WorkerError("a worker process died (out of memory?); try fewer with --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
