"""Steps that explode or run out of memory: what a run does about them, and what it says."""

import itertools
import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny_runs
from config import Config
from data.joined_sets import open_training_set
from models.backbones.demonet import DemoNet
from models.heads.blockwise import BlockwiseHead
from train import CHECKPOINTS, ExplodedError, Trainer, TrainingError, main, train
from utils.checkpoints import BEST
from utils.settings import as_flags, flatten
from utils.training import build_parts, explosions
from utils.training import log as training_log
from utils.training.checkpoint_store import CheckpointStore
from utils.training.log import Noted
from utils.training.metrics import read_metrics
from utils.training.micro_batch import kept_limit
from utils.training.run_notes import require_run_notes
from utils.training.saved_checkpoints import Saved, checkpoint_folders
from utils.training.step import StepOutput, TrainingStep


def configure(tiny_set: Path, runs: Path, **settings: object) -> Config:
    """12 steps with a moving average, and a checkpoint after every four."""
    base = {"train__ema": 0.9, "train__checkpoint_every": 4, "train__checkpoints_kept": 9}
    return tiny_runs.configure(tiny_set, runs, **{**base, **settings})


def explode(
    monkeypatch: pytest.MonkeyPatch, steps: Collection[int], loss: float = math.nan, norm: float | None = None
) -> list[int]:
    """Make `steps` wreck the network and say so by their loss or norm; returns the steps that are made, as they are."""
    whole, made = TrainingStep.__call__, list[int]()

    def step_or_explode(self: TrainingStep, inputs: Tensor, labels: Tensor, step: int, lr: float) -> StepOutput:
        output = whole(self, inputs, labels, step, lr)
        made.append(step)
        if step not in steps:
            return output
        with torch.no_grad():
            for weight in [*self.network.parameters(), self.head.weight]:
                weight.fill_(math.nan)
        if norm is not None:
            return output._replace(gradient_norm=torch.tensor(norm))
        return output._replace(loss=torch.tensor(loss))

    monkeypatch.setattr(TrainingStep, "__call__", step_or_explode)
    return made


