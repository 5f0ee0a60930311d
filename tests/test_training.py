"""The training loop: repeatable, and careful with what it is given and what it has."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import Config, LossConfig, ModelConfig, TrainConfig
from data.face_set_writer import write_face_set
from data.face_sets import FaceSetError
from data.image_sizes import require_size
from data.images import decode_rgb, encode_png
from data.joined_sets import open_training_set
from data.loading import Batch, flips
from data.prepare_data import prepare
from data.verification_bin import read_bin, write_bin
from models import create_network
from models.heads import DenseHead, RowSGD
from models.losses import LOSSES, ArcFace
from tiny_faces import tiny_face
from tiny_runs import checkpoints, configure, same, weights
from train import Trainer, TrainingError, train
from utils.checkpoints import BEST, load_backbone
from utils.evaluation import verification
from utils.ranks import Ranks
from utils.settings import build, from_json
from utils.training import log as training_log
from utils.training.broken_images import BrokenImages
from utils.training.checkpoint_store import CheckpointStore
from utils.training.flops import forward_flops
from utils.training.metrics import read_metrics
from utils.training.saved_checkpoints import BACKBONE, step_of
from utils.training.schedules import peak_lr

ROOT = Path(__file__).resolve().parents[1]


def test_same_run_twice_gives_the_same_numbers(tiny_set: Path, tmp_path: Path) -> None:
    """Seeded and repeatable: every weight, every momentum, equal to the bit; another seed is another run."""
    runs = [train(configure(tiny_set, tmp_path, train__name=name)) for name in ("a", "b")]
    other = train(configure(tiny_set, tmp_path, train__name="c", train__seed=1))
    assert same(*map(weights, runs))
    assert not same(weights(runs[0]), weights(other))


def test_the_loop_is_the_published_recipe(tiny_set: Path, tmp_path: Path) -> None:
    """Order, flips, pixels, LR, clipping of the network alone, momentum, decay: it ends where a plain loop ends."""
    clip, momentum, decay, peak, steps = 0.5, 0.8, 1e-2, 0.05, 12
    run = train(
        configure(tiny_set, tmp_path, train__warmup_epochs=1.0, train__gradient_clip=clip, train__momentum=momentum,
                  train__weight_decay=decay, train__decay_all=True, train__lr=peak)
    )  # fmt: skip

    faces = open_training_set([tiny_set], 1)
    pixels = np.stack([decode_rgb(faces.encoded(i), i) for i in range(48)]).astype(np.float32)
    torch.manual_seed(0)
    network, head = create_network("demo", 16, 32), DenseHead(ArcFace(0.5, 16.0), 6, 16, RowSGD())
    weights_by_group = [list(network.parameters()), list(head.parameters())]
    velocity = [[torch.zeros_like(weight) for weight in group] for group in weights_by_group]
    clipped = 0
    for step in range(steps):
        epoch, batch = divmod(step, 6)
        chosen = np.random.default_rng([0, epoch]).permutation(48)[8 * batch : 8 * batch + 8]
        inputs = (pixels[chosen].transpose(0, 3, 1, 2) - 127.5) / 127.5
        mirror = flips(0, epoch, batch, 8).numpy()
        inputs[mirror] = inputs[mirror][..., ::-1]
        labels = torch.from_numpy(faces.labels[chosen])
        lr = peak * ((step + 1) / 6 if step < 6 else (steps - step) / 6)
        loss = head(network(torch.from_numpy(inputs)), labels, step).loss
        gradients = [list(torch.autograd.grad(loss, group, retain_graph=True)) for group in weights_by_group]
        norm = torch.cat([gradient.flatten() for gradient in gradients[0]]).norm()
        clipped += int(norm > clip)
        gradients[0] = [gradient * min(1.0, clip / float(norm)) for gradient in gradients[0]]
        with torch.no_grad():
            for group, own, speeds in zip(weights_by_group, gradients, velocity, strict=True):
                for weight, gradient, speed in zip(group, own, speeds, strict=True):
                    speed.mul_(momentum).add_(gradient + decay * weight)
                    weight -= lr * speed
    assert clipped == steps, "the clip must bite, or it is not tested"
    reached = weights(run)
    for name, module in (("network", network), ("head", head)):
        for key, value in module.named_parameters():
            torch.testing.assert_close(reached[f"{name}.{key}"], value, rtol=1e-3, atol=1e-4)


def test_workers_change_nothing(tiny_set: Path, tmp_path: Path) -> None:
    """How many processes decode must not decide what is learned."""
    runs = [train(configure(tiny_set, tmp_path, train__name=str(n), common__workers=n)) for n in (0, 2)]
    assert same(*map(weights, runs))


def test_folders_train_like_the_records_they_came_from(tiny_set: Path, tmp_path: Path) -> None:
    """A set unpacked by prepare_data.py is the same training set: same classes, same order, same weights."""
    prepare(tiny_set / "train.rec", tmp_path / "folders", 0)
    shutil.copy(tiny_set / "tiny.bin", tmp_path / "folders")
    records = train(configure(tiny_set, tmp_path, train__name="packed"))
    folders = train(configure(tmp_path / "folders", tmp_path, train__name="unpacked"))
    assert same(weights(records), weights(folders))


def test_verification_sets_are_checked_before_the_first_step(tiny_set: Path, tmp_path: Path) -> None:
    """A set that cannot be tested stops the run at its start, not after an epoch."""
    pairs = read_bin(tiny_set / "tiny.bin")
    images = [pairs.images[i] for i in pairs.index.reshape(-1)]
    for name, chosen, of_one, message in (
        ("few", images[:18], pairs.same[:9], "few: 9 pairs cannot make 10 folds"),
        ("bad", [b"no image", *images[1:]], pairs.same, "bad, image A of pair 0: its 8 bytes are no image"),
    ):
        write_bin(tmp_path / f"{name}.bin", chosen, of_one.tolist())
        with pytest.raises(ValueError, match=message):
            train(configure(tiny_set, tmp_path / "runs", data__verification=(str(tmp_path / f"{name}.bin"),)))
    assert not (tmp_path / "runs").exists()


def test_several_sets_and_few_images(tiny_set: Path, tmp_path: Path) -> None:
    """`data.root A,B` trains on both with their people apart; `data.min_images` drops identities without a hole."""
    more = tmp_path / "more"
    with write_face_set(more, 32) as out:
        for identity, shots in ((200, 1), (201, 6), (202, 3)):
            out.add_identity(tiny_face(identity, shot) for shot in range(shots))
    both = train(configure(tiny_set, tmp_path, data__root=(str(tiny_set), str(more)), train__epochs=1))
    assert len(weights(both)["head.weight"]) == 9
    fewer = configure(
        tiny_set, tmp_path, data__root=(str(tiny_set), str(more)), data__min_images=3, train__name="b", train__epochs=1
    )
    assert len(weights(train(fewer))["head.weight"]) == 8
    faces = open_training_set([tiny_set, more], 3)
    assert faces.identities[6:] == [f"{more / 'train.rec'}: 1", f"{more / 'train.rec'}: 2"]
    assert [faces.encoded(i) for i in np.flatnonzero(faces.labels == 7)] == [tiny_face(202, s) for s in range(3)]
    for again in (tiny_set, tiny_set / "train.rec"):
        with pytest.raises(FaceSetError, match="is named twice"):
            open_training_set([tiny_set, more, again], 1)
    with pytest.raises(FaceSetError, match="no identity has 9 images"):
        open_training_set([tiny_set], 9)


def test_a_set_of_one_identity_is_refused_at_once(tiny_set: Path, tmp_path: Path) -> None:
    """A folder of images beside their list looks like one person: it is named, and what a set has to look like."""
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "1.png").write_bytes(tiny_face(0, 0))
    message = (
        r"data\.root: .*mine: all of its 1 images are of one identity, images: a set has a folder, or a label, for"
    )
    with pytest.raises(FaceSetError, match=message):
        train(configure(tiny_set, tmp_path / "runs", data__root=(str(tmp_path / "mine"),)))
    assert not (tmp_path / "runs").exists()


def test_a_set_of_another_size_is_refused_at_once(tiny_set: Path, tmp_path: Path) -> None:
    """One line that says what to set, before anything is written, not a line for each image; a few images of another
    size are left to `data.broken_limit`, and `data.resize` takes all that are square.
    """
    message = r"data\.root: .*: 48 of 48 images that were looked at do not have 48x48 pixels; 48 have 32x32: .*resize"
    with pytest.raises(FaceSetError, match=message):
        train(configure(tiny_set, tmp_path, data__image_size=48))
    assert not list(tmp_path.iterdir())
    with write_face_set(tmp_path / "mixed", 32) as out:
        for identity in range(4):
            out.add_identity([b"broken", encode_png(np.zeros((16, 16, 3), np.uint8)), tiny_face(identity, 0)])
    faces = open_training_set([tmp_path / "mixed"], 1)
    require_size(faces, 32, most=6, resize=False)
    with pytest.raises(FaceSetError, match="4 of 8 images"):
        require_size(faces, 32, most=5, resize=False)
    require_size(faces, 24, most=0, resize=True)
    with write_face_set(tmp_path / "photos", 32) as out:
        out.add_identity([encode_png(np.zeros((16, 32, 3), np.uint8))])
        out.add_identity([encode_png(np.zeros((16, 32, 3), np.uint8))])
    message = r"photos.*: 2 of 2 images .* are not square; 2 have 32x16: align the set \(data/pack_set\.py\)"
    with pytest.raises(FaceSetError, match=message):
        train(configure(tmp_path / "photos", tmp_path, data__resize=True, train__batch_size=2))


@pytest.mark.parametrize("order", ["blocks", "balanced"])
def test_other_orders_train(tiny_set: Path, tmp_path: Path, order: str) -> None:
    """Each order of the config goes through the loop."""
    assert (train(configure(tiny_set, tmp_path, data__order=order, train__epochs=1)) / BEST).exists()


def test_broken_images_are_left_out_up_to_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few broken images cost themselves, each named once; more than the limit stop the run with their list."""
    with write_face_set(tmp_path / "set", 32) as out:
        for identity in range(4):
            out.add_identity(b"broken" if shot == 3 else tiny_face(identity, shot) for shot in range(8))
    run = train(configure(tmp_path / "set", tmp_path, data__broken_limit=4))
    assert capsys.readouterr().out.count("left out:") == 4
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    with pytest.raises(
        TrainingError,
        match=r"4 images are broken, data\.broken_limit allows 3:(\n  .*record \d+ at.*){4}\n.*--repair",
    ):
        train(configure(tmp_path / "set", tmp_path, data__broken_limit=3, train__name="b"))


