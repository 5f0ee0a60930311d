#!/usr/bin/env python3
"""Train a face recognition network with a margin-based softmax loss.

    python train.py                                        settings as edited in config.py
    python train.py --preset ms1mv3_r50 --batch-size 256 --data.root /sets/ms1mv3
    python train.py --resume runs/NAME                     go on where a run stopped

A run's folder, `runs/NAME`, gets `config.json`, `best.safetensors` (the network that verified best),
`checkpoint.safetensors` (to resume from), `classes.csv` (the identity behind each class), `metrics.jsonl`, the
TensorBoard record, and pictures of inputs, loss and accuracy.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from config import PRESETS, Config, DataConfig
from data.augment import Chances, augment
from data.face_sets import FaceSetError, open_training_set
from data.loading import DecodedFaces, EpochBatches, flips, to_network_input, training_loader
from data.orders import create_order
from data.verification_bin import VerificationPairs, find_bins, read_bin
from models import create_network
from models.embedder import NetworkEmbedder
from models.embedding import check_pairs, verify
from models.heads import DenseHead
from models.margins import create_margin
from utils.checkpoints import (
    BEST,
    CHECKPOINT,
    CONFIG,
    Progress,
    load_checkpoint,
    save_backbone,
    save_checkpoint,
    settings_beside,
)
from utils.devices import describe_device, pick_device, pick_precision
from utils.files import write_csv_atomic, write_text_atomic
from utils.interrupts import catch_interrupt
from utils.processes import worker_count
from utils.progress import progress_bar
from utils.schedules import linear_decay
from utils.scripts import readable_errors
from utils.settings import Settings, describe, parse_settings, to_json
from utils.training_log import Meter, TrainingLog


class TrainingError(ValueError):
    """The run cannot start or go on; the message says why and what to do."""


def train(config: Config) -> Path:
    """Train as `config` says; returns the run's folder.

    Raises TrainingError, FaceSetError and the other errors of the parts; KeyboardInterrupt once a Ctrl-C was heeded
    and the state is saved.
    """
    settings, run = config.train, run_folder(config)
    device = pick_device(config.common.device)
    precision = pick_precision(settings.precision, device)
    workers = worker_count(config.common.workers)

    try:
        faces = open_training_set(config.data.root, config.data.min_images)
    except FaceSetError as error:
        raise FaceSetError(f"data.root: {error}") from None
    tests = verification_sets(config.data)
    for test in tests:
        check_pairs(test, config.data.image_size)
    order = create_order(config.data.order, faces.labels, settings.seed)
    batches = EpochBatches(order, len(faces), settings.batch_size)
    if batches.batches == 0:
        raise TrainingError(f"train.batch_size is {settings.batch_size}, but {faces.path} has only {len(faces)} images")
    steps = settings.epochs * batches.batches
    learning_rates = linear_decay(steps, round(settings.warmup_epochs * batches.batches), settings.lr)

    torch.manual_seed(settings.seed)
    network = create_network(config.model.network, config.model.embedding_size, config.data.image_size)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    margin = create_margin(config.loss.name, config.loss.margin)
    head = DenseHead(len(faces.identities), config.model.embedding_size, margin, config.loss.scale).to(device)
    optimizer = torch.optim.SGD(
        [*network.parameters(), *head.parameters()],
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    modules = {"network": network, "head": head}

    progress = Progress(step=0, best_accuracy=0.0)
    if settings.resume:
        progress = load_checkpoint(run / CHECKPOINT, modules, optimizer, scaler)
    step, best_accuracy = progress.step, progress.best_accuracy
    run.mkdir(parents=True, exist_ok=True)
    write_text_atomic(run / CONFIG, to_json(config))
    write_csv_atomic(run / "classes.csv", ("class", "identity"), enumerate(faces.identities))

    left_over = len(faces) - batches.batches * settings.batch_size
    print(f"{faces.path}: {len(faces):,} images of {len(faces.identities):,} identities")
    print(f"{batches.batches:,} steps an epoch; {left_over:,} images, others each time, do not fill a batch and wait")
    print(f"verified on: {', '.join(test.name for test in tests) or 'nothing (no .bin found): the last model is kept'}")
    print(f"{describe_device(device)}, {str(precision).removeprefix('torch.')}, {workers} workers, {steps:,} steps")
    print(f"run: {run}" + (f", from step {step:,}" if step else ""))

    def note_progress(lr: float) -> None:
        """Log what the steps since the last note came to; TrainingError, before anything is saved, if they diverged."""
        means = meter.read()
        if not math.isfinite(means["train/loss"]):
            raise TrainingError(
                f"the loss became {means['train/loss']} before step {step:,}; what {run} holds of earlier steps is "
                "kept. Lower train.lr, raise train.warmup_epochs, or lower loss.scale"
            )
        log.scalars(step, {**means, "train/lr": lr})
        loss, accuracy = f"{means['train/loss']:.3f}", f"{means['train/accuracy']:.1%}"
        bar.set_postfix(loss=loss, accuracy=accuracy, refresh=False)

    def check_accuracy() -> None:
        """Verify on every set, note it, and keep the network if it is the best so far."""
        nonlocal best_accuracy
        network.eval()
        embedder = NetworkEmbedder(network, config.data.image_size, device, run.name)
        options = (config.test.batch_size, workers, config.test.mirror)
        try:
            results = {test.name: verify(embedder, test, *options) for test in tests}
        except ValueError as error:
            raise TrainingError(f"step {step:,}: {error}; if the network diverged, lower train.lr") from None
        network.train()
        for name, result in results.items():
            bar.write(f"step {step:>7,}  {name}: {100 * result.accuracy:.3f} % +- {100 * result.std:.3f}")
        mean = math.fsum(result.accuracy for result in results.values()) / max(1, len(results))
        if results:
            log.scalars(step, {f"verify/{name}": result.accuracy for name, result in results.items()})
        if mean > best_accuracy or not results:
            best_accuracy = mean
            save_backbone(run / BEST, network, to_json(config), Progress(step, best_accuracy))

    def save_state() -> None:
        save_checkpoint(run / CHECKPOINT, modules, optimizer, scaler, Progress(step, best_accuracy), to_json(config))

    decoded = DecodedFaces(faces, faces.labels, config.data.image_size, config.data.resize, tolerant=True)
    loader = training_loader(decoded, batches, workers, device)
    chances = Chances(*(getattr(config.data, f"augment_{name}") for name in Chances._fields))
    broken: set[str] = set()
    images_in_all, images_done = steps * settings.batch_size, step * settings.batch_size
    with (
        TrainingLog(run, step) as log,
        catch_interrupt() as interrupt,
        progress_bar(images_in_all, "image", initial=images_done, smoothing=0.05) as bar,
    ):
        meter = Meter(device)
        if step == 0 and settings.verify_at_start:
            check_accuracy()
        network.train()
        while step < steps:
            epoch, first_batch = divmod(step, batches.batches)
            batches.start_at(epoch, first_batch)
            bar.set_description(f"epoch {epoch + 1}/{settings.epochs}", refresh=False)
            for batch, (images, labels, newly_broken) in enumerate(loader, first_batch):
                note_broken(broken, newly_broken, config.data.broken_limit, bar.write)
                mirror = flips(settings.seed, epoch, batch, settings.batch_size).to(device, non_blocking=True)
                images = augment(images.to(device, non_blocking=True), chances, settings.seed, epoch, batch)
                inputs = to_network_input(images, mirror)
                labels = labels.to(device, non_blocking=True)
                if step == 0:
                    log.inputs(inputs[:64], step)

                lr = float(learning_rates[step])
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    loss, correct = head(network(inputs), labels)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                clip_grad_norm_(network.parameters(), settings.gradient_clip)
                scaler.step(optimizer)
                scaler.update()

                step += 1
                bar.update(settings.batch_size)
                meter.add(loss.detach(), correct, settings.batch_size)

                verify_now = step == steps or step % (settings.verify_every or batches.batches) == 0
                save_now = step == steps or step % (settings.checkpoint_every or batches.batches) == 0
                note_now = step % settings.log_every == 0 or verify_now or save_now
                if note_now:
                    note_progress(lr)
                if verify_now:
                    with meter.paused():
                        try:
                            check_accuracy()
                        except (RuntimeError, OSError):  # out of memory, a full disk: the steps are not lost
                            save_state()
                            raise
                stopping = interrupt.requested  # a Ctrl-C from here on is for the next step to see
                if stopping and not note_now:
                    note_progress(lr)
                if save_now or stopping:
                    save_state()
                if stopping:
                    raise KeyboardInterrupt(
                        f"stopped and saved at step {step:,} of {steps:,}; go on with: python train.py --resume {run}"
                    )
        log.draw()
    return run


def note_broken(broken: set[str], found: Sequence[str], limit: int, write: Callable[[str], None]) -> None:
    """Add what was `found` to `broken`, saying so once an image; TrainingError when that makes more than `limit`."""
    for message in set(found) - broken:
        write(f"left out: {message}")
    broken.update(found)
    if len(broken) > limit:
        listed = "\n  ".join(sorted(broken))
        raise TrainingError(f"{len(broken)} images are broken, data.broken_limit allows {limit}:\n  {listed}")


def run_folder(config: Config) -> Path:
    """The folder of a new run, which must not exist yet, or of the one to resume."""
    if config.train.resume:
        run = Path(config.train.resume)
        if not (run / CHECKPOINT).exists():
            raise TrainingError(f"train.resume: {run} has no {CHECKPOINT} to go on from")
        return run
    run = Path(config.common.runs) / (config.train.run or f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.network}")
    if run.exists():
        go_on = f", go on with --resume {run}" if (run / CHECKPOINT).exists() else ""
        raise TrainingError(f"{run} exists: name another with --run{go_on}, or remove it")
    return run


def verification_sets(data: DataConfig) -> list[VerificationPairs]:
    """The sets of `data.verification`, or every `.bin` beside the training set."""
    beside = [path for root in data.root for path in find_bins(root)]
    try:
        tests = [read_bin(path) for path in data.verification or beside]
    except (ValueError, OSError) as error:
        raise TrainingError(f"data.verification: {error}") from None
    names = [test.name for test in tests]
    if len(set(names)) < len(names):
        raise TrainingError(f"data.verification: two sets have the same name ({', '.join(names)}): rename one")
    return tests


def saved_settings(settings: Settings) -> Settings:
    """The settings of the run to resume, if there is one."""
    resume = settings["train.resume"]
    return {**settings_beside(Path(resume)), "train.resume": resume} if resume else {}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit("train: one process per run for now; start it without torchrun")
    with readable_errors("train", "the last checkpoint is kept"):
        config = parse_settings(Config, PRESETS, ("train", "common"), __doc__, argv, saved_settings)
        print(describe(config, ("train", "common", "data", "model", "loss", "test")))
        try:
            run = train(config)
        except torch.OutOfMemoryError as error:
            message = str(error).split(". ")[0]
            raise TrainingError(f"{message}. Lower train.batch_size (now {config.train.batch_size})") from None
    print(f"done: {run / BEST}; test it with: python all_pair_test.py --model {run}")


if __name__ == "__main__":
    main()
