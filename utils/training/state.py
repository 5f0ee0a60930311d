"""All that a step of training changes, as tensors by name, to be saved and restored."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.heads import Head
from utils.checkpoints import CheckpointError, shorten
from utils.training.checkpoint_store import Rows, Saved
from utils.training.ema import WeightAverage
from utils.training.optimizers import start_momentum


class TrainingState:
    """Network, head, optimizer and moving average. There are no generators of random numbers: what is random in a step
    derives from seed and step.

    Names, beside the network's own: `average.*`, `head.*` and `optimizer.WEIGHT.*`. The class centres and their
    optimizer state (`rows`) are spread over the ranks; all else is the same on each.
    """

    def __init__(
        self, network: nn.Module, head: Head, optimizer: torch.optim.Optimizer, average: WeightAverage | None
    ) -> None:
        self.network, self.head, self.optimizer, self.average = network, head, optimizer, average

    def backbone(self) -> dict[str, Tensor]:
        """The network, under its own names."""
        return self.network.state_dict()

    def whole(self) -> dict[str, Tensor]:
        """What is the same on all ranks, without the network."""
        tensors: dict[str, Tensor] = {}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.network.state_dict().items()}
        rows = self.rows()
        tensors |= {
            f"head.{name}": value for name, value in self.head.state_dict().items() if f"head.{name}" not in rows
        }
        names = self._optimized()
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{names[index]}.{key}": value for key, value in state.items() if value is not None}
        return tensors

    def rows(self) -> dict[str, Rows]:
        """What is spread over the ranks."""
        k, held = self.head.sub_centers, self.head.held
        parts = {"weight": self.head.weight.detach()}
        parts |= zip(self.head.optimizer.states, self.head.optimizer_states(), strict=True)
        return {f"head.{name}": Rows(part, held.start * k, self.head.classes * k) for name, part in parts.items()}

    def restore(self, saved: Saved) -> None:
        """Restore what any number of ranks saved. Raises CheckpointError when it does not fit."""
        tensors = saved.whole() | {f"network.{name}": value for name, value in saved.backbone().items()}
        modules: list[tuple[str, nn.Module]] = [("network", self.network)]
        if self.average is not None:
            # A run may go on with train.ema that began without: the average then starts from the weights.
            had_one = any(name.startswith("average.") for name in tensors)
            modules.append(("average" if had_one else "network", self.average.network))
        rows = self.rows()
        for name, module in modules:
            _load(saved, module, name, tensors)
        with torch.no_grad():
            for name, part in rows.items():
                found, wanted = saved.shape(name), (part.total, *part.tensor.shape[1:])
                if found != wanted:
                    raise CheckpointError(
                        f"{saved.folder} does not fit the head of the settings: {name} has the shape {found}, here it "
                        f"is {wanted}"
                    )
                part.tensor.copy_(saved.rows(name, part.first, part.first + len(part.tensor)))
        here = {name.removeprefix("head."): part.tensor for name, part in rows.items()}
        tensors = self._with_statistics(tensors)
        _load(saved, self.head, "head", tensors | {f"head.{name}": value for name, value in here.items()})
        states: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self._optimized()):
            prefix = f"optimizer.{name}."
            # Copied: an optimizer may take them as they are, and they lie in the file, which is to be removed later.
            state = {
                key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)
            }
            if state:
                states[index] = state
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        _match_strides(self.optimizer)
        start_momentum(self.optimizer)  # of parts that were frozen before

    def _with_statistics(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` with the present loss's statistics in place of another's, with which the run may have begun."""
        own = {f"head.loss.{name}": value for name, value in self.head.loss.state_dict().items()}
        others = {name for name in tensors if name.startswith("head.loss.")} - own.keys()
        return own | {name: value for name, value in tensors.items() if name not in others}

    def _optimized(self) -> list[str]:
        """The names of the optimizer's weights, in its order."""
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        return [names[id(weight)] for group in self.optimizer.param_groups for weight in group["params"]]


def _load(saved: Saved, module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    state: dict[str, Any] = {
        key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
    }
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{saved.folder} does not fit the {name} of the settings: {shorten(str(error))}"
        ) from None


def _match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Lay each buffer out like its parameter (channels last, say): the optimizer's fast path wants them alike."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)
