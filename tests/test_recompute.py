"""Activations that are computed again instead of kept: less memory, and otherwise nothing changes."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from live_memory import LiveMemory
from models import create_network
from models.recompute import recompute_blocks
from utils.training.ema import WeightAverage
from utils.training.optimizers import freeze, train_mode

PIXELS = 32


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """Two equal networks, the second of which computes its blocks anew."""
    torch.manual_seed(0)
    plain = create_network(name, 16, PIXELS)
    recomputing = copy.deepcopy(plain)
    recompute_blocks(recomputing)
    return plain, recomputing


def faces(seed: int, number: int = 4) -> Tensor:
    return torch.randn(number, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def one_pass(network: nn.Module, inputs: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Embeddings of a forward pass whose gradients have been added to the weights'."""
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        embeddings = network(inputs)
    (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
    return embeddings.detach()


def everything(network: nn.Module) -> dict[str, Tensor | None]:
    gradients = {f"gradient of {name}": weight.grad for name, weight in network.named_parameters()}
    return {**network.state_dict(), **gradients}


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """What of weights, statistics and gradients is not equal to the bit."""
    found = everything(other)
    assert found.keys() == everything(one).keys()
    differ = []
    for name, value in everything(one).items():
        its = found[name]
        if (value is None) != (its is None) or (value is not None and its is not None and not torch.equal(value, its)):
            differ.append(name)
    return differ


@pytest.mark.parametrize("name", ["r18", "mbf"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_nothing_changes(name: str, precision: torch.dtype) -> None:
    """Embeddings, gradients, statistics of norms and how many batches they have seen: equal to the bit, over two
    passes that add up."""
    plain, recomputing = twins(name)
    for seed in range(2):
        outputs = [one_pass(network, faces(seed), precision) for network in (plain, recomputing)]
        assert torch.equal(*outputs)
    assert differences(plain, recomputing) == []
    assert {int(value) for key, value in recomputing.state_dict().items() if key.endswith("tracked")} == {2}


def test_eval_and_no_grad_are_as_before() -> None:
    """Testing computes everything once, from the statistics, and leaves them."""
    plain, recomputing = twins("r18")
    for network in (plain, recomputing):
        one_pass(network, faces(0))
        network.eval()
    calls: list[int] = []
    recomputing.get_submodule("layer1.0.conv1").register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert torch.equal(plain(faces(1)), recomputing(faces(1)))
    assert len(calls) == 1
    recomputing.train()
    one_pass(recomputing, faces(1))
    assert len(calls) == 3, "in training each block is computed twice"


@pytest.mark.parametrize(("name", "share"), [("r18", 0.6), ("mbf", 0.6)])
def test_memory_is_saved(name: str, share: float) -> None:
    """The peak of a pass is well below that of keeping all activations."""
    peaks = []
    for network in twins(name):
        inputs = faces(0, 16)
        one_pass(network, inputs)  # gradients are there from now on
        with LiveMemory() as memory:
            one_pass(network, inputs)
        peaks.append(memory.peak)
    assert peaks[1] < share * peaks[0]


def test_copies_are_independent() -> None:
    """A copy, as the moving average makes it, computes with its own weights, and leaves the others alone."""
    plain, recomputing = twins("r18")
    average = WeightAverage(recomputing, 0.9)
    duplicate = copy.deepcopy(recomputing)
    with torch.no_grad():
        for weight in duplicate.parameters():
            weight.mul_(1.5)
        for weight in plain.parameters():
            weight.mul_(1.5)
    before = copy.deepcopy(recomputing.state_dict())
    assert torch.equal(one_pass(plain, faces(0)), one_pass(duplicate, faces(0)))
    assert differences(plain, duplicate) == []
    assert all(torch.equal(value, before[name]) for name, value in recomputing.state_dict().items())
    assert all(weight.grad is None for weight in recomputing.parameters())

    recomputing.load_state_dict(duplicate.state_dict())
    average.update(recomputing, step=10**6)
    reference = create_network("r18", 16, PIXELS).eval()
    reference.load_state_dict(average.network.state_dict())
    with torch.no_grad():
        assert torch.equal(average.network(faces(1)), reference(faces(1)))


def test_frozen_parts_keep_their_statistics() -> None:
    """Blocks in eval mode, and norms in eval mode within blocks in training, use their statistics and leave them."""
    plain, recomputing = twins("r18")
    frozen = ("conv1", "bn1", "layer1", "layer2.0.bn1")
    for network in (plain, recomputing):
        freeze(network, frozen)
        train_mode(network, frozen)
    outputs = [one_pass(network, faces(0)) for network in (plain, recomputing)]
    assert torch.equal(*outputs)
    assert differences(plain, recomputing) == []
    counts = {name: int(value) for name, value in recomputing.state_dict().items() if name.endswith("tracked")}
    for name, count in counts.items():
        assert count == (0 if name.startswith(("bn1.", "layer1.", "layer2.0.bn1.")) else 1), name


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, lambda network: network])
def test_norms_may_be_replaced_afterwards(convert: Callable[[nn.Module], nn.Module]) -> None:
    """What the blocks are made of can change (train.sync_bn does) without the statistics being counted twice."""
    plain, recomputing = twins("r18")
    recomputing = convert(recomputing)
    assert torch.equal(one_pass(plain, faces(0)), one_pass(recomputing, faces(0)))
    assert differences(plain, recomputing) == []


def test_a_network_without_blocks_is_refused() -> None:
    """The setting would do nothing: an error that names setting and network."""
    with pytest.raises(ValueError, match=r"train\.activation_checkpointing: DemoNet has no blocks to recompute"):
        recompute_blocks(create_network("demo", 16, PIXELS))


@pytest.mark.parametrize(("name", "blocks"), [("r18", 8), ("r50", 24), ("mbf", 15)])
def test_every_unit_is_a_block(name: str, blocks: int) -> None:
    """All residual units of the published networks, each once."""
    assert recompute_blocks(create_network(name, 16, PIXELS)) == blocks
