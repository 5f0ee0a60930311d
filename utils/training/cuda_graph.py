"""A network's kernels as CUDA graphs, launched all at once: a slow host would let the card wait for each of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.compiling import shortly
from utils.devices import autocast
from utils.training.micro_batch import statistics_kept
from utils.training.run_folders import TrainingError


class GraphedNetwork(nn.Module):
    """`network`, in its present mode. For inputs of the shape of `sample` the captured forward and backward passes are
    replayed; others go through the network itself.

    Embeddings and gradients lie in memory of the graphs, which the next pass overwrites: a step must be one pass, and
    gradients are dropped, not zeroed, before the next. Raises torch's errors for operations that no graph can have.
    """

    def __init__(self, network: nn.Module, sample: Tensor, precision: torch.dtype) -> None:
        super().__init__()
        self.network, self._shape = network, sample.shape
        torch.cuda.empty_cache()  # graphs have memory of their own
        # What adds up gradients is made, and kept, by the capture, on a stream of its own. Torch orders the two, and
        # would warn of it.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        with statistics_kept(network), autocast(sample.device, precision), _same_stream(sample.device):
            captured: Any = torch.cuda.make_graphed_callables(_Captured(network), (sample,))
        # Not the module itself, which would be registered, and its weights with it.
        self._replay: Callable[[Tensor], Tensor] = lambda inputs: captured(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """As `network`."""
        return self._replay(inputs) if inputs.shape == self._shape else self.network(inputs)


class _Captured(nn.Module):
    """torch replaces the forward of what it captures: of this, so that the network itself stays callable."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)


def with_graph(network: nn.Module, sample: Tensor, precision: torch.dtype, say: Callable[[str], object]) -> nn.Module:
    """`network` as a GraphedNetwork, or, with a line to `say`, itself if it cannot be captured. `sample`: the input
    of a step, [B, 3, H, W], which stays in memory. Raises TrainingError where torch does not recover from a failure."""
    try:
        return GraphedNetwork(network, sample, precision)
    except Exception as error:  # what cannot be captured says so in many ways
        # The end of a capture fails in turn, and says no more than that.
        errors = (each for each in (error.__context__, error) if each is not None)
        reason = "; ".join(map(shortly, errors))
        try:
            torch.rand(1, device=sample.device)  # before 2.13, what is random takes itself for captured ever after
        except RuntimeError:
            raise TrainingError(
                f"train.cuda_graph: the network cannot be captured ({reason}), and torch {torch.__version__} does not "
                "recover from the attempt: set it to false"
            ) from error
        say(f"no CUDA graph of the network ({reason}); --no-cuda-graph says nothing")
        return network


@contextmanager
def _same_stream(device: torch.device) -> Iterator[None]:
    """The current stream is the one from before, which torch does not see to when a capture fails."""
    before = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        if before is not None:
            torch.cuda.set_stream(before)
