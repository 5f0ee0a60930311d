"""Which weights learn, which of them decay, and by which optimizer."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from utils.training.muon import Muon
from utils.training.schedules import OptimizerName

#: What `torch.optim` takes as a group of parameters, with their names.
Group = dict[str, Any]


def freeze(network: nn.Module, frozen: Sequence[str]) -> None:
    """Freeze the parameters of the parts called `frozen` (`conv1`, `layer1`, `layer2.0`, ...).

    A name stands for all under it. The statistics of norms in these parts are `train_mode`'s concern.
    Raises ValueError for a name that no part with parameters has, and when nothing would be left to learn.
    """
    for part in frozen:
        parameters = [value for name, value in network.named_parameters() if _belongs(name, part)]
        if not parameters:
            raise ValueError(f"train.frozen: the network has no weights in {part!r}; {_near(network, part)}")
        for parameter in parameters:
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError("train.frozen: nothing of the network is left to learn; name fewer of its parts")


def train_mode(network: nn.Module, frozen: Sequence[str]) -> None:
    """`network.train()`, with the parts called `frozen` in eval mode: their norms use, and keep, their statistics."""
    network.train()
    for name, module in network.named_modules():
        if any(_belongs(name, part) for part in frozen):
            module.eval()


def parameter_groups(
    network: nn.Module, weight_decay: float, decay_all: bool = False, lr_factor: float = 1.0
) -> list[Group]:
    """The parameters that learn, each in one group, in the order of the network within a group.

    Weights of linear layers and convolutions decay; norms, slopes of PReLUs, biases and the rest do not, unless
    `decay_all`. `matrices` of a group tells Muon whether its weights are matrices from all inputs to all outputs: those
    of grouped convolutions are not. `lr_factor` is for `set_learning_rate`.
    """
    weights, matrices = set(), set()
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weights.add(module.weight)
            if isinstance(module, nn.Linear) or module.groups == 1:
                matrices.add(module.weight)
    groups: list[Group] = [
        {"params": [], "weight_decay": decay, "lr_factor": lr_factor, "matrices": are_matrices}
        for decay, are_matrices in (
            (weight_decay, True),
            (weight_decay, False),
            (weight_decay if decay_all else 0.0, False),
        )
    ]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            group = 0 if parameter in matrices else 1 if parameter in weights else 2
            groups[group]["params"].append((name, parameter))
    return [group for group in groups if group["params"]]


def create_optimizer(name: OptimizerName, groups: list[Group], momentum: float) -> torch.optim.Optimizer:
    """The optimizer called `name` over what `parameter_groups` made; `set_learning_rate` before every step.

    `momentum` is SGD's; AdamW and Muon have their published ones. On CUDA, SGD and AdamW do a step in few kernels, and
    a gradient scaler need not wait for the device. Raises ValueError for an optimizer that there is not.
    """
    on_cuda = all(parameter.is_cuda for group in groups for _, parameter in group["params"])
    fused = True if on_cuda else None
    groups = [dict(group) for group in groups]  # torch changes those it is given
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=fused)
        start_momentum(sgd)
        return sgd
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=fused)
    if name == "muon":
        return Muon(groups, lr=0.0)
    raise ValueError(f"train.optimizer: there is no optimizer {name!r}")


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set the momentum of an SGD's weights that have none yet to 0, which does not change their first step.

    Otherwise that step allocates it, and if a gradient scaler skips the step, a fused SGD leaves it uninitialised.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if group["momentum"] and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """`lr` x the group's `lr_factor` for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def _belongs(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _near(network: nn.Module, part: str) -> str:
    """What else the part may be called, for an error."""
    paths = [name.split(".") for name, _ in network.named_parameters()]
    parts = sorted({".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)})
    near = difflib.get_close_matches(part, parts, n=3)
    largest = dict.fromkeys(path[0] for path in paths)
    return f"did you mean {' or '.join(near)}?" if near else f"its parts are {', '.join(largest)}"
