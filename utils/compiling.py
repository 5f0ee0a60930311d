"""torch.compile, falling back to the function itself, with a message, if the compiler fails."""

import copyreg
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _memory_format(name: str) -> torch.memory_format:
    return getattr(torch, name)


# The compiler finds what it compiled before by a pickle of its inputs, memory format included. Left to itself, pickle
# names the module for it that happens to come first: every program would compile the same network anew.
copyreg.pickle(torch.memory_format, lambda known: (_memory_format, (str(known).removeprefix("torch."),)))


class Compiled:
    """`function`, compiled at its first call with tensors of some shapes. If that fails it runs uncompiled from then
    on (`gave_up`), and `tell` is given the error; without `tell` there is a warning.

    After a failure it is called again, so one that changes what it is given (`in_place`) is tried on copies first.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        backend: str | Callable[..., Any] = "inductor",
        in_place: bool = False,
        tell: Callable[[Exception], object] | None = None,
    ) -> None:
        self._function, self._in_place, self._tell = function, in_place, tell or self._warn
        self.gave_up = False
        # Each shape by itself: what is compiled for any number of faces is slower.
        self._compiled: Callable[..., Any] = torch.compile(function, dynamic=False, backend=backend)
        self._worked: set[tuple[Any, ...]] = set()

    def __call__(self, *arguments: Any) -> Any:
        if self.gave_up:
            return self._function(*arguments)
        shapes = tuple(getattr(argument, "shape", None) for argument in arguments)
        if shapes in self._worked:
            return self._compiled(*arguments)
        try:
            result = self._compiled(*(_copy(arguments) if self._in_place else arguments))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways
            self.gave_up = True
            self._tell(error)
            return self._function(*arguments)
        self._worked.add(shapes)
        return self._compiled(*arguments) if self._in_place else result

    def _warn(self, error: Exception) -> None:
        name = self._function.__qualname__
        warnings.warn(f"{name} runs uncompiled: torch.compile failed ({shortly(error)})", stacklevel=3)


class CompiledNetwork(nn.Module):
    """`network` as a Compiled, as a module; if the compiler fails, `say` is given a line for people.

    What fails in a backward pass fails: have the shapes of training tried before it begins (`give_up`).
    """

    def __init__(
        self, network: nn.Module, say: Callable[[str], object], backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        super().__init__()
        self.network, self._say = network, say
        self._compiled = Compiled(network, backend, tell=self._tell)

    def forward(self, inputs: Tensor) -> Tensor:
        return self._compiled(inputs)

    @property
    def gave_up(self) -> bool:
        """Whether it runs uncompiled."""
        return self._compiled.gave_up

    def give_up(self, error: Exception | None) -> None:
        """Run uncompiled from here on, because of `error`; None: another process had one."""
        if not self.gave_up:
            self._compiled.gave_up = True
            self._tell(error)

    def _tell(self, error: Exception | None) -> None:
        lines = [line.strip() for line in str(error or "on another rank").splitlines() if line.strip()]
        reason = next((line for line in lines if not line.endswith("raised:")), type(error).__name__)
        self._say(f"the network runs uncompiled: torch.compile failed ({reason}); train.compile=off says nothing")


def shortly(error: BaseException) -> str:
    """The beginning of the error's message; those of compilers are pages long."""
    return " ".join(str(error).split()[:30]) or type(error).__name__


def _copy(value: Any) -> Any:
    """`value`, a tensor or lists and tuples of them, with tensors of its own."""
    if isinstance(value, list | tuple):
        return type(value)(_copy(each) for each in value)
    return value.clone() if isinstance(value, Tensor) else value
