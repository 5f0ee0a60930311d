"""Operations of a network, against a count by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_runs
import train
from models.backbones.vit import VisionTransformer
from utils.training.flops import forward_flops, matmul_flops_per_s
from utils.training.metrics import read_metrics


def test_operations_are_those_of_a_count_by_hand() -> None:
    """Two for each multiply-add: grouped and strided convolutions and linear layers; norms do not count."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(), nn.Linear(8 * 6 * 6, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    by_hand = 8 * 8 * 8 * (3 * 9) + 6 * 6 * 8 * (2 * 9) + 8 * 6 * 6 * 5
    assert forward_flops(network, 16) == 2 * by_hand


def test_what_training_leaves_out_does_not_count() -> None:
    """A vision transformer trains on a part of the patches; MFU by all of them would say that it is faster than it is.
    Which ones is drawn, which no other drawing may depend on."""
    width, depth, tokens, kept = 32, 2, 16, 12
    network = VisionTransformer(width, depth, 8, 36, mask_ratio=0.25).train()
    state = torch.get_rng_state()
    counted = forward_flops(network, 36, training=True)
    assert torch.equal(torch.get_rng_state(), state)
    # A token has products of 12 width^2 in a block, and two with every token, of its width, in the attention.
    left_out = depth * (12 * width**2 * (tokens - kept) + 2 * width * (tokens**2 - kept**2))
    assert forward_flops(network, 36) - counted == 2 * left_out
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_network_as_it_was(training: bool) -> None:
    """Its mode, its statistics, its gradients."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(training)
    network[0].eval()
    for counted in (False, True):
        forward_flops(network, 8, counted)
    assert [module.training for module in network.modules()] == [training, False, training]
    assert int(network[1].num_batches_tracked) == 0
    assert all(weight.grad is None for weight in network.parameters())


def test_the_rate_of_products_is_their_operations_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 n^3 operations a product, the best of three rounds; the clock is made up."""
    seconds = iter([0.0, 4.0, 10.0, 12.0, 20.0, 28.0])
    monkeypatch.setattr("utils.training.flops.time.perf_counter", lambda: next(seconds))
    assert matmul_flops_per_s(torch.device("cpu"), torch.float32, size=16, repeats=3) == 3 * 2 * 16**3 / 2


def test_a_run_logs_the_operations_of_training(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a face that is trained on, three times: backward takes twice as many as forward."""
    monkeypatch.setattr(train, "forward_flops", lambda network, size, training=False: 7e9 if training else 9e9)
    run = train.train(tiny_runs.configure(tiny_set, tmp_path, train__epochs=1))
    lines = [line for line in read_metrics(run) if "train/loss" in line]
    assert lines
    for line in lines:
        assert line["train/tflops_per_s"] == pytest.approx(line["train/images_per_s"] * 3 * 7e9 / 1e12)
