"""Which weights learn and decay, on every network; that optimizers make the published steps; that frozen parts rest."""

import copy
import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from models import create_network
from utils.training.muon import Muon
from utils.training.optimizers import create_optimizer, freeze, parameter_groups, set_learning_rate, train_mode
from utils.training.schedules import OptimizerName

OPTIMIZERS = get_args(OptimizerName)
NETWORKS = ("r18", "r34", "r50", "r100", "r200", "mbf", "demo")


def on_meta(name: str) -> nn.Module:
    """A network without values, for what only shapes and types matter to."""
    with torch.device("meta"):
        return create_network(name, 8, 16)


def demo_network() -> nn.Module:
    torch.manual_seed(0)
    return create_network("demo", 8, 16)


def step_of(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on random faces that are to lie near random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, 3, 16, 16, generator=generator)
    loss = (network(inputs) - torch.randn(8, 8, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_that_learns_is_in_one_group(name: str) -> None:
    """None is left out, none is stepped twice; what is fixed (IResNet's last scale) is in none."""
    network = on_meta(name)
    groups = parameter_groups(network, 5e-4)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, p in network.named_parameters() if p.requires_grad)
    assert all(network.get_parameter(name) is p for group in groups for name, p in group["params"])
    assert all(group["params"] and group["lr_factor"] == 1 for group in groups)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_layers_decay_and_nothing_else(name: str) -> None:
    """Norms, slopes of PReLUs and biases are found by the type of their module."""
    network = on_meta(name)
    decays = {key: group["weight_decay"] for group in parameter_groups(network, 5e-4) for key, _ in group["params"]}
    kinds = set()
    for path, module in network.named_modules():
        for key, parameter in module.named_parameters(path, recurse=False):
            if not parameter.requires_grad:
                continue
            resting = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.PReLU) or key.endswith("bias")
            assert decays[key] == (0 if resting else 5e-4), key
            kinds.add((type(module).__name__, key.rpartition(".")[2]))
    assert {("Conv2d", "weight"), ("Linear", "weight"), ("BatchNorm2d", "weight")} <= kinds, "all kinds were tested"
    assert name == "demo" or ("PReLU", "weight") in kinds
    assert not name.startswith("r") or ("Linear", "bias") in kinds


