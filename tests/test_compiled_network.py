"""A compiled network trains as an uncompiled one, and a compiler that fails costs nothing."""

import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.loading import to_network_input
from models.backbones.iresnet import IBasicBlock
from models.recompute import recompute_blocks
from ranks import run_on_ranks
from utils.compiling import Compiled, CompiledNetwork
from utils.devices import autocast
from utils.ranks import Ranks
from utils.training import build_step as step_building
from utils.training.build_step import compile_network, spread
from utils.training.micro_batch import part_sizes, trial_pass
from utils.training.optimizers import train_mode

CPU = torch.device("cpu")


def units() -> nn.Module:
    """A network of 8x8 pixels with blocks and both kinds of norms."""
    torch.manual_seed(0)
    return nn.Sequential(IBasicBlock(3, 4, 2), IBasicBlock(4, 4, 1), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5))


def a_pass(network: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Embeddings and gradients of six faces."""
    embeddings = network(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    (embeddings * torch.linspace(-1, 1, 5)).square().sum().backward()
    return embeddings.detach(), [weight.grad for weight in network.parameters() if weight.grad is not None]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_network_trains_the_same(recompute: bool) -> None:
    """Traced, and differentiated by the compiler: embeddings, gradients and statistics, each batch counted once; blocks
    that are computed anew compile too."""
    eager, network = units(), units()
    if recompute:
        recompute_blocks(network)
    said: list[str] = []
    compiled = compile_network(network, Ranks(), CPU, attempt, said.append, "aot_eager")
    assert isinstance(compiled, CompiledNetwork)
    assert not compiled.gave_up, said
    for _ in range(2):
        torch.testing.assert_close(a_pass(compiled), a_pass(eager), rtol=1e-4, atol=1e-5)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)
    torch._dynamo.reset()


def attempt(module: nn.Module) -> None:
    trial_pass(module, 6, 8, torch.float32)


def failing_backend(graph: object, inputs: object) -> Callable[..., object]:
    raise RuntimeError("no such instruction\nand a long trace")


def test_a_compiler_that_fails_is_said_once() -> None:
    """The network as it was, and one line with the reason and the setting; out of memory is another matter."""
    network, said = units(), list[str]()
    compiled = compile_network(network, Ranks(), CPU, attempt, said.append, failing_backend)
    torch.testing.assert_close(a_pass(compiled), a_pass(units()))
    network.zero_grad(set_to_none=True)
    assert len(said) == 1
    assert "no such instruction" in said[0]
    assert "\n" not in said[0]
    assert "train.compile=off" in said[0]
    assert all(weight.grad is None for weight in network.parameters())

    def exhaust(module: nn.Module) -> None:
        raise torch.OutOfMemoryError("made up")

    with pytest.raises(torch.OutOfMemoryError):
        compile_network(network, Ranks(), CPU, exhaust, said.append, "aot_eager")
    assert len(said) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("error", "elsewhere", "told", "ends"),
    [
        (None, 0, 0, "compiled"),
        (None, 1, 0, "on another rank"),
        (None, 2, 0, "out of memory on another rank"),
        (RuntimeError("no such instruction"), 0, 1, "no such instruction"),
        (RuntimeError("no such instruction"), 2, 1, "out of memory on another rank"),
        (torch.OutOfMemoryError("made up"), 0, 2, "made up"),
        (torch.OutOfMemoryError("made up"), 1, 2, "made up"),
    ],
)
def test_processes_agree_whether_to_compile(error: Exception | None, elsewhere: int, told: int, ends: str) -> None:
    """What failed on one is told to all, memory before compilers: one that went on compiled while another did not, or
    tried smaller passes alone, would wait for gradients that never come."""
    said, numbers = list[str](), list[int]()

    def most(number: int) -> int:
        numbers.append(number)
        return max(number, elsewhere)

    def attempt_it(module: nn.Module) -> None:
        if error is not None:
            raise error

    ranks: Any = SimpleNamespace(size=1, most=most)
    if 2 in (told, elsewhere):
        with pytest.raises(torch.OutOfMemoryError, match=f"^{ends}$"):
            compile_network(units(), ranks, CPU, attempt_it, said.append, "eager")
        assert not said
    else:
        compiled = compile_network(units(), ranks, CPU, attempt_it, said.append, "eager")
        assert isinstance(compiled, CompiledNetwork)
        assert compiled.gave_up == (ends != "compiled")
        assert [ends in line for line in said] == [True] * compiled.gave_up
    assert numbers == [told]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("not here"), RuntimeError("cannot")])
def test_out_of_memory_with_shared_statistics_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """With train.sync_bn the other processes are in the middle of an exchange, and would not come to agree; what a
    compiler cannot it cannot on any of them."""
    network, asked = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3))), list[int]()
    monkeypatch.setattr(step_building, "spread", lambda network, *_: network)
    ranks: Any = SimpleNamespace(size=2, most=lambda number: asked.append(number) or number)

    def fail(_: nn.Module) -> None:
        raise error

    no_memory = isinstance(error, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError) if no_memory else nullcontext():
        compile_network(network, ranks, CPU, fail, lambda _: None, "eager")
    assert asked == ([] if no_memory else [1])


def test_a_network_that_gave_up_is_told_to_the_other_processes() -> None:
    """A compiler that fails in the trial's forward pass, which goes on without it, has failed nevertheless."""
    numbers, said = list[int](), list[str]()
    ranks: Any = SimpleNamespace(size=1, most=lambda number: numbers.append(number) or number)
    compile_network(units(), ranks, CPU, attempt, said.append, failing_backend)
    assert numbers == [1]
    assert len(said) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["network", "function"])
