"""The moving average of weights: against the plain formula, and what it must leave alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from models import create_network
from utils.training.ema import WeightAverage


def disturb(network: nn.Module, seed: int) -> None:
    """Move every weight and statistic, as a training step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.add_(1)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return create_network("demo", 8, 16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def test_it_is_the_plain_formula() -> None:
    """average <- d average + (1 - d) weights with d = min(decay, (1 + step) / (10 + step)), in float64, statistics
    of norms included; counters are those of the network."""
    network = small_network()
    average = WeightAverage(network, 0.6)
    expected = {name: tensor.double() for name, tensor in network.state_dict().items()}
    decays = []
    for step in range(20):
        disturb(network, step)
        average.update(network, step)
        decays.append(min(0.6, (1 + step) / (10 + step)))
        for name, tensor in network.state_dict().items():
            expected[name] = decays[-1] * expected[name] + (1 - decays[-1]) * tensor.double()
    assert decays[0] == 0.1
    assert decays[-1] == 0.6 > decays[-9], "both sides of the minimum are tested"
    for name, tensor in average.network.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert tensor == network.state_dict()[name] == 20


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    """An average that never changes, or one that swings, would be kept as if it were the best network."""
    with pytest.raises(ValueError, match=r"train\.ema: must be from 0 to below 1"):
        WeightAverage(nn.Linear(1, 1), decay)


def test_the_network_is_left_alone() -> None:
    """The average is a copy: neither is changed by what happens to the other, and it takes no gradients."""
    network = small_network()
    average = WeightAverage(network, 0.999)
    before = copy.deepcopy(average.network.state_dict())
    disturb(network, 1)
    for name, tensor in average.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    moved = copy.deepcopy(network.state_dict())
    average.update(network, 5)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, moved[name]), name
    assert network.training
    assert not average.network.training
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in average.network.parameters())


def test_weights_that_rest_stay_to_the_bit() -> None:
    """The average of equal weights is those weights, so that frozen parts are kept exactly."""
    network = small_network()
    average = WeightAverage(network, 0.9)
    for step in range(30):
        average.update(network, step)
    for name, tensor in average.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


def test_updates_are_in_place_and_keep_the_layout() -> None:
    """The tensors stay the same ones, in channels-last order, so that nothing is allocated anew at every step."""
    network = small_network()
    average = WeightAverage(network, 0.9)
    before = {name: tensor.data_ptr() for name, tensor in average.network.state_dict().items()}
    disturb(network, 1)
    average.update(network, 0)
    for name, tensor in average.network.state_dict().items():
        assert tensor.data_ptr() == before[name], name
        assert tensor.stride() == network.state_dict()[name].stride(), name


def test_its_state_dict_is_all_there_is_to_go_on_with() -> None:
    """An average restored from the state dict of its network goes on to the bit."""
    network = small_network()
    average = WeightAverage(network, 0.99)
    states: list[dict[str, Tensor]] = []
    for step in range(6):
        disturb(network, step)
        if step == 3:
            restored = WeightAverage(small_network(), 0.99)
            restored.network.load_state_dict(copy.deepcopy(average.network.state_dict()))
        if step >= 3:
            restored.update(network, step)
        average.update(network, step)
        states.append(copy.deepcopy(average.network.state_dict()))
    for name, tensor in restored.network.state_dict().items():
        assert torch.equal(tensor, states[-1][name]), name
    assert not torch.equal(states[-1]["head.1.weight"], states[-2]["head.1.weight"])


def test_nothing_waits_for_the_device() -> None:
    """No value of a tensor is read in an update: tensors that have none are averaged without complaint."""
    with torch.device("meta"):
        network = create_network("demo", 8, 16)
        average = WeightAverage(network, 0.9)
        average.update(network, 3)
        assert average.network.get_buffer("head.2.running_mean").is_meta
