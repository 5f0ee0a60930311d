"""Memory for batches that worker processes fill and the main process reads, the same pages again and again.

A new block of shared memory for each batch costs more than it seems: every page of it is zeroed and mapped in both
processes, and its file descriptor is sent through a socket. Here all of it is made once, before the workers are forked;
what travels with a batch is the number of a slot.
"""

import contextlib
import itertools
import math
import mmap
import warnings
import weakref

import numpy as np
import torch
from torch import Tensor

_memories: "weakref.WeakValueDictionary[int, BatchMemory]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


class BatchMemory:
    """`slots` places for uint8 batches of `shape`, shared with the processes that are forked from this one.

    The main process lends a slot, a worker fills it, and the main process takes its content as a tensor. The slot is
    lent again once nothing refers to that tensor's memory any more, views included: a batch that is kept stays as it
    is. The memory is anonymous, so it does not count towards the size of /dev/shm, and pages are taken when touched.
    """

    def __init__(self, slots: int, shape: tuple[int, ...]) -> None:
        self.number = next(_numbers)
        self.shape = shape
        self._places = np.frombuffer(mmap.mmap(-1, slots * math.prod(shape)), np.uint8).reshape(slots, *shape)
        self._free = list(range(slots))
        self._pinned = False
        _memories[self.number] = self

    def lend(self) -> int | None:
        """A slot that is free, the one used last; None when all are in use."""
        return self._free.pop() if self._free else None

    def place(self, slot: int, count: int) -> np.ndarray:
        """The first `count` rows of a slot, uint8, to write to."""
        return self._places[slot, :count]

    def take(self, slot: int, count: int) -> Tensor:
        """The same as a tensor, with whose memory the slot becomes free."""
        place = self.place(slot, count)
        # The tensor's storage owns this very array: when it goes, no tensor or array looks at the slot any more.
        returned = weakref.finalize(place, self._free.append, slot)
        returned.atexit = False
        return torch.from_numpy(place)

    def pin(self) -> bool:
        """Lock the memory in place, so that CUDA devices read it by themselves while the process goes on.

        To be called when the processes that fill it are forked. Whoever copies from it without blocking must keep the
        tensor until the copy is done. Where the system does not allow it, there is a warning, the answer is False, and
        copies block.
        """
        if self._pinned:
            return True
        address, size = self._places.ctypes.data, self._places.nbytes
        runtime = torch.cuda.cudart()
        error = runtime.cudaHostRegister(address, size, 0)
        if error != runtime.cudaError.success:
            memory = f"{size / 2**20:.0f} MiB of memory for batches"
            reason = runtime.cudaGetErrorString(error)  # the error itself is `cudaError.???` to torch
            warnings.warn(f"{memory} cannot be pinned ({reason}): copies to the device will block", stacklevel=2)
            _clear_cuda_error()
            return False
        self._pinned = True
        unpin = weakref.finalize(self, runtime.cudaHostUnregister, address)
        unpin.atexit = False
        return True


def _clear_cuda_error() -> None:
    """CUDA reports a failed call once more, at the next one that asks."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def batch_memory(number: int) -> BatchMemory:
    """The memory of this number in this process."""
    return _memories[number]