@pytest.mark.parametrize("name", NETWORKS)
def test_decay_all_is_what_insightface_does(name: str) -> None:
    """Every parameter decays."""
    network = on_meta(name)
    groups = parameter_groups(network, 1e-4, decay_all=True)
    assert {group["weight_decay"] for group in groups} == {1e-4}
    learning = [p for p in network.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(learning)


@pytest.mark.parametrize("name", NETWORKS)
def test_matrices_are_full_ones(name: str) -> None:
    """Muon gets the linear layers and the convolutions in which every output sees every input, and no others."""
    network = on_meta(name)
    matrices = {key for group in parameter_groups(network, 0.1) if group["matrices"] for key, _ in group["params"]}
    for path, module in network.named_modules():
        for key, _ in module.named_parameters(path, recurse=False):
            full = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
            assert (key in matrices) == (full and key.endswith("weight")), key
    grouped = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert bool(grouped) == (name == "mbf")


def test_one_rate_for_all_groups_but_for_their_factor() -> None:
    """The loop gives one learning rate; the network's is that times its factor, at every step anew."""
    groups = parameter_groups(demo_network(), 0.1, lr_factor=0.25)
    for name in OPTIMIZERS:
        optimizer = create_optimizer(name, groups, 0.9)
        for lr in (0.5, 0.1, 0.1):
            set_learning_rate(optimizer, lr)
            assert [group["lr"] for group in optimizer.param_groups] == [0.25 * lr] * len(groups)


# --- optimizers -------------------------------------------------------------------------------------------------------


def plain_sgd(weight: Tensor, state: dict[str, Tensor], gradient: Tensor, lr: float, decay: float, _: int) -> Tensor:
    gradient = gradient + decay * weight
    state["momentum"] = 0.8 * state.get("momentum", torch.zeros_like(weight)) + gradient
    return weight - lr * state["momentum"]


def plain_adamw(weight: Tensor, state: dict[str, Tensor], gradient: Tensor, lr: float, decay: float, t: int) -> Tensor:
    state["mean"] = 0.9 * state.get("mean", torch.zeros_like(weight)) + 0.1 * gradient
    state["square"] = 0.999 * state.get("square", torch.zeros_like(weight)) + 0.001 * gradient**2
    mean, square = state["mean"] / (1 - 0.9**t), state["square"] / (1 - 0.999**t)
    return weight * (1 - lr * decay) - lr * mean / (square.sqrt() + 1e-8)


@pytest.mark.parametrize(("name", "plain"), [("sgd", plain_sgd), ("adamw", plain_adamw)])
def test_steps_are_those_of_a_plain_loop(name: OptimizerName, plain: Any) -> None:
    """float64 formulas parameter by parameter: momentum, where decay goes in, which parameters decay, and the rates."""
    network = demo_network().double()
    optimizer = create_optimizer(name, parameter_groups(network, 0.1, lr_factor=0.5), 0.8)
    expected = {key: p.detach().clone() for key, p in network.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {key: {} for key in expected}
    for t, lr in enumerate((0.1, 0.02, 0.05), 1):
        for i, parameter in enumerate(network.parameters()):
            generator = torch.Generator().manual_seed(100 * t + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        set_learning_rate(optimizer, lr)
        for key, parameter in network.named_parameters():
            decay = 0.1 if parameter.ndim > 1 else 0.0
            expected[key] = plain(expected[key], states[key], parameter.grad, 0.5 * lr, decay, t)
        optimizer.step()
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[key], rtol=1e-9, atol=1e-12, msg=key)


def test_muon_gets_matrices_and_decay() -> None:
    """Matrices keep a momentum, other parameters the means of AdamW; MobileFaceNet has both kinds of kernels."""
    torch.manual_seed(0)
    network = create_network("mbf", 8, 16)
    optimizer = create_optimizer("muon", parameter_groups(network, 0.1), 0.9)
    assert isinstance(optimizer, Muon)
    set_learning_rate(optimizer, 1e-3)
    step_of(network, optimizer, 0)
    kinds = {key: set(optimizer.state[p]) for key, p in network.named_parameters()}
    assert kinds["features.layers.2.weight"] == kinds["layers.0.layers.0.weight"] == {"momentum_buffer"}
    assert kinds["layers.1.layers.0.weight"] == kinds["conv_sep.layers.1.bias"] == {"exp_avg", "exp_avg_sq", "step"}
    assert [(group["matrices"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (True, 0.1),
        (False, 0.1),
        (False, 0.0),
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_tensors_and_goes_on_to_the_bit(name: OptimizerName) -> None:
    """Checkpoints hold nothing but tensors; restored, the next steps are the same."""
    network = demo_network()
    optimizer = create_optimizer(name, parameter_groups(network, 0.1), 0.9)
    set_learning_rate(optimizer, 1e-3)
    for seed in range(3):
        step_of(network, optimizer, seed)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(network.state_dict())
    values = list(itertools.chain.from_iterable(entry.values() for entry in state["state"].values()))
    assert len(state["state"]) == len(list(network.parameters()))
    assert {type(value) for value in values} == {Tensor}
    restored = demo_network()
    restored.load_state_dict(weights)
    again = create_optimizer(name, parameter_groups(restored, 0.1), 0.9)
    groups = again.state_dict()["param_groups"]
    again.load_state_dict({"state": state["state"], "param_groups": groups})
    set_learning_rate(again, 1e-3)
    step_of(network, optimizer, 9)
    step_of(restored, again, 9)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[key]), key
    assert not torch.equal(network.state_dict()["head.1.weight"], weights["head.1.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_names_its_parameters(name: OptimizerName) -> None:
    """The order of parameters depends on the settings; their names in the groups say which state is whose."""
    network = demo_network()
    optimizer = create_optimizer(name, parameter_groups(network, 0.1), 0.9)
    names = [key for group in optimizer.state_dict()["param_groups"] for key in group["param_names"]]
    assert sorted(names) == sorted(key for key, _ in network.named_parameters())
    for group in optimizer.param_groups:
        for key, parameter in zip(group["param_names"], group["params"], strict=True):
            assert network.get_parameter(key) is parameter


def test_unknown_optimizer() -> None:
    """A misspelt name is an error with the setting."""
    with pytest.raises(ValueError, match=r"train\.optimizer: there is no optimizer 'adam'"):
        create_optimizer("adam", parameter_groups(demo_network(), 0.1), 0.9)  # type: ignore[arg-type]


# --- frozen parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parts_do_not_change(name: OptimizerName) -> None:
    """Neither weights nor statistics of norms change in real steps, with decay and momentum; all others do."""
    network, frozen = demo_network(), ("body.0", "body.1.1", "body.2")
    freeze(network, frozen)
    optimizer = create_optimizer(name, parameter_groups(network, 0.1, decay_all=True), 0.9)
    set_learning_rate(optimizer, 1e-2)
    before = copy.deepcopy(network.state_dict())
    for seed in range(3):
        network.eval()  # as verification leaves it
        train_mode(network, frozen)
        step_of(network, optimizer, seed)
    for key, tensor in network.state_dict().items():
        rests = any(key.startswith(f"{part}.") for part in frozen)
        assert torch.equal(tensor, before[key]) == rests, key


def test_a_part_is_a_whole_name() -> None:
    """`layer1` is not the beginning of `layer10`, and a single parameter can be named too."""
    network = nn.Sequential()
    network.add_module("layer1", nn.Linear(2, 2))
    network.add_module("layer10", nn.Linear(2, 2))
    freeze(network, ("layer1",))
    assert [p.requires_grad for p in network.parameters()] == [False, False, True, True]
    freeze(network, ("layer10.bias",))
    assert [p.requires_grad for p in network.parameters()] == [False, False, True, False]
    train_mode(network, ("layer1", "layer10.bias"))
    assert [module.training for module in network] == [False, True]


def test_without_frozen_parts_everything_learns() -> None:
    """The default changes nothing but the mode."""
    network = demo_network().eval()
    freeze(network, ())
    train_mode(network, ())
    assert all(p.requires_grad for p in network.parameters())
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layr1", r"no weights in 'layr1'; did you mean layer1 or layer"),
        ("layer1.7", r"no weights in 'layer1.7'; did you mean layer1\."),
        (
            "stem",
            r"no weights in 'stem'; its parts are conv1, bn1, prelu, layer1, layer2, layer3, layer4, bn2, fc, feat",
        ),
        ("layer", r"no weights in 'layer'; did you mean layer"),
        ("", r"no weights in ''; its parts are conv1"),
    ],
)
def test_a_part_that_is_not_there(part: str, message: str) -> None:
    """A name that fits nothing would train what was to be kept: it is an error, with the setting and near names."""
    with pytest.raises(ValueError, match=rf"^train\.frozen: the network has {message}"):
        freeze(on_meta("r18"), ("conv1", part))


def test_all_frozen_is_refused() -> None:
    """A network that cannot learn is an error, not an optimizer's complaint about an empty list."""
    with pytest.raises(ValueError, match=r"^train\.frozen: nothing of the network is left to learn"):
        freeze(demo_network(), ("body", "head"))


def test_sgd_has_its_momentum_before_the_first_step() -> None:
    """A first step that a gradient scaler skips must not leave memory that nobody wrote to behind as momentum."""
    network = nn.Linear(3, 2)
    optimizer = create_optimizer("sgd", parameter_groups(network, 0.0), momentum=0.9)
    for parameter in network.parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], torch.zeros_like(parameter))
