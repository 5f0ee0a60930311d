"""What is saved of a run is all that its next step depends on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.heads import BlockwiseHead, RowAdamW, RowOptimizer, RowSGD
from models.losses import create_loss
from utils.checkpoints import CheckpointError
from utils.ranks import Ranks
from utils.training.checkpoint_store import CheckpointStore
from utils.training.ema import WeightAverage
from utils.training.optimizers import OptimizerName, create_optimizer, parameter_groups
from utils.training.saved_checkpoints import Saved
from utils.training.state import TrainingState
from utils.training.step import TrainingStep

CLASSES, SIZE = 9, 6


class Parts:
    """A tiny network with all that training needs around it."""

    def __init__(
        self, optimizer: OptimizerName, seed: int, loss: str = "adaface", size: int = SIZE, classes: int = CLASSES
    ) -> None:
        torch.manual_seed(seed)
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 9, size))
        self.network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        rows: RowOptimizer = RowSGD() if optimizer == "sgd" else RowAdamW()
        self.head = BlockwiseHead(create_loss(loss), classes, size, rows, 8, block=4, sub_centers=2, seed=seed)
        self.optimizer = create_optimizer(optimizer, parameter_groups(self.network, 1e-3), 0.9)
        self.average = WeightAverage(self.network, 0.9)
        self.state = TrainingState(self.network, self.head, self.optimizer, self.average)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.step = TrainingStep(
            self.network, self.head, self.optimizer, scaler, torch.float32, 5.0, micro_batch=8, ranks=Ranks()
        )

    def train(self, *steps: int) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            faces = torch.randn(8, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)
            self.step(faces, torch.randint(0, CLASSES, (8,), generator=generator), step, lr=0.05)
            self.average.update(self.network, step)

    def save(self, store: CheckpointStore, step: int) -> Saved:
        """Its state, saved and found again."""
        store.save(step, self.state.whole(), self.state.rows(), {}, wait=True, backbone=self.state.backbone())
        saved = store.newest()
        assert saved is not None
        return saved

    def everything(self) -> dict[str, Tensor]:
        network = {f"network.{name}": value for name, value in self.state.backbone().items()}
        return network | self.state.whole() | {name: rows.tensor for name, rows in self.state.rows().items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_next_steps_are_the_same(tmp_path: Path, optimizer: OptimizerName) -> None:
    """Saved, put into parts that had gone another way, and trained on: every tensor equal to the bit."""
    ours, other = Parts(optimizer, seed=0), Parts(optimizer, seed=1)
    ours.train(0, 1, 2)
    other.train(7, 8)
    with CheckpointStore(tmp_path, Ranks()) as store:
        other.state.restore(ours.save(store, 3))
        for parts in (ours, other):
            parts.train(3, 4)
    expected, reached = ours.everything(), other.everything()
    assert expected.keys() == reached.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, reached[name])] == []
    # Network, its average, momentum of its weights, centres and theirs, and AdaFace's statistics.
    assert {name.split(".")[0] for name in expected} == {"network", "average", "head", "optimizer"}
    assert {"head.weight", "head.loss.norm_mean"} <= expected.keys()
    assert sum(name.startswith("optimizer.") for name in expected) >= len(list(ours.network.parameters()))


def test_momentum_is_laid_out_like_its_weights(tmp_path: Path) -> None:
    """Weights that are channels last get channels-last momentum back, which the fused optimizers need to stay fast."""
    parts = Parts("sgd", seed=0)
    parts.train(0)
    with CheckpointStore(tmp_path, Ranks()) as store:
        parts.state.restore(parts.save(store, 1))
    weight = parts.network[0].weight
    assert parts.optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_nothing_lies_in_the_checkpoint_that_was_restored(tmp_path: Path, optimizer: OptimizerName) -> None:
    """It is removed when newer ones are there, which NFS does not do with a file that is still mapped."""
    parts = Parts(optimizer, seed=0)
    parts.train(0)
    with CheckpointStore(tmp_path, Ranks()) as store:
        parts.state.restore(parts.save(store, 1))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("loss", ["arcface", "curricularface"])
def test_another_loss_goes_on_with_statistics_of_its_own(tmp_path: Path, loss: str) -> None:
    """From AdaFace, which has some, to a loss with none or others, and back: these start anew, all else is restored."""
    ours, other, back = Parts("sgd", seed=0), Parts("sgd", seed=1, loss=loss), Parts("sgd", seed=1)
    anew = {name: value.clone() for parts in (other, back) for name, value in parts.head.loss.state_dict().items()}
    ours.train(0, 1)
    with CheckpointStore(tmp_path, Ranks()) as store:
        other.state.restore(ours.save(store, 2))
        back.state.restore(other.save(store, 3))
    expected = ours.everything()
    for parts in (other, back):
        reached = parts.everything()
        statistics = {f"head.loss.{name}" for name in parts.head.loss.state_dict()}
        assert {name for name in reached if name.startswith("head.loss.")} == statistics
        assert all(torch.equal(reached[name], anew[name.removeprefix("head.loss.")]) for name in statistics)
        assert all(torch.equal(reached[name], expected[name]) for name in reached.keys() - statistics)


@pytest.mark.parametrize(("part", "other"), [("network", {"size": 5}), ("head", {"classes": CLASSES + 1})])
def test_parts_of_another_kind_are_refused(tmp_path: Path, part: str, other: dict[str, int]) -> None:
    """Resuming with another network or other classes names the part that does not fit."""
    with CheckpointStore(tmp_path, Ranks()) as store:
        saved = Parts("sgd", seed=0).save(store, 1)
        with pytest.raises(CheckpointError, match=f"step-000000001 does not fit the {part} of the settings"):
            Parts("sgd", seed=0, loss="adaface", **other).state.restore(saved)
