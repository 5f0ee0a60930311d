"""Muon: that its steps are orthogonal and as long as published, that the rest is AdamW, that it resumes and learns."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from utils.training.muon import Muon, orthogonalise


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def gradient(like: Tensor, seed: int) -> Tensor:
    """Random numbers in the parameter's memory format."""
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(like).copy_(values)


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to `matrix`, by singular values, in float64."""
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


# --- the orthogonal step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (4, 24, 24), (1, 5, 1), (1, 1, 5)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_singular_values_become_about_one(shape: tuple[int, int, int], size: float) -> None:
    """Wide, tall, square and single-row matrices of any size keep their singular vectors; each is done by itself."""
    matrices = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices[-1, 0] *= 10
    result = orthogonalise(matrices)
    assert result.shape == shape
    for matrix, found in zip(matrices, result, strict=True):
        values = torch.linalg.svdvals(found)
        # A square random matrix has a few values near 0, which five iterations cannot lift.
        values = values[torch.linalg.svdvals(matrix) > 0.01 * matrix.norm()]
        assert len(values) >= min(shape[1:]) - 3
        assert values.min() > 0.65
        assert values.max() < 1.25
        product = polar(matrix).T @ found.double()
        torch.testing.assert_close(product, product.T, rtol=0, atol=1e-3, msg="other singular vectors")


def test_the_iterations_are_the_published_ones() -> None:
    """Each singular value, of the matrix over its norm, goes five times through the published quintic: one more or less
    gives steps of about the same length, in other directions."""
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values /= values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = orthogonalise(matrix[None], torch.float64)[0]
    torch.testing.assert_close(found, u @ values.diag() @ v, rtol=0, atol=1e-4)


def test_a_tall_matrix_takes_no_more_work_than_a_wide_one() -> None:
    """Products are of its shorter side, which for a kernel of 512 x 4608 is a ninth of the work."""
    work = []
    for shape in ((1, 64, 4), (1, 4, 64)):
        with FlopCounterMode(display=False) as counter:
            orthogonalise(torch.ones(shape))
        work.append(counter.get_total_flops())
    assert work[0] == work[1] > 0


def test_bfloat16_is_enough() -> None:
    """What CUDA cards compute in gives about the same matrix, as published."""
    matrices = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalise(matrices), orthogonalise(matrices, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_zeros_stay_zeros() -> None:
    """A weight that gets no gradient is not moved by noise or NaN."""
    assert (orthogonalise(torch.zeros(2, 3, 4)) == 0).all()


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((24, 40), torch.contiguous_format),
        ((40, 24), torch.contiguous_format),
        ((16, 8, 3, 3), torch.contiguous_format),
        ((16, 8, 3, 3), torch.channels_last),
        ((64, 4, 1, 1), torch.channels_last),
    ],
)
def test_a_step_is_orthogonal_and_as_long_as_those_of_adamw(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """From the first step on, lr x 0.2 sqrt(max(a, b)) times an orthogonal [out, in x height x width] of the Nesterov
    momentum, so that its elements are 0.2 lr on average, after a decay of lr x weight_decay."""
    weight = nn.Parameter(parameter(*shape).detach().contiguous(memory_format=memory_format))
    optimizer = Muon([weight], lr=0.03, momentum=0.8, weight_decay=0.5)
    momentum = torch.zeros(shape)
    for step in range(3):
        weight.grad = gradient(weight, 10 + step)
        momentum = 0.8 * momentum + 0.2 * weight.grad
        ahead = (0.8 * momentum + 0.2 * weight.grad).flatten(1)
        before = weight.detach().clone()
        optimizer.step()
        moved = (before * (1 - 0.03 * 0.5) - weight.detach()).flatten(1)
        unit = moved / (0.03 * 0.2 * math.sqrt(max(ahead.shape)))
        values = torch.linalg.svdvals(unit)
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert (unit.double() - polar(ahead)).norm() < 0.3 * polar(ahead).norm()
        assert moved.square().mean().sqrt() == pytest.approx(0.03 * 0.2, rel=0.2)
        assert weight.is_contiguous(memory_format=memory_format)


def test_weights_of_one_shape_do_not_mix() -> None:
    """Done together or apart, each weight makes the same steps."""
    together = [parameter(8, 6, 3, 3, seed=i) for i in range(3)] + [parameter(8, 54, seed=3), parameter(7, 5, seed=4)]
    apart = copy.deepcopy(together)
    optimizers = [Muon(together, lr=0.1), *(Muon([weight], lr=0.1) for weight in apart)]
    for step in range(2):
        for i, (one, other) in enumerate(zip(together, apart, strict=True)):
            one.grad, other.grad = gradient(one, 10 * step + i), gradient(other, 10 * step + i)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_other_parameters_make_the_steps_of_adamw() -> None:
    """Norms, slopes and biases, and whatever else is in a group without matrices, against `torch.optim.AdamW`."""
    own, expected = ([parameter(9), parameter(4, 1, 3, 3, seed=1)] for _ in range(2))
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 0.1, "weight_decay": 0.3}
    optimizers = (
        Muon([{"params": own, "matrices": False}], **options),
        torch.optim.AdamW(expected, **options),
    )
    for step in range(5):
        for i, pair in enumerate(zip(own, expected, strict=True)):
            for weight in pair:
                weight.grad = gradient(weight, 10 * step + i)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_parameters_without_a_gradient_rest() -> None:
    """No step, no decay and no state for them."""
    weights = [parameter(4, 3), parameter(4, 3, seed=1), parameter(5, seed=2), parameter(5, seed=3)]
    before = [weight.detach().clone() for weight in weights]
    optimizer = Muon([{"params": weights[:2]}, {"params": weights[2:], "matrices": False}], lr=0.1)
    weights[1].grad, weights[3].grad = gradient(weights[1], 0), gradient(weights[3], 1)
    optimizer.step()
    assert [torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)] == [True, False, True, False]
    assert set(optimizer.state) == {weights[1], weights[3]}


def test_what_is_not_set_is_as_published() -> None:
    """Nothing but the learning rate and the decay is a setting of training: momentum 0.95, betas of AdamW 0.9, 0.95."""
    assert Muon([parameter(4, 3)]).defaults == {
        "lr": 1e-3, "momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "matrices": True
    }  # fmt: skip


def test_a_vector_is_no_matrix() -> None:
    """A bias among matrices is an error with its shape, at once."""
    with pytest.raises(ValueError, match=r"a parameter of shape \(5,\) is no matrix"):
        Muon([parameter(4, 3), parameter(5)])


@pytest.mark.parametrize("unscaled", [True, False])
def test_a_gradient_scaler_leaves_out_steps_that_overflow(unscaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With float16: such a step changes no weight, momentum or count, be it the first; the others are those of a run
    without scaling that never saw it. Nothing reads a number from the device."""
    mine, plain = ([parameter(6, 5), parameter(4, 2, 3, 3, seed=1), parameter(7, seed=2)] for _ in range(2))
    optimizers = [
        Muon([{"params": weights[:2]}, {"params": weights[2:], "matrices": False}], lr=0.02)
        for weights in (mine, plain)
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    overflows = {0: (0, float("inf")), 2: (1, float("nan")), 3: (2, float("-inf"))}  # by step: in which weight
    for step in range(6):
        scale = scaler.get_scale() if step else 2.0**10
        for i, (one, other) in enumerate(zip(mine, plain, strict=True)):
            other.grad = gradient(other, 10 * step + i)
            one.grad = scale * other.grad
        if step in overflows:
            weight, bad = overflows[step]
            mine[weight].grad.view(-1)[1] = bad  # type: ignore[union-attr]
        scaler.scale(torch.zeros(()))  # makes the scale
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "item", lambda _: pytest.fail("the host waits for the device"))
            patch.setattr(Tensor, "__bool__", lambda _: pytest.fail("the host waits for the device"))
            if unscaled:
                scaler.unscale_(optimizers[0])
            scaler.step(optimizers[0])
        scaler.update()
        if step not in overflows:
            optimizers[1].step()
        for one, other in zip(mine, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=f"step {step}")
    assert scaler.get_scale() == 2.0 ** (10 - len(overflows))
    assert [
        int(optimizer.state[weights[2]]["step"]) for optimizer, weights in zip(optimizers, (mine, plain), strict=True)
    ] == [3, 3]


