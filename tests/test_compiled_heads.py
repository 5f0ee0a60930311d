"""Blocks of the head that are compiled: the same numbers, and training goes on without a compiler that fails."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from head_cases import CLOSE, blockwise, dense, train
from models.losses import LOSSES
from utils.compiling import Compiled


def failing_backend(graph: object, inputs: object) -> object:
    raise RuntimeError("this compiler cannot")


@pytest.fixture
def fresh_compiler() -> None:
    """The compiler counts the shapes that it has seen of a function, and gives up after some."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("name", ["cosface", "curricularface"])
def test_blocks_can_be_compiled(name: str, sub_centers: int) -> None:
    """What is computed of a block, the update of its centres too, is traced whole by the compiler and gives the same
    numbers, the last, shorter block's too; the weight knows that it was written to."""
    optimizer = "sgd" if sub_centers == 1 else "adamw"
    plain, traced = blockwise(name, sub_centers, optimizer), blockwise(name, sub_centers, optimizer)
    traced.compile_blocks("aot_eager")
    version = traced.weight._version
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*runs uncompiled")
        expected, ours = train(plain, steps=3), train(traced, steps=3)
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, **CLOSE)
    assert traced.weight._version >= version + 3 * 5


@pytest.mark.long
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_blocks_change_nothing(name: str, sub_centers: int) -> None:
    """Every loss, by the kernels that the compiler writes: what the dense head comes to, over 20 steps."""
    compiled = blockwise(name, sub_centers)
    compiled.compile_blocks()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*runs uncompiled")
        ours = train(compiled)
    for key, value in train(dense(name, sub_centers)).items():
        torch.testing.assert_close(ours[key], value, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


class FailsAt:
    """A backend whose kernels fail at their call number `call` of all, having written into what they were given."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*arguments: Any) -> Any:
            self.calls += 1
            results = graph(*arguments)
            if self.calls == self.call:
                raise RuntimeError("this kernel cannot")
            return results

        return run


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("call", [1, 4])
def test_kernels_that_fail_have_done_no_harm(call: int) -> None:
    """A function that changes what it is given, compiled: where its kernels fail at the first block, or at the first of
    another size, the blocks before and after are updated once each."""

    def double(values: Tensor) -> None:
        values.mul_(2)

    compiled, blocks = Compiled(double, FailsAt(call), in_place=True), [torch.ones(size) for size in (3, 3, 2)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for block in blocks:
            compiled(block)
    assert ["runs uncompiled" in str(w.message) for w in warned] == [True]
    assert all((block == 2).all() for block in blocks)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiler_that_fails_is_done_without() -> None:
    """A head whose blocks cannot be compiled says so once for each of its three functions, and trains all the same."""
    plain, fallen_back = blockwise("cosface"), blockwise("cosface")
    fallen_back.compile_blocks(failing_backend)
    with pytest.warns(UserWarning, match=r"forward runs uncompiled: torch\.compile failed") as warned:
        ours = train(fallen_back, steps=3)
    assert len([w for w in warned if "uncompiled" in str(w.message)]) == 3
    for key, value in train(plain, steps=3).items():
        torch.testing.assert_close(ours[key], value, **CLOSE)
