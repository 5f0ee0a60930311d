"""Networks and heads made as settings say: each goes through the whole of training."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny_runs
from config import Config, TrainConfig
from models import create_network
from models.heads import BlockwiseHead, DenseHead, RowAdamW, RowSGD
from train import train
from utils.checkpoints import BEST
from utils.ranks import Ranks
from utils.training import build_step as step_building
from utils.training.build_parts import build_head, build_network, describe_rates
from utils.training.build_step import build_step
from utils.training.metrics import read_metrics
from utils.training.quick_prelu import QuickPReLU
from utils.training.run_folders import TrainingError
from utils.training.step import TrainingStep

CPU = torch.device("cpu")


def configure(tiny_set: Path, runs: Path, **settings: object) -> Config:
    """3 steps, one epoch."""
    base = {"train__batch_size": 16, "train__epochs": 1, "train__lr": 0.0, "train__log_every": 1}
    return tiny_runs.configure(tiny_set, runs, **{**base, **settings})


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


HEADS: dict[str, dict[str, Any]] = {
    "auto": {},
    "dense": {"loss__engine": "dense"},
    "blockwise": {"loss__engine": "blockwise", "loss__block": 4},
    "sampled": {"loss__sample_rate": 0.5},
    "sub-centers": {"loss__sub_centers": 3},
}


@pytest.fixture(scope="module")
def plain(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the settings above, on one thread as the others: sums of floats depend on their number."""
    torch.set_num_threads(1)
    return train(configure(tiny_set, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_with_every_optimizer(tiny_set: Path, tmp_path: Path, head: str, optimizer: str) -> None:
    """The loss falls on faces seen over and over, by whatever engine and optimizer, the average verified too."""
    settings = {"train__epochs": 4, "train__optimizer": optimizer, "train__ema": 0.9, "train__verify_every": 100}
    if optimizer != "sgd":
        settings["train__lr"] = 0.01
    run = train(configure(tiny_set, tmp_path, **HEADS[head], **settings))
    found = losses(run)
    assert len(found) == 12
    assert sum(found[-3:]) < 0.95 * sum(found[:3])
    assert {"verify/tiny", "verify_average/tiny"} <= {name for line in read_metrics(run) for name in line}


@pytest.mark.parametrize("head", ["dense", "blockwise"])
def test_engines_train_the_same(tiny_set: Path, tmp_path: Path, plain: Path, head: str) -> None:
    """Which engine computes the loss, and in how many passes, is no question of what is learned."""
    run = train(configure(tiny_set, tmp_path, **HEADS[head]))
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    for name, value in load_file(plain / BEST).items():
        torch.testing.assert_close(load_file(run / BEST)[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("settings", "kind", "rows", "optimizer"),
    [
        ({}, DenseHead, 9, RowSGD(0.9, 5e-4)),
        ({"loss__engine": "blockwise"}, BlockwiseHead, 9, RowSGD(0.9, 5e-4)),
        ({"loss__block": 4, "train__optimizer": "adamw"}, BlockwiseHead, 9, RowAdamW(weight_decay=5e-4)),
        ({"loss__sub_centers": 3, "train__optimizer": "muon"}, DenseHead, 27, RowAdamW(weight_decay=5e-4)),
        ({"loss__sample_rate": 0.5, "train__momentum": 0.8}, BlockwiseHead, 9, RowSGD(0.8, 5e-4)),
    ],
)  # fmt: skip
def test_the_head_is_what_the_settings_say(
    tiny_set: Path, tmp_path: Path, settings: dict[str, object], kind: type, rows: int, optimizer: object
) -> None:
    """Engine, sub-centers, optimizer with its decay, and the first centres, which the seed decides."""
    config = configure(tiny_set, tmp_path, **settings)
    head = build_head(config, 9, 10, CPU, torch.float32, Ranks())
    assert type(head) is kind
    assert head.weight.shape == (rows, 16)
    assert head.optimizer == optimizer
    again = build_head(config, 9, 10, CPU, torch.float32, Ranks())
    other = build_head(configure(tiny_set, tmp_path, **settings, train__seed=1), 9, 10, CPU, torch.float32, Ranks())
    assert torch.equal(head.weight, again.weight)
    assert not torch.equal(head.weight, other.weight)


def test_a_run_can_start_from_another(tiny_set: Path, tmp_path: Path, plain: Path) -> None:
    """`train.init` takes a run's folder or its file: the same first weights, and not those of the seed."""
    nets = [build_network(configure(tiny_set, tmp_path, train__init=str(init)), CPU) for init in (plain, plain / BEST)]
    saved = load_file(plain / BEST)
    for network in nets:
        assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    run = train(configure(tiny_set, tmp_path, train__init=str(plain), train__verify_at_start=True))
    first = next(line["verify/tiny"] for line in read_metrics(run) if "verify/tiny" in line)
    last = [line["verify/tiny"] for line in read_metrics(plain) if "verify/tiny" in line]
    assert first in last


def test_first_weights_that_were_trained_on_bgr(tiny_set: Path, tmp_path: Path) -> None:
    """`model.colour` holds for `train.init` too, which the warning of a file that cannot tell it asks for."""
    state = create_network("demo", 16, 32).state_dict()
    torch.save(state, tmp_path / "x.pth")
    network = build_network(
        configure(tiny_set, tmp_path, train__init=str(tmp_path / "x.pth"), model__colour="bgr"), CPU
    )
    first = next(name for name, value in state.items() if value.dim() == 4)
    assert torch.equal(network.state_dict()[first], state[first].flip(1))


def test_frozen_parts_do_not_learn(tiny_set: Path, tmp_path: Path, plain: Path) -> None:
    """Their weights and statistics stay those of `train.init`, also after a verification; the others move."""
    unverified = tmp_path / "set"  # whose last network is kept
    shutil.copytree(tiny_set, unverified, ignore=shutil.ignore_patterns("*.bin"))
    run = train(
        configure(
            unverified, tmp_path, train__init=str(plain), train__frozen=("body.0", "body.1"), train__verify_every=1
        )
    )
    before, after = load_file(plain / BEST), load_file(run / BEST)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name for name in after if name not in moved and "tracked" not in name} == {
        name for name in after if name.startswith(("body.0.", "body.1.")) and "tracked" not in name
    }
    assert torch.equal(after["body.0.1.num_batches_tracked"], before["body.0.1.num_batches_tracked"])


def test_what_does_not_learn_at_the_full_rate_is_said(
    tiny_set: Path, tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run says at its start how fast the network learns, and how much of it does not: a factor or a part that is not
    what was meant shows before an hour is spent on it."""
    tuned = {"train__init": str(plain), "train__backbone_lr": 0.1, "train__frozen": ("body.0",)}
    train(configure(tiny_set, tmp_path, **tuned, train__lr=0.05))
    sizes = {name: value.numel() for name, value in create_network("demo", 16, 32).named_parameters()}
    frozen = sum(size for name, size in sizes.items() if name.startswith("body.0."))
    line = f"learning rate 0.05 at its peak, 0.005 for the network; {frozen:,} of the network's {sum(sizes.values()):,}"
    assert f"{line} weights are frozen\n" in capsys.readouterr().out
    train(configure(tiny_set, tmp_path, train__name="b", train__lr=0.05))
    assert "learning rate 0.05 at its peak\n" in capsys.readouterr().out


def test_a_rate_that_is_meant_for_another_optimizer_is_said() -> None:
    """A preset's learning rate is SGD's; AdamW does not learn at a hundred times its own."""
    network = nn.Linear(1, 1)
    assert describe_rates(TrainConfig(lr=0.1), network) == "learning rate 0.1 at its peak"
    told = describe_rates(TrainConfig(lr=0.1, optimizer="adamw", batch_size=1024), network)
    assert told == "learning rate 0.1 at its peak; that is 100 times what adamw takes by rule (--lr 0)"
    assert describe_rates(TrainConfig(lr=0, optimizer="adamw", batch_size=1024), network).endswith("0.001 at its peak")


def test_what_has_no_effect_on_this_machine_is_said(
    tiny_set: Path, tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is for cards, for several processes or for another head changes nothing here, which a run says, as it says
    that weights to start from come too late. A run without such settings says nothing."""
    given = {
        "train__cuda_graph": True,
        "train__sync_bn": True,
        "loss__products": "bf16",
        "model__colour": "bgr",
        "data__decode": "gpu",
        "loss__margin_warmup_epochs": 9.0,
    }
    run = train(configure(tiny_set, tmp_path, **given))
    said = capsys.readouterr().out
    for line in (
        "train.cuda_graph not used: it is for CUDA, not cpu\n",
        "data.decode not used: it is for CUDA, not cpu\n",
        "loss.margin_warmup_epochs is 9: the margin is never whole, as train.epochs is 1\n",
        "train.sync_bn not used: there is one process\n",
        "loss.products not used: the head is dense\n",
        "model.colour not used: train.init names no weights\n",
    ):
        assert line in said
    again = {"train__init": str(plain), "model__pretrained": True, "train__resume": str(run), "train__epochs": 2}
    again["train__verify_at_start"] = True
    train(configure(tiny_set, tmp_path, **again))
    said = capsys.readouterr().out
    assert "model.pretrained not used: train.init names other weights\n" in said
    for name in ("train.init", "train.verify_at_start"):
        assert f"{name} not used: {run} goes on from its checkpoint\n" in said
    train(configure(tiny_set, tmp_path, train__name="c", train__init=str(plain), loss__engine="blockwise"))
    train(configure(tiny_set, tmp_path, train__name="d", loss__products="fp32", loss__engine="blockwise"))
    train(configure(tiny_set, tmp_path, train__name="e", loss__name="normface", loss__margin_warmup_epochs=9.0))
    said = capsys.readouterr().out
    assert "not used" not in said
    assert "never whole" not in said, "normface has no margin"


def test_wrong_parts_are_refused(tiny_set: Path, tmp_path: Path) -> None:
    """Before anything is written: a part that there is not, a network without blocks, weights that are not there."""
    for settings, message in (
        ({"train__frozen": ("layer9",)}, r"train\.frozen: the network has no weights in 'layer9'"),
        ({"train__activation_checkpointing": True}, r"train\.activation_checkpointing: DemoNet has no blocks"),
        ({"train__init": "/nowhere"}, r"train\.init: there is no model at /nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            train(configure(tiny_set, tmp_path, **settings))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "message"),
    [(4, "auto", "with 1 of the 1 images"), (12, "2", "with 2 of the 3 images")],
)
def test_passes_of_a_single_image_are_refused(
    tiny_set: Path, tmp_path: Path, batch_size: int, micro_batch: str, message: str
) -> None:
    """Batch norm cannot train on one: a batch of 4, or one of 12 in passes of 2, shared by 4 ranks, leaves one."""
    config = configure(tiny_set, tmp_path, train__batch_size=batch_size, train__micro_batch=micro_batch)
    with pytest.raises(TrainingError, match=f"train.micro_batch: {message} of a process some pass has a single one"):
        step_of(config, create_network("demo", 16, 32), ranks=SimpleNamespace(size=4))


def step_of(
    config: Config,
    network: nn.Module,
    ranks: Any = None,
    say: Callable[[str], object] = print,
    limit: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> TrainingStep:
    head = build_head(config, 6, 10, CPU, torch.float32, Ranks())
    optimizer, scaler = optimizer or torch.optim.SGD(network.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    return build_step(config, network, head, optimizer, scaler, torch.float32, CPU, ranks or Ranks(), say, limit)


@pytest.mark.parametrize(
    ("micro_batch", "limit", "faces", "lines"),
    [
        ("auto", None, 16, 0),
        ("auto", 16, 16, 0),  # what a run keeps that never ran out of memory
        ("auto", 6, 6, 1),
        ("5", None, 5, 0),
        ("5", 2, 5, 0),
        ("100", None, 16, 0),
        ("2", None, 2, 0),
    ],
)
def test_passes_have_what_is_set_or_fitted(
    tiny_set: Path, tmp_path: Path, micro_batch: str, limit: int | None, faces: int, lines: int
) -> None:
    """A number that is set stays, up to the batch; only automatic passes heed what ran out of memory before, which is
    said, and only they may shrink on the way. The gradient is clipped where it was asked for."""
    said: list[str] = []
    config = configure(tiny_set, tmp_path, train__micro_batch=micro_batch, train__gradient_clip=3.5)
    step = step_of(config, create_network("demo", 16, 32), say=said.append, limit=limit)
    assert step.micro_batch == faces
    assert len(said) == lines
    assert (step.shrinking is not None) == (micro_batch == "auto")
    assert step.gradient_clip == 3.5


def test_norms_of_several_processes_are_joined_on_cards_alone(tiny_set: Path, tmp_path: Path) -> None:
    """Where torch cannot, train.sync_bn is refused, instead of a run that does without it."""
    config = configure(tiny_set, tmp_path, train__sync_bn=True)
    with pytest.raises(TrainingError, match=r"train\.sync_bn: torch has it for CUDA only"):
        step_of(config, create_network("demo", 16, 32), ranks=SimpleNamespace(size=2))


@pytest.mark.parametrize(("stepped", "states"), [(False, 2), (True, 0)])
def test_every_size_of_pass_is_tried_before_it_trains(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stepped: bool, states: int
) -> None:
    """A compiler sees all shapes of a step, in the mode of training, frozen parts aside, and beside the memory that the
    first step takes for the optimizer, where it has not been made yet, and what a step keeps beside a pass."""
    tried: list[tuple[int, int, int]] = []
    network = create_network("demo", 16, 32).eval()
    optimizer = torch.optim.AdamW(network.parameters())
    if stepped:
        network(torch.zeros(2, 3, 32, 32)).sum().backward()
        optimizer.step()

    def trial(module: nn.Module, faces: int, image_size: int, precision: torch.dtype, states: int, beside: int) -> None:
        assert [part.training for part in module.get_submodule("body")][:2] == [False, True]
        tried.append((faces, states, beside))

    def compile_it(module: nn.Module, ranks: Ranks, device: torch.device, attempt: Any, say: Any) -> nn.Module:
        attempt(module)
        return module

    monkeypatch.setattr(step_building, "trial_pass", trial)
    monkeypatch.setattr(step_building, "bytes_beside", lambda faces, *_: 100 * faces)
    monkeypatch.setattr(step_building, "compile_network", compile_it)
    config = configure(tiny_set, tmp_path, train__compile="on", train__micro_batch="3", train__frozen=("body.0",))
    step_of(config, network, optimizer=optimizer)
    assert tried == [(3, states, 300), (2, states, 200)]


@pytest.mark.parametrize(("compiled", "kind"), [("off", QuickPReLU), ("on", nn.PReLU)])
def test_prelus_are_quick_where_a_cpu_trains(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: str, kind: type
) -> None:
    """Uncompiled, that is: a compiler has kernels of its own."""
    monkeypatch.setattr(step_building, "compile_network", lambda network, *_: network)
    network = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.PReLU(4), nn.Flatten(), nn.Linear(64, 16))
    step_of(configure(tiny_set, tmp_path, train__compile=compiled), network)
    assert type(network[1]) is kind


def test_sync_bn_alone_is_batch_norm(tiny_set: Path, tmp_path: Path, plain: Path) -> None:
    """On one process there is nothing to synchronise: the same run to the bit, saved under the same names."""
    run = train(configure(tiny_set, tmp_path, train__sync_bn=True))
    expected, found = load_file(plain / BEST), load_file(run / BEST)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_activation_checkpointing_changes_no_run(tiny_set: Path, tmp_path: Path) -> None:
    """MobileFaceNet trained with and without: the same to the bit, average included."""
    runs = [
        train(configure(tiny_set, tmp_path, train__name=str(on), model__network="mbf", train__ema=0.9,
                        train__activation_checkpointing=on))
        for on in (False, True)
    ]  # fmt: skip
    expected, found = (load_file(run / BEST) for run in runs)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert losses(runs[0]) == losses(runs[1])
