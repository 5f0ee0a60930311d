"""What of CUDA graphs needs no card: when they are taken, and that capturing leaves no trace."""

import pytest
import torch
from torch import Tensor, nn

from models import create_network
from models.recompute import recompute_blocks
from utils.ranks import Ranks
from utils.training.build_step import why_no_graph
from utils.training.cuda_graph import GraphedNetwork, _same_stream, with_graph
from utils.training.run_folders import TrainingError


class Recorder:
    """torch.cuda.make_graphed_callables without a card: warms up as that does, puts the replay into the module, and
    counts what is replayed."""

    def __init__(self) -> None:
        self.replays: list[torch.Size] = []
        self.cached: list[bool] = []

    def __call__(self, module: nn.Module, sample: tuple[Tensor]) -> nn.Module:
        self.cached.append(torch.is_autocast_cache_enabled())
        for _ in range(3):
            module(*sample).sum().backward()
            module.zero_grad(set_to_none=True)
        forward = module.forward

        def replay(inputs: Tensor) -> Tensor:
            self.replays.append(inputs.shape)
            return forward(inputs)

        module.forward = replay  # type: ignore[method-assign]
        return module


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    fake = Recorder()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fake)
    return fake


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


def test_capturing_leaves_no_trace(recorder: Recorder) -> None:
    """Statistics of norms are those from before, gradients none, weights registered once; autocast keeps no rounded
    weights, which torch refuses to capture; only inputs of the shape are replayed."""
    plain, captured = network(), network()
    graphed = GraphedNetwork(captured, torch.randn(6, 3, 8, 8), torch.bfloat16)
    assert recorder.cached == [False]
    for (name, before), (_, after) in zip(plain.state_dict().items(), captured.state_dict().items(), strict=True):
        assert torch.equal(before, after), name
    assert all(parameter.grad is None for parameter in captured.parameters())
    assert list(graphed.state_dict()) == [f"network.{name}" for name in captured.state_dict()]
    for faces in (6, 4, 6):
        inputs = torch.randn(faces, 3, 8, 8)
        assert torch.equal(graphed(inputs), plain(inputs))
    assert recorder.replays == [torch.Size((6, 3, 8, 8))] * 2


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told, not only that the capture ended in failure; statistics are those from before."""

    def fail(module: nn.Module, sample: tuple[Tensor]) -> None:
        try:
            module(*sample)
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    said: list[str] = []
    given = network()
    assert with_graph(given, torch.randn(6, 3, 8, 8), torch.float32, said.append) is given
    assert len(said) == 1
    assert "(operation not permitted when stream is capturing; operation failed" in said[0]
    assert torch.equal(given.state_dict()["1.running_mean"], torch.zeros(4))


def test_a_failed_capture_that_breaks_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.13 all random numbers fail once a capture did: that is said at once, with its reason and a way out."""

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def capture(module: nn.Module, sample: tuple[Tensor]) -> None:
        monkeypatch.setattr(torch, "rand", fail)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    with pytest.raises(TrainingError, match=r"train\.cuda_graph: .* \(operation not permitted .* set it to false"):
        with_graph(network(), torch.randn(6, 3, 8, 8), torch.float32, print)


def test_the_current_stream_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch enters the stream of a capture, and does not leave it when the capture fails."""
    current = ["the run's"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    with pytest.raises(RuntimeError, match="capture"), _same_stream(torch.device("cuda")):
        current.append("the capture's")
        raise RuntimeError("capture")
    assert current[-1] == "the run's"


@pytest.mark.parametrize(
    ("most", "ranks", "recompute", "reason"),
    [
        (8, 1, False, None),
        (8, 2, False, "several processes exchange gradients"),
        (4, 1, False, "a batch takes several passes"),
        (8, 1, True, "activations are computed anew"),
    ],
)
def test_when_a_step_is_captured(most: int, ranks: int, recompute: bool, reason: str | None) -> None:
    """A step of one pass, as it is; gradients of several would be added up in memory that the next pass writes to."""
    made, group = create_network("r18", 8, 32), Ranks()
    group.size = ranks
    if recompute:
        recompute_blocks(made)
    assert why_no_graph(made, 8, most, group) == reason
