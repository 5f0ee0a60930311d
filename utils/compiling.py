"""torch.compile that falls back to the function itself, and says so, where the compiler cannot."""

import warnings
from collections.abc import Callable
from typing import Any

import torch


class Compiled:
    """`function`, compiled at its first call. If that fails a warning says why, and the function runs as it is.

    `function` must not change what it is given: after a failure it is called again.
    """

    def __init__(self, function: Callable[..., Any], backend: str | Callable[..., Any] = "inductor") -> None:
        self._function = function
        self._chosen: Callable[..., Any] = torch.compile(function, dynamic=False, backend=backend)
        self._worked = False

    def __call__(self, *arguments: Any) -> Any:
        if self._worked:
            return self._chosen(*arguments)
        try:
            result = self._chosen(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways
            reason = " ".join(str(error).split()[:30]) or type(error).__name__
            warnings.warn(
                f"{self._function.__qualname__} runs uncompiled: torch.compile failed ({reason})", stacklevel=2
            )
            self._chosen = self._function
            result = self._function(*arguments)
        self._worked = True
        return result