def test_out_of_memory_is_no_failure_of_the_compiler(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """It is for the caller, who tries smaller passes: what is compiled stays so, and nothing is said."""
    exhausted, said = [True], list[str]()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*arguments: Tensor) -> Any:
            if exhausted:
                raise torch.OutOfMemoryError("made up")
            return graph(*arguments)

        return run

    function = nn.Linear(2, 2) if kind == "network" else torch.sin
    compiled = CompiledNetwork(function, said.append, backend) if kind == "network" else Compiled(torch.sin, backend)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(torch.ones(3, 2))
    exhausted.clear()
    torch.testing.assert_close(compiled(torch.ones(3, 2)), function(torch.ones(3, 2)))
    assert not compiled.gave_up
    assert not said
    assert not [warning for warning in recwarn if "uncompiled" in str(warning.message)]
    torch._dynamo.reset()


class Counting:
    """A backend that notes how many faces each graph is compiled for, and fails from graph number `most` on."""

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.faces: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if len(self.faces) >= self.most:
            raise RuntimeError("too large a graph")
        self.faces.extend(x.shape[0] for x in inputs if x.dim() == 4 and x.shape[1:] == (3, 8, 8))
        return graph


def test_what_is_compiled_is_what_trains() -> None:
    """A batch of 7 in passes of at most 3, part of the network frozen: one graph for each size that occurs, made in the
    trial, and none afterwards."""
    assert part_sizes(7, 3) == [3, 2]
    network, backend = units(), Counting()
    train_mode(network, ("0",))

    def try_sizes(module: nn.Module) -> None:
        for faces in part_sizes(7, 3):
            trial_pass(module, faces, 8, torch.float32)

    compiled = compile_network(network, Ranks(), CPU, try_sizes, print, backend)
    assert backend.faces == [3, 2]
    train_mode(network, ("0",))
    for faces in (3, 2, 2):
        with autocast(CPU, torch.float32):  # as a step has it
            embeddings = compiled(to_network_input(torch.zeros(faces, 8, 8, 3, dtype=torch.uint8)))
        embeddings.sum().backward()
    assert backend.faces == [3, 2]
    torch._dynamo.reset()


