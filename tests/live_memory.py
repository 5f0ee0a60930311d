"""How much memory tensors take at their peak, by watching every operation: for devices that do not count it."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within its `with` block: `peak`, bytes of storages made in it that were alive at once; `largest`, of one of them.

    A storage counts from the operation that made it until the last tensor that Python holds on it is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._holders: dict[int, int] = {}
        self._before: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self._holders:
                self._before.add(value.untyped_storage().data_ptr())
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._watch(value)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        where, size = storage.data_ptr(), storage.nbytes()
        if where in self._before or where == 0:
            return
        if where not in self._holders:
            self.now += size
            self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        self._holders[where] = self._holders.get(where, 0) + 1
        weakref.finalize(tensor, self._release, where, size)

    def _release(self, where: int, size: int) -> None:
        self._holders[where] -= 1
        if not self._holders[where]:
            del self._holders[where]
            self.now -= size
