"""PReLUs with a quick backward pass are torch's own in all but time."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from models import create_network
from utils.training.quick_prelu import QuickPReLU, quicken_prelus


def quick(network: nn.Module) -> nn.Module:
    copied = copy.deepcopy(network)
    quicken_prelus(copied)
    return copied


def results(prelu: nn.Module, x: Tensor, to_output: Tensor) -> tuple[Tensor, ...]:
    """Of a PReLU: its output, and the gradients of the input and of the slopes."""
    x = x.clone().requires_grad_()
    output = prelu(x)
    return output, *torch.autograd.grad(output, (x, prelu.weight), to_output)


@pytest.mark.parametrize("channels", [5, 1])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 5), torch.contiguous_format),
        ((4, 5, 6, 7), torch.contiguous_format),
        ((4, 5, 6, 7), torch.channels_last),
        ((1, 5, 1, 1), torch.channels_last),
    ],
)
def test_values_and_gradients_are_those_of_torch(
    shape: tuple[int, ...], layout: torch.memory_format, channels: int
) -> None:
    """To the last bit, at zeros too, in the same layout in memory; a value that is no number shows in the slopes."""
    torch.manual_seed(0)
    x, to_output = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    x[0, :2] = torch.tensor([0.0, -0.0]).reshape(2, *[1] * (len(shape) - 2))
    plain = nn.PReLU(channels)
    nn.init.uniform_(plain.weight, -1, 1)
    for found, wanted in zip(results(quick(plain), x, to_output), results(plain, x, to_output), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert found.stride() == wanted.stride()
    x[0, 1] = torch.nan
    assert results(quick(plain), x, to_output)[2].isnan().sum() == 1


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_network_learns_the_same(precision: torch.dtype, frozen: bool) -> None:
    """Every gradient of a network, with slopes that rest too, and in mixed precision, where torch's PReLU stays."""
    torch.manual_seed(0)
    plain = create_network("mbf", 32, 32).to(memory_format=torch.channels_last)
    for module in plain.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)  # 0.25, as they begin, is the same number in every precision
            module.requires_grad_(not frozen)
    faces = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    gradients = []
    for network in (plain, quick(plain)):
        with torch.autocast("cpu", precision) if precision != torch.float32 else nullcontext():
            network(faces).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in network.named_parameters()})
    assert sum(type(module) is QuickPReLU for module in network.modules()) > 10
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=0, atol=0, msg=name)


def test_other_kinds_and_the_weights_names_stay() -> None:
    """A subclass of somebody's keeps its own backward pass; checkpoints fit."""

    class Own(nn.PReLU):
        pass

    network = nn.Sequential(nn.PReLU(3), Own(3), nn.ReLU())
    quickened = quick(network)
    assert [type(module) for module in quickened] == [QuickPReLU, Own, nn.ReLU]
    assert quickened.state_dict().keys() == network.state_dict().keys()