# --- in use -----------------------------------------------------------------------------------------------------------


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten(), nn.Linear(8 * 16, 3)
    )


def small_optimizer(network: nn.Module) -> Muon:
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "lr_factor": 1.0},
        {"params": [p for p in parameters if p.ndim == 1], "matrices": False, "lr_factor": 0.5},
    ]
    return Muon(groups, lr=0.02, weight_decay=0.01)


def learn(network: nn.Module, optimizer: Muon, steps: range) -> list[float]:
    """Tell apart three 4x4 patterns in noise; the loss of every step."""
    patterns = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(3, (32,), generator=generator)
        inputs = patterns[labels] + torch.randn(32, 1, 4, 4, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_learns() -> None:
    """A small network with every kind of parameter tells patterns apart within 40 steps."""
    network = small_network()
    losses = learn(network, small_optimizer(network), range(40))
    assert sum(losses[:3]) / 3 > 0.8
    assert sum(losses[-5:]) / 5 < 0.2


def test_a_restored_state_goes_on_to_the_bit() -> None:
    """All of the state is tensors, as checkpoints need them, and nothing else matters for the next step."""
    network = small_network()
    optimizer = small_optimizer(network)
    learn(network, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(network.state_dict())
    assert {type(value) for values in state["state"].values() for value in values.values()} == {Tensor}
    restored = small_network()
    restored.load_state_dict(weights)
    again = small_optimizer(restored)
    again.load_state_dict(state)
    learn(network, optimizer, range(4, 8))
    learn(restored, again, range(4, 8))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name
        assert name.endswith("num_batches_tracked") or not torch.equal(tensor, weights[name]), name


def test_nothing_waits_for_the_device() -> None:
    """No value of a matrix is read in a step: matrices that have none are stepped without complaint."""
    weight = nn.Parameter(torch.empty(8, 4, 3, 3, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = Muon([weight])
    optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].is_meta


def test_a_closure_is_called_with_gradients_on() -> None:
    """As with every optimizer of torch."""
    weight = parameter(4, 3)
    optimizer = Muon([weight], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    assert first is not None
    assert optimizer.step(closure) < first
