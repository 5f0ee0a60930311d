"""A stand-in for a card: tensors on torch.device("meta"), which have shapes but no values, so that whoever asks for a
value has to say so, and a host copy that waits can be told from one that does not.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")

#: What makes a tensor of numbers on the host: with a device given, the copy to it waits.
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor)


class _NewFromNumbers(TorchFunctionMode):
    """Refuses tensors that are made on the device from Python's or numpy's numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FROM_NUMBERS and isinstance(result, Tensor) and result.is_meta:
            given = args[1] if func is Tensor.new_tensor else args[0]
            if not (isinstance(given, Tensor) and given.is_meta):
                raise AssertionError(f"{func.__name__} copies numbers to the device and waits")
        return result


class _Copies(TorchDispatchMode):
    """Refuses copies to the device that wait, and copies from it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operations += 1
        name = func.overloadpacket.__name__
        if name.startswith("index_put") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError(f"{name} by a mask waits")  # without values it need not know how many there are
        result = func(*args, **(kwargs or {}))
        given = {value.device.type for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        made = {value.device.type for value in tree_leaves(result) if isinstance(value, Tensor)}
        if name == "copy_":
            target, source = args[0], args[1]
            waits = (kwargs or {}).get("non_blocking", args[2] if len(args) > 2 else False) is False
            if target.device != source.device and (waits or source.is_meta):
                raise AssertionError(f"{name} between host and device waits")
        elif "meta" in given and "cpu" in made:
            raise AssertionError(f"{name} brings a value from the device and waits")
        elif given == {"cpu"} and "meta" in made and not (kwargs or {}).get("non_blocking", False):
            raise AssertionError(f"{name} copies to the device and waits")
        return result


@contextlib.contextmanager
def unwaiting() -> Iterator[_Copies]:
    """Within the block, whatever would make the host wait for the tensors on META raises: values that are read,
    shapes that depend on values, tensors of two devices that meet, and copies either way."""
    with _NewFromNumbers(), _Copies() as copies:
        yield copies


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch has for real devices only: autocast, which is left out, and generators, whose draws have no values."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())

    class Generator:
        def __new__(cls, device: torch.device | str = "cpu") -> Any:
            return _Generator() if torch.device(device).type == "meta" else _TORCHS(device)

    class _Generator:
        def manual_seed(self, seed: int) -> None:
            return None  # as the generator of torch.rand: the default one

    monkeypatch.setattr(torch, "Generator", Generator)


_TORCHS = torch.Generator