@pytest.mark.parametrize(("faces", "most"), [(128, 128), (128, 50), (128, 64), (7, 3), (9, 2)])
def test_part_sizes_are_those_of_a_step(faces: int, most: int) -> None:
    """As TrainingStep splits a batch."""
    parts = torch.arange(faces).tensor_split(-(-faces // most))
    assert part_sizes(faces, most) == sorted({len(part) for part in parts}, reverse=True)


@pytest.mark.parametrize("name", ["channels_last", "contiguous_format", "preserve_format"])
def test_programs_share_what_was_compiled(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Memory formats, which decide under what name the compiler keeps its work, are pickled alike in whatever order a
    program imports its modules. Else each program would compile the same network for a minute or more."""
    memory_format = getattr(torch, name)
    before = pickle.dumps(memory_format)
    monkeypatch.setattr(sys, "modules", {"first": SimpleNamespace(torch=torch)} | sys.modules)
    assert pickle.dumps(memory_format) == before
    assert pickle.loads(before) is memory_format


def test_a_compiler_that_fails_later_is_done_without() -> None:
    """Smaller passes, after running out of memory, need another graph: where that fails training goes on uncompiled."""
    network, said = units(), list[str]()
    compiled = compile_network(network, Ranks(), CPU, attempt, said.append, Counting(most=1))
    expected = network(torch.ones(3, 3, 8, 8))
    assert not said
    torch.testing.assert_close(compiled(torch.ones(3, 3, 8, 8)), expected)
    assert len(said) == 1
    assert "too large a graph" in said[0]
    torch._dynamo.reset()


def test_each_shape_of_a_function_is_compiled_by_itself() -> None:
    """What is compiled for any number of faces is slower."""
    rows: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        rows.extend(tensor.shape[0] for tensor in inputs if isinstance(tensor, Tensor))
        return graph

    compiled = Compiled(torch.sin, backend)
    for faces in (3, 4, 5, 4):
        compiled(torch.ones(faces, 2))
    assert rows == [3, 4, 5]
    torch._dynamo.reset()


def test_a_spread_network_is_compiled_in_parts() -> None:
    """On two ranks the graph is cut where a bucket of gradients is full, so that their exchange can begin early; the
    weights after a step are those of the network alone. In the trial, which may fail on one of them, no rank waits for
    the gradients of another."""
    found = run_on_ranks(2, compile_on_a_rank)
    assert [(graphs, tried) for graphs, tried, _, _ in found] == [(2, [False]), (2, [False])]
    # Statistics of norms are each rank's own; the first rank's, on all, would leave the others' faces out.
    assert [mean.tolist() for *_, mean in found] == [pytest.approx([0.19 * number] * 3) for number in (1, 2)]
    alone = torch.nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1000))
    for weight in alone.parameters():
        nn.init.constant_(weight, 1e-3)
    alone(torch.ones(2, 1000)).sum().backward()
    for _, _, gradients, _ in found:
        for gradient, weight in zip(gradients, alone.parameters(), strict=True):
            torch.testing.assert_close(gradient, weight.grad)


def compile_on_a_rank() -> tuple[int, list[bool], list[Tensor], Tensor]:
    """(graphs that the compiler was given, whether the trial exchanges gradients, those averaged over the ranks, the
    mean of a norm after two batches of rank + 1)."""
    graphs, exchanges = [], list[bool]()

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    assert dist.group.WORLD is not None
    network = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1000))
    for weight in network.parameters():
        nn.init.constant_(weight, 1e-3)

    def attempt_it(module: nn.Module) -> None:
        exchanges.append(bool(module.require_backward_grad_sync))
        module(torch.ones(2, 1000)).sum().backward()
        network.zero_grad(set_to_none=True)

    spread_network = compile_network(network, Ranks(dist.group.WORLD), CPU, attempt_it, print, count)
    spread_network(torch.ones(2, 1000)).sum().backward()
    norm, ranks = nn.BatchNorm1d(3), Ranks(dist.group.WORLD)
    spread_norm = spread(norm, ranks, CPU)
    for _ in range(2):
        spread_norm(torch.full((4, 3), ranks.rank + 1.0)).sum().backward()
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    assert norm.running_mean is not None
    return len(graphs), exchanges, gradients, norm.running_mean
