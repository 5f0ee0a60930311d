"""Learning rates: each schedule against its formula, their edges, and the rule for the peak."""

import math
from typing import Any, get_args

import numpy as np
import pytest

from config import PRESETS, Config, TrainConfig
from utils.settings import build
from utils.training.schedules import OptimizerName, ScheduleName, learning_rates, peak_lr

SCHEDULES = get_args(ScheduleName)
#: Settings with which every schedule does something.
OPTIONS: dict[str, Any] = {"milestones": (2, 4), "decay_epochs": 1.0, "power": 2.0, "final": 0.1}


# --- the fall ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup", "peak"), [(1000, 0, 0.1), (997, 13, 0.02), (7, 7, 0.3), (1, 0, 0.1)])
def test_the_default_is_the_published_recipe_to_the_bit(steps: int, warmup: int, peak: float) -> None:
    """Runs that were started before there was a choice of schedules go on at the very same rates."""
    step = np.arange(steps)
    climb, fall = (step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup)
    expected = peak * np.where(step < warmup, climb, fall)
    np.testing.assert_array_equal(learning_rates("poly", steps, 1, peak, warmup_epochs=warmup), expected)


def test_without_warmup_it_is_the_published_recipe() -> None:
    """insightface's recipe: peak x (1 - i / steps)."""
    rates = learning_rates("poly", 1000, 50, 0.1)
    np.testing.assert_allclose(rates, 0.1 * (1 - np.arange(1000) / 1000), rtol=1e-12)


def plain_rate(schedule: str, step: int) -> float:
    """The rate at `step` of 6 epochs of 10 steps, 1 of warm-up, with peak 0.5 and `OPTIONS`, by itself."""
    if step < 10:
        return 0.5 * (step + 1) / 10
    done = (step - 10) / 50
    if schedule == "poly":
        share = 0.1 + 0.9 * (1 - done) ** 2
    elif schedule == "cosine":
        share = 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * done))
    elif schedule == "step":
        share = 1.0 if step < 20 else 0.1 if step < 40 else 0.01
    elif schedule == "wsd":
        share = 1.0 if step < 50 else 0.1 + 0.9 * ((60 - step) / 10) ** 2
    else:
        share = 1.0
    return 0.5 * share


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_its_formula(schedule: ScheduleName) -> None:
    """float64 rates, step by step, with warm-up, a power, milestones and a final share."""
    rates = learning_rates(schedule, 60, 10, 0.5, warmup_epochs=1.0, **OPTIONS)
    assert rates.dtype == np.float64
    np.testing.assert_allclose(rates, [plain_rate(schedule, step) for step in range(60)], rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (10, 10), (10, 0), (1, 0), (1, 1)])
def test_warmup_climbs_to_the_peak_whatever_follows(schedule: ScheduleName, steps: int, warmup: int) -> None:
    """The peak is reached right after the warm-up, even one as long as the run; rates are positive and never above."""
    rates = learning_rates(schedule, steps, 1, 0.5, warmup_epochs=warmup, milestones=(5,))
    assert rates.shape == (steps,)
    assert rates.max() == rates[max(0, warmup - 1)] == 0.5
    assert (rates > 0).all()
    assert (np.diff(rates[:warmup]) > 0).all()
    assert (np.diff(rates[max(0, warmup - 1) :]) <= 0).all()
    if schedule in ("poly", "cosine"):
        assert (np.diff(rates[warmup:]) < 0).all()


def test_warmup_of_part_of_an_epoch() -> None:
    """Epochs are turned into steps, to the nearest."""
    rates = learning_rates("constant", 40, 10, 1.0, warmup_epochs=0.26)
    np.testing.assert_allclose(rates[:4], [1 / 3, 2 / 3, 1, 1])