@pytest.mark.parametrize("people", [4, 1])
def test_a_run_ends_when_all_its_images_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, people: int) -> None:
    """A folder that is removed, or a disk that is lost, under a small set never comes to data.broken_limit: a run must
    not go on with a loss of 0 and save that, be there 32 images or just those of an epoch."""
    for identity in range(people + 1):
        for shot in range(8):
            file = tmp_path / "set" / str(identity) / f"{shot}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(tiny_face(identity, shot))
    config = configure(tmp_path / "set", tmp_path, train__epochs=20, train__batch_size=8)
    step = Trainer.train_on

    def train_on(trainer: Trainer, batch: Batch) -> None:
        if trainer.step == 3:
            shutil.rmtree(tmp_path / "set")
        step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_on", train_on)
    with pytest.raises(TrainingError, match=r"none of the last \d+ images was good: is the set still there\?(\n  .*)+"):
        train(config)
    steps = [json.loads(line)["step"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) <= 3 + 4 + 2


def test_a_small_batch_of_broken_images_is_chance() -> None:
    """Two broken images in a batch of two, and in the next, are not the end of a large set; a good one among many
    starts the count anew."""
    broken = BrokenImages(100, 1000, Ranks())
    for _ in range(15):
        broken.note(["a", "b"], 2)
    assert not broken.too_many
    broken.note(["a"], 2)
    broken.note([str(i) for i in range(31)], 31)
    assert not broken.too_many
    broken.note(["a"], 1)
    assert broken.too_many


def test_broken_images_are_told_once_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs over the same set print the same lines."""
    broken = BrokenImages(100, 1000, Ranks())
    broken.note([str(i) for i in reversed(range(10))], 10)
    broken.note(["3", "x"], 10)
    assert capsys.readouterr().out.split() == " ".join(f"left out: {name}" for name in [*range(10), "x"]).split()


def test_the_run_folder_explains_itself(tiny_set: Path, tmp_path: Path) -> None:
    """Settings, numbers and pictures of a run are in its folder, and the model alone tells how to load it."""
    config = configure(tiny_set, tmp_path)
    run = train(config)
    assert build(Config, from_json((run / "config.json").read_text())) == config
    for file in (run / BEST, checkpoints(run)[-1] / BACKBONE):
        _, settings = load_backbone(file)
        assert settings["model"]["network"] == "demo"
        assert settings["data"]["image_size"] == 32
    for picture in ("inputs.png", "loss.png", "accuracy.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(run))
    board.Reload()
    assert [image.step for image in board.Images("train/inputs")] == [0]
    assert (run / "classes.csv").read_text() == "class,identity\n0,0\n1,1\n2,2\n3,3\n4,4\n5,5\n"
    assert not list(run.glob(".*.partial"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "verify/tiny" in line] == [6, 12]
    noted = {"loss", "accuracy", "lr", "images_per_s", "seconds", "gradient_norm", "data_wait", "tflops_per_s", "mfu"}
    assert noted == {name.removeprefix("train/") for name in lines[0] if name != "step"}
    flops = 3 * forward_flops(create_network("demo", 16, 32), 32)  # an image's, forward and backward
    for line in lines:
        if "train/loss" in line:
            assert line["train/tflops_per_s"] == pytest.approx(line["train/images_per_s"] * flops / 1e12)
            assert line["train/mfu"] > 0
            assert line["train/lr"] == pytest.approx(0.05 * (13 - line["step"]) / 12), "of the last step before it"
    assert run.stat().st_mode & 0o777 == (run / BEST).stat().st_mode & 0o777 | 0o111


def test_the_best_network_is_kept(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later network that is worse, or no better, does not replace the best one."""
    real, accuracies = verification.verify, iter([0.6, 0.9, 0.9, 0.8])
    monkeypatch.setattr(verification, "verify", lambda *a: [replace(real(*a)[0], accuracy=next(accuracies))])
    run = train(configure(tiny_set, tmp_path, train__verify_every=3, train__checkpoint_every=6))
    accuracy = [line["verify/tiny"] for line in read_metrics(run) if "verify/tiny" in line]
    assert accuracy == [0.6, 0.9, 0.9, 0.8]
    with safe_open(run / BEST, "pt") as file:
        assert file.metadata()["step"] == "6"
    best, last = weights(run, BEST), weights(run)
    assert not torch.equal(best["head.1.weight"], last["network.head.1.weight"])


def test_verifying_changes_no_weight(tiny_set: Path, tmp_path: Path) -> None:
    """A verification after every step, which puts the network into another mode, is none that training sees."""
    runs = [train(configure(tiny_set, tmp_path, train__name=str(every), train__verify_every=every)) for every in (1, 6)]
    assert same(*map(weights, runs))


def test_what_is_due_at_which_step(tiny_set: Path, tmp_path: Path) -> None:
    """Verifications and checkpoints after so many steps, and after the last one, which ends no such interval; each with
    a line of the log before it, so that nothing that diverged is verified or saved."""
    intervals = {"train__verify_every": 5, "train__checkpoint_every": 8, "train__log_every": 100}
    run = train(configure(tiny_set, tmp_path, **intervals, train__checkpoints_kept=9))
    lines = read_metrics(run)
    assert [line["step"] for line in lines if "verify/tiny" in line] == [5, 10, 12]
    assert [step_of(folder) for folder in checkpoints(run)] == [8, 12]
    assert [line["step"] for line in lines if "train/loss" in line] == [5, 8, 10, 12]


def test_the_rates_are_those_of_training_alone(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images a second, seconds and the rest of a line are of its steps: an hour of verifying or saving is not in it."""
    hours = [0.0]
    clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: time.perf_counter() + 3600 * hours[0])
    monkeypatch.setattr(training_log, "time", clock)
    for owner, name, whole in (
        (verification, "verify", verification.verify),
        (CheckpointStore, "save", CheckpointStore.save),
    ):

        def an_hour_later(*arguments: object, real: Any = whole) -> object:
            hours[0] += 1
            return real(*arguments)

        monkeypatch.setattr(owner, name, an_hour_later)
    run = train(configure(tiny_set, tmp_path, train__verify_every=3, train__checkpoint_every=4))
    assert hours == [7]
    assert all(line["train/seconds"] < 3600 for line in read_metrics(run) if "train/loss" in line)


def test_learns(tiny_set: Path, tmp_path: Path) -> None:
    """The loop minimises what it should: the loss falls and faces find their own class."""
    run = train(configure(tiny_set, tmp_path, train__epochs=12, loss__scale=8.0, loss__margin=0.2))
    lines = [line for line in read_metrics(run) if "train/loss" in line]
    assert lines[-1]["train/loss"] < 0.5 * lines[0]["train/loss"]
    assert lines[-1]["train/accuracy"] > 0.9


def test_a_diverged_run_stops_and_keeps_its_checkpoint(tiny_set: Path, tmp_path: Path) -> None:
    """NaN never reaches a checkpoint: the run stops first and says what to change."""
    with pytest.raises(TrainingError, match=r"the loss became nan at step 1 .*Lower train\.lr"):
        train(configure(tiny_set, tmp_path, train__lr=1e30, train__gradient_clip=1e30, train__checkpoint_every=1))
    for tensor in weights(tmp_path / "a").values():
        assert torch.isfinite(tensor).all()


def test_without_verification_sets_the_last_network_is_kept(tiny_set: Path, tmp_path: Path) -> None:
    """A set without .bin files still gives a model, and says that it was not verified."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("train.rec", "train.idx", "property"):
        (alone / name).write_bytes((tiny_set / name).read_bytes())
    run = train(configure(alone, tmp_path))
    last = weights(run)
    assert all(torch.equal(tensor, last[f"network.{key}"]) for key, tensor in weights(run, BEST).items())


def test_verification_can_be_left_out(tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--data.verification none` does without the sets that lie beside the training set."""
    run = train(configure(tiny_set, tmp_path, data__verification=("none",), train__epochs=1))
    assert "verified on: nothing (data.verification): the last model is kept" in capsys.readouterr().out
    assert not [line for line in read_metrics(run) if any(name.startswith("verify/") for name in line)]
    assert (run / BEST).exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"data__root": ("/nowhere",)},
            FaceSetError,
            r"data\.root: /nowhere does not exist: name .* with --data\.root",
        ),
        ({"data__verification": ("/no.bin",)}, TrainingError, r"data\.verification: /no\.bin does not exist"),
        ({"train__batch_size": 1000}, TrainingError, "has only 48 images"),
        ({"data__verification": ("/nowhere.bin",)}, TrainingError, r"data\.verification: .*nowhere\.bin"),
        ({"data__verification": ("TINY", "TINY")}, TrainingError, r"two sets have the same name \(tiny, tiny\)"),
        (
            {"data__image_size": 48, "data__resize": True},
            ValueError,
            r"image A of pair 0 is 32x32 pixels, expected 48x48: .*data\.resize scales training images only",
        ),
        ({"model__network": "r49"}, ValueError, r"model\.network: there is no network 'r49'.*; there are r18"),
        ({"train__resume": "/nowhere"}, TrainingError, "/nowhere has no checkpoint"),
        ({"common__device": "abacus"}, ValueError, r"common\.device"),
    ],
)
def test_errors_say_what_is_wrong(
    tiny_set: Path, tmp_path: Path, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    """A run that cannot start says which setting or file is at fault."""
    if settings.get("data__verification") == ("TINY", "TINY"):
        settings = {"data__verification": (str(tiny_set / "tiny.bin"),) * 2}
    with pytest.raises(error, match=message):
        train(configure(tiny_set, tmp_path, **settings))


def test_a_run_is_never_overwritten(tiny_set: Path, tmp_path: Path) -> None:
    """The name of an existing run is refused before anything is written."""
    (tmp_path / "a").mkdir()
    with pytest.raises(TrainingError, match="exists: name another with --name"):
        train(configure(tiny_set, tmp_path))
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(tiny_set: Path, tmp_path: Path, loss: str) -> None:
    """Each loss of the config goes through the loop."""
    run = train(configure(tiny_set, tmp_path, loss__name=loss, train__epochs=1))
    assert (run / BEST).exists()


def test_half_precision_trains(tiny_set: Path, tmp_path: Path) -> None:
    """Autocast to bfloat16 goes through the loop, with weights and embeddings kept in float32."""
    run = train(configure(tiny_set, tmp_path, train__precision="bf16", train__epochs=1))
    assert {tensor.dtype for tensor in weights(run, BEST).values()} == {torch.float32, torch.int64}


def test_config_sections_are_what_the_loop_uses() -> None:
    """The defaults are the published single-card recipe."""
    lr = peak_lr(TrainConfig().lr, TrainConfig().optimizer, TrainConfig().batch_size)
    assert lr == pytest.approx(0.02)
    assert (TrainConfig().batch_size, TrainConfig().weight_decay) == (128, 5e-4)
    assert (LossConfig().name, LossConfig().margin, LossConfig().scale) == ("arcface", 0, 0), "0: as published"
    assert ModelConfig().embedding_size == 512