def newest(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint."""
    files = checkpoint_folders(run / CHECKPOINTS)[-1].glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def skipped(run: Path) -> list[int]:
    return Saved(checkpoint_folders(run / CHECKPOINTS)[-1]).notes["skipped"]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def noted(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read_metrics(run) if "train/loss" in line]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, None), (1001.0, None), (math.inf, None), (1.0, math.nan)])
def test_an_explosion_stops_the_run(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float, norm: float | None
) -> None:
    """A loss that is no number or too large, or a gradient that is no number: the error names step, learning rate and
    norm, the step's images are listed, and no checkpoint has anything of it."""
    explode(monkeypatch, {7}, loss, norm)
    with pytest.raises(
        ExplodedError, match=r"at step 7 \(learning rate 0\.0208, gradient norm .*--on-explosion skip"
    ) as caught:
        train(configure(tiny_set, tmp_path))
    assert caught.value.step == 7
    if norm is None:
        assert f"the loss became {loss} " in str(caught.value)
    else:
        assert "gradient norm nan" in str(caught.value)
    assert ("the limit being 1000 (train.loss_limit)" in str(caught.value)) == (loss == 1001.0)
    run = tmp_path / "a"
    assert str(run / "exploded-step-7.txt") in str(caught.value)
    faces = open_training_set([tiny_set], 1)
    its = np.random.default_rng([0, 1]).permutation(48)[8:16]
    listed = (run / "exploded-step-7.txt").read_text().splitlines()
    assert listed == [faces.describe(int(i)) for i in its]
    assert (run / "loss.png").exists()
    assert Saved(checkpoint_folders(run / CHECKPOINTS)[-1]).step == 4
    assert all(value.isfinite().all() for value in newest(run).values())


@pytest.mark.parametrize("workers", [0, 1])
def test_what_exploded_is_left_out(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    """The run goes back to its checkpoint and on without the step and the one before it, to the same weights as if the
    two had never been there; the record has nothing of what was given up."""
    with monkeypatch.context() as patch:
        initialise = Trainer.__init__

        def without(self: Trainer, *arguments: object) -> None:
            initialise(self, *arguments)  # type: ignore[arg-type]
            self.explosions.skipped |= {6, 7}

        patch.setattr(Trainer, "__init__", without)
        reference = train(configure(tiny_set, tmp_path, train__name="without"))
    made = explode(monkeypatch, {7})
    run = train(configure(tiny_set, tmp_path, train__on_explosion="skip", common__workers=workers))
    assert made == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 8, 9, 10, 11]
    assert skipped(run) == [6, 7]
    assert same(newest(reference), newest(run))
    assert same(load_file(reference / BEST), load_file(run / BEST))
    assert noted(run) == noted(reference)
    assert "back at step 4, and on without steps 6 and 7" in capsys.readouterr().out


def wreck_after(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Let the update of `step` wreck the network, whose own loss and gradient were good; returns the steps made."""
    whole, made = TrainingStep.__call__, list[int]()

    def then_wreck(self: TrainingStep, inputs: Tensor, labels: Tensor, number: int, lr: float) -> StepOutput:
        output = whole(self, inputs, labels, number, lr)
        made.append(number)
        if number == step:
            with torch.no_grad():
                for weight in self.network.parameters():
                    weight.fill_(math.nan)
        return output

    monkeypatch.setattr(TrainingStep, "__call__", then_wreck)
    return made


def test_a_checkpoint_between_the_cause_and_the_explosion_is_passed_over(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the weights that the step before broke: the run goes back to the one before it, and none has them in the
    end, the last and the best neither."""
    made = wreck_after(monkeypatch, 3)
    settings = {"train__on_explosion": "skip", "train__checkpoint_every": 2, "train__checkpoints_kept": 2}
    run = train(configure(tiny_set, tmp_path, train__log_every=1, data__verification=("none",), **settings))
    assert made == [0, 1, 2, 3, 4, 2, 5, 6, 7, 8, 9, 10, 11]
    printed = capsys.readouterr().out
    assert "step-000000004 may hold what went wrong: it is set aside as exploded-step-000000004-" in printed
    assert "back at step 2, and on without steps 3 and 4" in printed
    assert all(value.isfinite().all() for value in (*newest(run).values(), *load_file(run / BEST).values()))
    assert [path.name for path in checkpoint_folders(run / CHECKPOINTS)] == ["step-000000010", "step-000000012"]


def test_a_stopped_run_goes_on_from_before_the_cause(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by an explosion, a run can go on with a lower rate: from weights that are not broken."""
    with monkeypatch.context() as patch:
        wreck_after(patch, 3)
        with pytest.raises(ExplodedError, match="at step 4 "):
            train(configure(tiny_set, tmp_path, train__checkpoint_every=2, train__log_every=1))
    run = train(configure(tiny_set, tmp_path, train__resume="auto", train__name="a", train__lr=0.01))
    assert noted(run)[-1][0] == 12
    assert all(value.isfinite().all() for value in newest(run).values())


def test_without_an_earlier_checkpoint_it_says_what_stays(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step itself may be at fault, so the only checkpoint is tried; weights that are no numbers are never kept as
    the best, whatever the last steps looked like."""
    wreck_after(monkeypatch, 3)
    settings = {"train__on_explosion": "skip", "train__checkpoint_every": 4, "train__checkpoints_kept": 1}
    with pytest.raises(TrainingError, match=r"step 6: weights of the network are no numbers any more: lower train\.lr"):
        train(configure(tiny_set, tmp_path, train__log_every=1, data__verification=("none",), **settings))
    assert "back at step 4, and on without step 4; there is no checkpoint without step 3" in capsys.readouterr().out
    assert not (tmp_path / "a" / BEST).exists()


def test_a_resumed_run_leaves_it_out_too(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed right after it went back: what was left out is known to the run that goes on, which ends alike."""
    with monkeypatch.context() as patch:
        explode(patch, {7})
        whole = train(configure(tiny_set, tmp_path, train__name="whole", train__on_explosion="skip"))
        save = Trainer.save

        def save_then_die(self: Trainer, wait: bool) -> None:
            save(self, wait)
            if self.explosions.skipped:
                raise KeyboardInterrupt

        patch.setattr(Trainer, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(configure(tiny_set, tmp_path, train__on_explosion="skip"))
    run = tmp_path / "a"
    assert skipped(run) == [6, 7]
    assert checkpoint_folders(run / CHECKPOINTS)[-1].name == "step-000000004-2", "before the next step"
    train(configure(tiny_set, tmp_path, train__on_explosion="skip", train__resume=str(run)))
    assert same(newest(whole), newest(run))
    assert same(load_file(whole / BEST), load_file(run / BEST))
    assert noted(whole) == noted(run)


def test_before_the_first_step_there_is_none_to_leave_out(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step explodes in a run that was saved before it, as its first verification failed: that step alone is
    left out, and what is saved then is a checkpoint to go on from."""

    def fail(self: Trainer) -> None:
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "verify", fail)
        with pytest.raises(RuntimeError, match="say"):
            train(configure(tiny_set, tmp_path, train__verify_at_start=True))
    made = explode(monkeypatch, {0})
    run = train(configure(tiny_set, tmp_path, train__on_explosion="skip", train__resume=str(tmp_path / "a")))
    assert made == [0, 1, *range(1, 12)]
    printed = capsys.readouterr().out
    assert "which has no checkpoint yet" not in printed
    assert "back at step 0, and on without step 0\n" in printed
    assert skipped(run) == [0]
    require_run_notes(Saved(checkpoint_folders(run / CHECKPOINTS)[-1]))


def test_a_verification_is_made_again_on_the_way_back(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back at a checkpoint from before its verification: what was noted of that goes, and it is noted again, once."""
    explode(monkeypatch, {7})
    run = train(configure(tiny_set, tmp_path, train__on_explosion="skip", train__checkpoint_every=0))
    assert skipped(run) == [6, 7]
    assert [line["step"] for line in read_metrics(run) if "verify/tiny" in line] == [6, 12]


def test_the_way_back_is_no_time_of_training(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images a second and the rest of a line are of its steps: an hour of reading a checkpoint is not in it."""
    explode(monkeypatch, {7})
    hours, newest_of = [0.0], CheckpointStore.newest
    clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: time.perf_counter() + 3600 * hours[0])
    monkeypatch.setattr(training_log, "time", clock)

    def an_hour_later(store: CheckpointStore, require: Callable[[Saved], object]) -> Saved | None:
        hours[0] += 1
        return newest_of(store, require)

    monkeypatch.setattr(CheckpointStore, "newest", an_hour_later)
    run = train(configure(tiny_set, tmp_path, train__on_explosion="skip"))
    assert hours == [2]
    assert all(line["train/seconds"] < 3600 for line in read_metrics(run) if "train/loss" in line)


def test_endless_explosions_end_the_run(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When whatever follows explodes, the batches are not at fault: the run stops and says so, instead of leaving out
    one after the other and saving checkpoints on the way."""
    made = explode(monkeypatch, range(4, 1000))
    with pytest.raises(
        TrainingError, match=rf"\. {explosions.MOST_SKIPPED + 1} of the last 1,000 steps exploded or led to it"
    ):
        train(configure(tiny_set, tmp_path, train__on_explosion="skip", train__epochs=9, train__log_every=1))
    assert len(made) < 60
    assert all(value.isfinite().all() for value in newest(tmp_path / "a").values())


def test_explosions_far_apart_do_not(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those among so many steps count."""
    monkeypatch.setattr(explosions, "MOST_SKIPPED", 2)
    monkeypatch.setattr(explosions, "SKIPPED_AMONG", 4)
    explode(monkeypatch, {5, 9})
    assert skipped(train(configure(tiny_set, tmp_path, train__on_explosion="skip"))) == [4, 5, 8, 9]


@pytest.mark.parametrize(("overflows", "explodes"), [({2, 3, 5, 6}, False), ({2, 4, 5, 6}, True)])
def test_some_overflows_in_a_row_are_no_explosion(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflows: set[int], explodes: bool
) -> None:
    """Where a gradient scaler looks for its scale in float16 it skips steps whose gradients are infinite: so many in a
    row may be, and a step that is good sets the count back. Nor does a line of the log need a loss that is a number."""
    whole = TrainingStep.__call__

    def overflow(self: TrainingStep, inputs: Tensor, labels: Tensor, step: int, lr: float) -> StepOutput:
        output = whole(self, inputs, labels, step, lr)
        if step in overflows:
            output = output._replace(loss=torch.tensor(math.nan), gradient_norm=torch.tensor(math.inf))
        return output

    monkeypatch.setattr(TrainingStep, "__call__", overflow)
    monkeypatch.setattr(explosions, "MOST_OVERFLOWS", 2)
    monkeypatch.setattr(torch.amp.GradScaler, "is_enabled", lambda _: True)
    if explodes:
        with pytest.raises(ExplodedError, match="at step 6"):
            train(configure(tiny_set, tmp_path))
    else:
        train(configure(tiny_set, tmp_path))


def test_a_high_loss_is_no_overflow() -> None:
    """In float16, too, a loss above its limit whose gradients are finite has moved the weights: it explodes at once."""
    watch = explosions.ExplosionWatch(1000.0, overflows=True)
    assert watch.exploded(Noted({}, [3, 4], [math.nan, math.nan], [math.inf, math.nan], {})) is None
    assert watch.exploded(Noted({}, [5, 6], [1000.0, 1001.0], [1.0, 1.0], {})) == (6, 1001.0, 1.0)


def test_overflows_of_before_an_explosion_do_not_count_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is back where they were not: the first overflow there is one, and not one too many."""
    monkeypatch.setattr(explosions, "MOST_OVERFLOWS", 2)
    watch = explosions.ExplosionWatch(1000.0, overflows=True)
    assert watch.exploded(Noted({}, [1, 2, 3], [1.0] * 3, [math.inf] * 3, {})) == (3, 1.0, math.inf)
    watch.leave_out(ExplodedError(3, 1.0, math.inf, 1000.0, 0.1, Path("a/listed"), advise_skipping=False))
    assert watch.exploded(Noted({}, [1], [1.0], [math.inf], {})) is None


def test_without_a_checkpoint_there_is_no_way_back(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An explosion before the first checkpoint stops the run, with the setting that would have helped."""
    explode(monkeypatch, {1})
    with pytest.raises(
        TrainingError, match=r"at step 1 .*no whole checkpoint to go back to: save more often, --checkpoint-every 1 say"
    ):
        train(configure(tiny_set, tmp_path, train__on_explosion="skip"))


def exhaust(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the network run out of memory in training passes of more than `most` faces; returns those that fit."""
    forward: Callable[[DemoNet, Tensor], Tensor] = DemoNet.forward
    fitted: list[int] = []

    def limited(self: DemoNet, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():  # not where operations are counted
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And much more")
            fitted.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(DemoNet, "forward", limited)
    return fitted


def test_a_step_out_of_memory_goes_on_in_parts(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """train.micro_batch=auto: the parts are halved until they fit, said once for each time, and nothing is lost."""
    fitted = exhaust(monkeypatch, 3)
    train(configure(tiny_set, tmp_path))
    assert fitted == [2] * 4 * 12
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory")]
    assert said == [f"out of memory with {n} faces in a pass: on with {n // 2} (train.micro_batch)" for n in (8, 4)]


@pytest.mark.parametrize(
    ("micro_batch", "most", "advice"),
    [
        ("8", 4, r"Lower train\.micro_batch, or train\.batch_size$"),
        ("auto", 1, r"Lower train\.batch_size, or let the classes take less: more cards, or data\.min_images"),
    ],
)
def test_out_of_memory_says_what_to_lower(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: str, most: int, advice: str
) -> None:
    """Parts of a size that was set, or that cannot be smaller: one line with what would help, no traceback."""
    exhaust(monkeypatch, most)
    config = configure(tiny_set, tmp_path, train__micro_batch=micro_batch)
    with pytest.raises(SystemExit, match=rf"^train: CUDA out of memory\. {advice}"):
        main(as_flags(flatten(config)))


@pytest.mark.parametrize(("optimizer", "tensors", "end"), [("sgd", 2, "_size"), ("adamw", 3, "_size, or sgd")])
def test_centres_that_do_not_fit_say_what_they_take(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, tensors: int, end: str
) -> None:
    """A smaller batch would not help: the error says how much the centres and their optimizer take, and what would."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 38.15 GiB. And much more")

    monkeypatch.setattr(build_parts, "create_head", full)
    config = configure(tiny_set, tmp_path, train__optimizer=optimizer, loss__sub_centers=3)
    with pytest.raises(SystemExit) as caught:
        main(as_flags(flatten(config)))
    classes = len(open_training_set([tiny_set], 1).identities)
    gib = f"{tensors * classes * 3 * config.model.embedding_size * 4 / 2**30:.3g}"
    said = f"The centres of {classes} classes and the state of {optimizer} take {gib} GiB a card: spread them over more"
    assert str(caught.value).startswith(f"train: CUDA out of memory. {said}")
    assert str(caught.value).endswith(f"a smaller model.embedding{end}")


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "smaller", "note", "kept"),
    [
        (2, "auto", 3, None, 3),
        (1, "auto", 3, None, None),  # which has tried by itself
        (2, "6", 3, None, None),
        (2, "auto", 0, None, None),  # batch norm cannot train on less
        (2, "auto", 3, "spread the centres over more cards", None),
    ],
)
def test_smaller_passes_are_kept_for_several_processes_where_they_help(
    tmp_path: Path, ranks: int, micro_batch: str, smaller: int, note: str | None, kept: int | None
) -> None:
    """The run that is started again takes them only if it is out of memory for want of them, and then it says so."""
    config, error = Config(), torch.OutOfMemoryError("made up")
    if note:
        error.add_note(note)
    step = SimpleNamespace(half_a_pass={6: smaller}.__getitem__)
    trainer: Any = SimpleNamespace(
        training_step=step, ranks=SimpleNamespace(size=ranks), run=tmp_path,
        config=replace(config, train=replace(config.train, micro_batch=micro_batch)),
    )  # fmt: skip
    Trainer.limit_passes(trainer, error, 6)
    assert kept_limit(tmp_path) == kept
    said = [f"Passes have 3 faces from now on: start it again with --resume auto --name {tmp_path.name}"]
    assert getattr(error, "__notes__", []) == (said if kept else [note] if note else [])


def test_every_step_and_process_draws_numbers_of_its_own() -> None:
    """Dropout of two processes, or of two steps, is not the same; and the average counts steps from 0."""
    seeds, averaged = list[int](), list[int]()
    for rank, step in itertools.product(range(2), range(3)):
        trainer: Any = MagicMock(step=step, explosions=SimpleNamespace(skipped=set()), learning_rates=[0.1] * 3)
        trainer.config.train.seed = 5
        trainer.ranks = SimpleNamespace(rank=rank, size=2)
        trainer.training_step = lambda *_: seeds.append(torch.initial_seed())
        trainer.average.update = lambda network, step: averaged.append(step)
        Trainer.train_on(trainer, MagicMock())
    assert len(set(seeds)) == 6
    assert averaged == [0, 1, 2] * 2


def test_out_of_memory_in_the_head_says_what_helps(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch of several passes keeps is the gradient of all centres: smaller passes would make no room for it."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.54 GiB")

    monkeypatch.setattr(BlockwiseHead, "take_gradient", full)
    config = configure(tiny_set, tmp_path, train__micro_batch="4", loss__engine="blockwise")
    with pytest.raises(SystemExit, match=r"^train: CUDA out of memory\. A batch of several passes .*activation_"):
        main(as_flags(flatten(config)))