def test_milestones_outside_the_run() -> None:
    """One within the warm-up counts from its end on, one beyond the end never; their order does not matter."""
    rates = learning_rates("step", 40, 10, 1.0, warmup_epochs=2.0, milestones=(1, 3, 4, 9), milestone_factor=0.5)
    np.testing.assert_allclose(rates[:20], (np.arange(20) + 1) / 20)
    np.testing.assert_allclose(rates[20:], [0.5] * 10 + [0.25] * 10)
    np.testing.assert_array_equal(
        rates, learning_rates("step", 40, 10, 1.0, warmup_epochs=2.0, milestones=(3, 1), milestone_factor=0.5)
    )


def test_wsd_falls_over_the_last_fifth_unless_told() -> None:
    """0 epochs of decay mean a fifth of the run, cut short by the warm-up where that leaves less."""
    rates = learning_rates("wsd", 100, 10, 1.0)
    assert (rates[:81] == 1).all()
    np.testing.assert_allclose(rates[80:], np.arange(20, 0, -1) / 20)
    assert (learning_rates("wsd", 20, 2, 1.0, decay_epochs=0.2) == 1).all()  # one step, and not a fifth of the run
    short = learning_rates("wsd", 100, 10, 1.0, warmup_epochs=9.0)
    np.testing.assert_allclose(short[89:], [1, *np.arange(10, 0, -1) / 10])


def test_unknown_schedule() -> None:
    """A misspelt name is an error with the setting, not a constant rate."""
    with pytest.raises(ValueError, match=r"train\.schedule: there is no schedule 'linear'"):
        learning_rates("linear", 10, 1, 0.1)  # type: ignore[arg-type]


def test_unknown_optimizer() -> None:
    """A misspelt name does not get another optimizer's rate."""
    with pytest.raises(ValueError, match=r"train\.optimizer: must be one of sgd, adamw, muon, got 'sdg'"):
        peak_lr(0, "sdg", 128)  # type: ignore[arg-type]


# --- the peak ---------------------------------------------------------------------------------------------------------


def test_the_rule_goes_through_the_published_points() -> None:
    """SGD: 0.1 for 1024 images, 0.02 for 128; AdamW: 0.001 for 1024. In between they rise steadily."""
    assert peak_lr(0, "sgd", 1024) == pytest.approx(0.1, rel=1e-12)
    assert peak_lr(0, "sgd", 128) == pytest.approx(0.02, rel=1e-12)
    assert peak_lr(0, "sgd", 32) == pytest.approx(0.1 * math.exp(-math.log(32) * math.log(5) / math.log(8)))
    assert peak_lr(0, "adamw", 1024) == pytest.approx(1e-3, rel=1e-12)
    assert peak_lr(0, "adamw", 256) == pytest.approx(5e-4, rel=1e-12)
    assert peak_lr(0, "muon", 256) == pytest.approx(5e-4, rel=1e-12)


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_a_given_rate_is_taken_as_it_is(optimizer: OptimizerName) -> None:
    """The rule is for those who give none."""
    assert peak_lr(0.05, optimizer, 999) == 0.05
    rates = [peak_lr(0, optimizer, batch) for batch in (2, 16, 128, 1024, 8192)]
    assert rates == sorted(set(rates))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("demo", "small")])
def test_presets_keep_the_published_rate_at_their_own_batch_size(preset: str) -> None:
    """Each published recipe starts from 0.1; with 128 images those of arcface_torch start from its 0.02."""

    def peak(train: TrainConfig) -> float:
        return peak_lr(train.lr, train.optimizer, train.batch_size)

    assert peak(build(Config, PRESETS[preset]).train) == pytest.approx(0.1, rel=1e-12)
    if preset != "casia_r50":  # the ArcFace paper's, which has a rate of its own
        smaller = build(Config, {**PRESETS[preset], "train.batch_size": 128}).train
        assert peak(smaller) == pytest.approx(0.02, rel=1e-12)


def test_the_default_rate_is_the_published_one_for_a_card() -> None:
    """128 images at 0.02; the demo has its own, for few steps."""
    default, demo = TrainConfig(), build(Config, PRESETS["demo"]).train
    assert peak_lr(default.lr, default.optimizer, default.batch_size) == pytest.approx(0.02, rel=1e-12)
    assert peak_lr(demo.lr, demo.optimizer, demo.batch_size) == 0.1
