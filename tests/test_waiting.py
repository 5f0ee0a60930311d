"""Nothing in a training step waits for the device: the whole of it runs on a device without values."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.loading import to_network_input
from meta_device import META, on_meta, unwaiting
from models.heads import RowAdamW, RowOptimizer, RowSGD, create_head
from models.losses import LOSSES, create_loss
from utils.ranks import Ranks
from utils.training.ema import WeightAverage
from utils.training.log import Meter
from utils.training.optimizers import create_optimizer, parameter_groups
from utils.training.schedules import OptimizerName
from utils.training.step import TrainingStep

__all__ = ["on_meta"]

CLASSES, SIZE, FACES = 40, 6, 8
#: With the faces of a pass at most.
OPTIMIZERS: list[tuple[OptimizerName, int]] = [("sgd", FACES), ("adamw", 3), ("muon", 4)]


def make_step(loss: str, optimizer: OptimizerName, micro_batch: int, **head: Any) -> TrainingStep:
    """A step of a small network with a norm and a dropout, and a head, all on the device without values."""
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Dropout(0.1)
    network = nn.Sequential(*layers, nn.Linear(36, SIZE)).to(META)
    options = {"plus": head.pop("plus", False), "filter_above": head.pop("filter_above", 0.0)}
    rows: RowOptimizer = RowSGD() if optimizer == "sgd" else RowAdamW()
    made = create_head(create_loss(loss, **options), CLASSES, SIZE, rows, FACES, device=META, **head)
    learning = create_optimizer(optimizer, parameter_groups(network, 5e-4), 0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainingStep(network, made, learning, scaler, torch.float32, 5.0, micro_batch, Ranks())


HEADS: dict[str, dict[str, Any]] = {
    "dense": {"engine": "dense"},
    "blockwise": {"engine": "blockwise", "block": 16},
    "bfloat16 products, filtered": {
        "engine": "blockwise", "block": 16, "matmul": torch.bfloat16, "plus": True, "filter_above": 0.4,
    },
    "sampled": {"engine": "blockwise", "block": 16, "sample_rate": 0.5},
    "sub-centers": {"engine": "blockwise", "block": 16, "sub_centers": 3},
}  # fmt: skip


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_waits_for_nothing(loss: str, head: str) -> None:
    """Every loss with every engine, each with every optimizer, in one pass and in several; the input before the step,
    and the average and the meter after it. A single `.item()`, `.tolist()`, `.cpu()` or mask as an index costs a card
    its queue in every step."""
    turn = list(LOSSES).index(loss) + list(HEADS).index(head)
    optimizer, micro_batch = OPTIMIZERS[turn % 3]
    step = make_step(loss, optimizer, micro_batch, **HEADS[head])
    average, meter = WeightAverage(step.network, 0.9), Meter(torch.device("cpu"))
    faces = torch.empty(FACES, 5, 5, 3, dtype=torch.uint8, device=META)
    labels = torch.empty(FACES, dtype=torch.int64, device=META)
    with unwaiting() as copies:
        for number in range(2 if head == "blockwise" else 1):  # the second finds state of the first
            inputs = to_network_input(faces, torch.zeros(FACES, dtype=torch.bool).to(META, non_blocking=True))
            meter.add(number, step(inputs, labels, number, 0.1), FACES)
            average.update(step.network, number)
    assert copies.operations > 100


WAITING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "copy from": lambda x: torch.empty(5).copy_(x),
    "copy to": lambda x: x.copy_(torch.empty(5)),
    "to the device": lambda x: torch.empty(5).to(x.device),
    "tensor": lambda x: torch.tensor(0.1, device=x.device),
    "new tensor": lambda x: x.new_tensor([1.0]),
    "as tensor": lambda x: torch.as_tensor(np.ones(3), device=x.device),
    "mask": lambda x: x[x > 0],
    "put by mask": lambda x: x.index_put_((x > 0,), x),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "two devices": lambda x: x + torch.ones(5),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_waits_is_seen(what: str) -> None:
    """The measure itself: each way of waiting for the device is refused."""
    x: Tensor = torch.empty(5, device=META)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError, TypeError)), unwaiting():
        WAITING[what](x)
