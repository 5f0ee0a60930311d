#!/usr/bin/env python3
"""Train a face recognition network with a margin-based softmax loss.

    python train.py                                        settings as edited in config.py
    python train.py --preset ms1mv3_r50 --batch-size 256 --data.root /sets/ms1mv3
    python train.py --resume runs/NAME                     go on where a run stopped
    torchrun --nproc-per-node=8 train.py --preset ms1mv3_r50        eight cards, a process each

A run's folder, `runs/NAME`, gets `config.json`, `best.safetensors` (the network that verified best), `checkpoints/` (to
resume from, on any number of processes), `classes.csv` (the identity behind each class), `metrics.jsonl`, the
TensorBoard record, and pictures of inputs, loss and accuracy.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from shlex import quote
from typing import NoReturn

import torch
from torch import nn

from config import PRESETS, READS, Config
from data.augment import Chances, augment
from data.face_sets import FaceSet, FaceSetError
from data.image_sizes import require_size
from data.joined_sets import open_training_set
from data.loading import Batch, DecodedFaces, EpochBatches, flips, training_loader
from data.orders import create_order
from data.prefetch import on_device
from utils.checkpoints import BEST, CONFIG, Progress, backbone_metadata, save_backbone
from utils.devices import describe_device, describe_precision, pick_device, pick_precision, set_float32_products
from utils.evaluation.verification import Verifier
from utils.files import write_csv_atomic, write_text_atomic
from utils.interrupts import Stopped, catch_interrupt
from utils.processes import worker_count
from utils.progress import progress_bar, say
from utils.ranks import Ranks, join_ranks
from utils.scripts import end_rank, readable_errors
from utils.settings import describe, parse_settings, to_json
from utils.training.broken_images import BrokenImages
from utils.training.building import build_input, build_step
from utils.training.checkpoint_store import CheckpointStore
from utils.training.ema import WeightAverage
from utils.training.explosions import ExplodedError, ExplosionWatch
from utils.training.flops import forward_flops, quick_matmul_flops_per_s
from utils.training.log import Meter, TrainingLog, import_wandb, step_profiler
from utils.training.metrics import SECONDS_VERIFYING, VERIFIED, VERIFIED_AVERAGE
from utils.training.micro_batch import keep_limit, kept_limit
from utils.training.optimizers import create_optimizer, parameter_groups, train_mode
from utils.training.parts import build_head, build_network, build_schedule, unused_here, verification_sets
from utils.training.run_folders import CHECKPOINTS, TrainingError, run_folder, saved_settings
from utils.training.run_requests import RunRequests, SignalledError
from utils.training.same_run import check_notes, require_same_settings, set_facts, set_notes, unused_again
from utils.training.saved_checkpoints import checkpoint_folders
from utils.training.state import TrainingState
from utils.training.summary import summarise

#: What the progress bar has: tag, name and format. A loss that overflowed has no number.
SHOWN = (("train/loss", "loss", ".3f"), ("train/accuracy", "accuracy", ".1%"))


class Trainer:
    """One run, on this process; `ranks` are all that share it."""

    def __init__(self, config: Config, run: Path, device: torch.device, ranks: Ranks) -> None:
        """Raises TrainingError, FaceSetError and the errors of the parts, before anything is written."""
        settings = config.train
        self.config, self.run, self.device, self.ranks = config, run, device, ranks
        if settings.wandb and ranks.first:
            import_wandb()
        self.precision = pick_precision(settings.precision, device)
        set_float32_products(settings.precision, device)
        self.workers = worker_count(config.common.workers)

        for root in config.data.root:
            if not Path(root).exists():
                raise FaceSetError(
                    f"data.root: {root} does not exist: name your set's folder with --data.root, or in config.py"
                )
        try:
            self.faces: FaceSet = open_training_set(config.data.root, config.data.min_images)
            if len(self.faces.identities) == 1:
                raise FaceSetError(
                    f"{self.faces.path}: all of its {len(self.faces):,} images are of one identity, "
                    f"{self.faces.identities[0]}: a set has a folder, or a label, for each person, two or more"
                )
            if not config.data.resize:
                require_size(self.faces, config.data.image_size, config.data.broken_limit)
        except FaceSetError as error:
            raise FaceSetError(f"data.root: {error}") from None
        self.verifier = Verifier(
            verification_sets(config.data),
            config.data.image_size,
            device,
            self.precision,
            config.test.batch_size,
            self.workers,
            config.test.mirror,
            ranks,
        )
        self.set_notes = set_notes(self.faces)
        order = create_order(config.data.order, self.faces.labels, settings.seed)
        self.batches = EpochBatches(order, len(self.faces), settings.batch_size, ranks.rank, ranks.size)
        if self.batches.batches == 0:
            raise TrainingError(
                f"train.batch_size is {settings.batch_size}, but {self.faces.path} has only {len(self.faces)} images"
            )
        self.steps = settings.epochs * self.batches.batches
        self.peak, self.learning_rates = build_schedule(settings, self.batches.batches)

        self.begun = bool(checkpoint_folders(run / CHECKPOINTS))
        self.network = build_network(config, device, with_init=not self.begun)
        self.head = build_head(config, len(self.faces.identities), device, self.precision, ranks)
        self.flops = 3 * forward_flops(self.network, config.data.image_size)  # backward takes twice as many
        groups = parameter_groups(self.network, settings.weight_decay, settings.decay_all, settings.backbone_lr)
        self.optimizer = create_optimizer(settings.optimizer, groups, settings.momentum)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.average = WeightAverage(self.network, settings.ema) if settings.ema else None
        self.state = TrainingState(self.network, self.head, self.optimizer, self.average)

        self.step, self.best_accuracy = 0, 0.0
        self.verify_due = False  # whether the weights of this step are to be verified
        self.explosions = ExplosionWatch(settings.loss_limit, self.scaler.is_enabled())
        an_epoch = self.batches.batches * settings.batch_size // ranks.size
        self.broken = BrokenImages(config.data.broken_limit, an_epoch, ranks)

    def train(self) -> None:
        """From where the run stands to its end.

        Raises TrainingError when it cannot go on, Stopped once a signal was heeded and the state is saved.
        """
        self.describe()
        self.set_up_step()
        with ExitStack() as stack:
            self.open_run(stack)
            if self.verify_due or (self.step == 0 and self.config.train.verify_at_start):
                self.verify_or_stop(saved=self.verify_due)
            loader = self.load_faces()
            while self.step < self.steps:
                epoch, first_batch = divmod(self.step, self.batches.batches)
                self.batches.start_at(epoch, first_batch)
                self.bar.set_description(f"epoch {epoch + 1}/{self.config.train.epochs}", refresh=False)
                train_mode(self.network, self.config.train.frozen)
                try:
                    for batch in self.meter.waiting(on_device(loader, self.device)):
                        self.train_on(batch)
                except ExplodedError as error:
                    self.roll_back(error)
        if self.ranks.first:
            self.say(summarise(self.run))

    def set_up_step(self) -> None:
        """Build and try the step, before anything is written: it may find that the run cannot be."""
        settings, ranks = self.config.train, self.ranks
        limit = ranks.least(ranks.together(lambda: kept_limit(self.run) or settings.batch_size))
        self.training_step = build_step(
            self.config, self.network, self.head, self.optimizer, self.scaler, self.precision, self.device, ranks,
            self.say, limit,
        )  # fmt: skip
        self.to_input = build_input(settings, self.device)

    def open_run(self, stack: ExitStack) -> None:
        """Go to where the run stands, and open what it writes and shows, which `stack` closes."""
        settings, ranks = self.config.train, self.ranks
        self.store = stack.enter_context(
            CheckpointStore(self.run / CHECKPOINTS, ranks, settings.checkpoints_kept, say=self.say)
        )
        if self.restore_newest() and not settings.resume:
            raise TrainingError(
                f"{self.run} was made by another process meanwhile: name another with --name, or go on with "
                f"--resume {quote(str(self.run))}"
            )
        self.say_where()
        self.most_flops = ranks.size * quick_matmul_flops_per_s(self.device, self.precision)
        self.log = stack.enter_context(ranks.together(self.open_record))
        self.profiler = stack.enter_context(step_profiler(settings.profile if ranks.first else 0, self.run))
        interrupt = stack.enter_context(catch_interrupt(shared=ranks.size > 1))
        self.requests = RunRequests(interrupt, ranks, settings.checkpoint_minutes)
        size = settings.batch_size
        self.bar = stack.enter_context(
            progress_bar(self.steps * size, "image", initial=self.step * size, smoothing=0.05, disable=not ranks.first)
        )
        self.meter = Meter(self.device)

    def load_faces(self) -> Iterable[Batch]:
        """The loader of what `batches` lists."""
        data = self.config.data
        decoded = DecodedFaces(self.faces, self.faces.labels, data.image_size, data.resize, tolerant=True)
        return training_loader(decoded, self.batches, self.workers, self.device, data.decode)

    def train_on(self, batch: Batch) -> None:
        """One step, and what is due after it."""
        settings, step = self.config.train, self.step
        self.broken.note(batch.broken, len(batch.labels))
        if step not in self.explosions.skipped:
            inputs = self.prepare(batch.faces)
            if step == 0:
                self.log.inputs(inputs[:64], step)
            # For dropout and its like: a resumed run draws the same, and no two ranks do.
            torch.manual_seed((settings.seed + step) * self.ranks.size + self.ranks.rank)
            try:
                output = self.training_step(inputs, batch.labels, step, float(self.learning_rates[step]))
            except torch.OutOfMemoryError as error:
                self.limit_passes(error, len(batch.labels))
                raise
            if self.average is not None:
                self.average.update(self.network, step)
            self.meter.add(step, output, settings.batch_size)
            self.profiler.step()
        self.step = step = step + 1
        self.bar.update(settings.batch_size)
        self.after_step()

    def after_step(self) -> None:
        """What is due: a line of the log, a checkpoint, a verification, an end that was asked for."""
        settings, step = self.config.train, self.step
        last, an_epoch = step == self.steps, self.batches.batches
        verify_now = last or step % (settings.verify_every or an_epoch) == 0
        save_now = last or step % (settings.checkpoint_every or an_epoch) == 0
        note_now = step % settings.log_every == 0 or verify_now or save_now
        # A signal from here on is for the verification or the next step to see.
        asked = self.requests.read(step, note_now, failing=self.broken.too_many)
        if asked.failing:
            self.broken.refuse()
        if note_now or asked.signal:
            self.note()
        self.verify_due = verify_now
        save_now = save_now or (note_now and asked.overdue)
        if save_now or asked.signal:
            self.save(wait=asked.signal > 0)
        if asked.signal:
            self.stop(asked.signal)
        if verify_now:
            self.verify_or_stop(saved=save_now)

    def stop(self, signal: int) -> NoReturn:
        """End the run, whose state is saved, as `signal` asked for."""
        self.store.wait()
        go_on = f"go on with: python train.py --resume {quote(str(self.run))}"
        raise Stopped(f"stopped and saved at step {self.step:,} of {self.steps:,}; {go_on}", 128 + signal)

    def verify_or_stop(self, saved: bool) -> None:
        """Verify. Neither a signal meanwhile nor an error costs the steps, which may be `saved` already."""
        try:
            with self.meter.paused():
                self.verify()
        except SignalledError as error:
            if not saved:
                self.save(wait=True)
            self.stop(error.signal)
        except (RuntimeError, OSError):  # out of memory, say
            if not saved and self.ranks.size == 1:  # the others may not know, and a save needs them all
                self.save(wait=True)
            raise

    def prepare(self, faces: torch.Tensor) -> torch.Tensor:
        """What the network gets of decoded faces: augmented, mirrored, normalised."""
        seed, (epoch, batch) = self.config.train.seed, divmod(self.step, self.batches.batches)
        rank, ranks = self.ranks.rank, self.ranks.size
        chances = Chances(*(getattr(self.config.data, f"augment_{name}") for name in Chances._fields))
        mirror = flips(seed, epoch, batch, self.config.train.batch_size, rank, ranks)
        faces = augment(faces, chances, seed, epoch, batch, rank, ranks)
        return self.to_input(faces, mirror.to(self.device, non_blocking=True))

    def note(self) -> None:
        """Log what the steps since the last note came to; ExplodedError, before anything is saved, if they diverged."""
        noted = self.meter.read()
        if noted is None:
            return
        if exploded := self.explosions.exploded(noted):
            self.explode(*exploded)
        flops = noted.means["train/images_per_s"] * self.flops
        rates = {
            "train/lr": float(self.learning_rates[self.step - 1]),
            "train/tflops_per_s": flops / 1e12,
            "train/mfu": flops / self.most_flops,
        }
        self.log.scalars(self.step, {**noted.means, **rates})
        self.log.distributions(self.step, noted.distributions)
        shown = {name: format(noted.means[tag], form) for tag, name, form in SHOWN if tag in noted.means}
        self.bar.set_postfix(shown, refresh=False)

    def verify(self) -> None:
        """Verify on every set, note it, and keep the network if it is the best so far."""
        networks = {VERIFIED: self.network}
        if self.average is not None:
            networks[VERIFIED_AVERAGE] = self.average.network
        best, accuracy, began = None, self.best_accuracy, time.perf_counter()
        for tag, network in networks.items():
            try:
                results = self.verifier(network, self.requests.heed)
            except ValueError as error:
                raise TrainingError(f"step {self.step:,}: {error}; if the network diverged, lower train.lr") from None
            kind = " (average)" if tag == VERIFIED_AVERAGE else ""
            for name, result in results.items():
                percent, std = 100 * result.accuracy, 100 * result.std
                self.say(f"step {self.step:>7,}  {name}{kind}: {percent:.3f} % +- {std:.3f}")
            if results:
                self.log.scalars(self.step, {tag + name: result.accuracy for name, result in results.items()})
            mean = math.fsum(result.accuracy for result in results.values()) / max(1, len(results))
            if mean > accuracy or not results:
                accuracy, best = mean, network
        if self.verifier.sets:
            self.log.scalars(self.step, {SECONDS_VERIFYING: time.perf_counter() - began})
        if best is not None:
            self.keep_best(best, accuracy)
        self.log.draw_now_and_then()
        train_mode(self.network, self.config.train.frozen)

    def keep_best(self, network: nn.Module, accuracy: float) -> None:
        """Write `network`, the best so far. On a full disk that is left to a later one that is better."""
        try:
            if self.ranks.first:
                save_backbone(self.run / BEST, network, to_json(self.config), Progress(self.step, accuracy))
        except OSError as error:
            if self.step >= self.steps:
                raise
            self.say(f"the best network so far could not be written ({error}): the next verification tries again")
            return
        self.best_accuracy = accuracy

    def save(self, wait: bool) -> None:
        """Save all that the next step depends on."""
        notes = {
            "settings": json.loads(to_json(self.config)),
            "best_accuracy": self.best_accuracy,
            "verify_due": self.verify_due,
            **self.set_notes,
            "scaler": self.scaler.state_dict(),
            "skipped": sorted(self.explosions.skipped),
            "torch": torch.__version__,
        }
        about = backbone_metadata(to_json(self.config), Progress(self.step, self.best_accuracy))
        with self.meter.paused():
            state = self.state
            self.store.save(self.step, state.whole(), state.rows(), notes, wait, state.backbone(), about)
        self.requests.saved()

    def restore_newest(self) -> bool:
        """Go to where the newest whole checkpoint stands, if there is one."""
        saved = self.store.newest()
        if saved is None:
            if self.config.train.resume not in ("", "auto"):
                raise TrainingError(f"train.resume: {self.run} has no whole checkpoint to go on from")
            if self.begun:
                self.begin_anew()
            return False
        check_notes(saved.notes, self.config, self.faces, self.run)
        self.state.restore(saved)
        if self.step == 0:
            for line in unused_again(saved.notes, self.config, self.run):
                self.say(line)
        self.step, self.best_accuracy = saved.step, saved.notes["best_accuracy"]
        self.explosions.skipped |= set(saved.notes["skipped"])
        self.verify_due = saved.notes.get("verify_due", False)
        if saved.notes["scaler"] and self.scaler.is_enabled():  # a run may go on in another precision
            self.scaler.load_state_dict(saved.notes["scaler"])
        return True

    def begin_anew(self) -> None:
        """Load the first weights, which a run that was begun has no need of unless all its checkpoints are damaged."""
        first = self.ranks.together(lambda: build_network(self.config, self.device)).state_dict()
        self.network.load_state_dict(first)
        if self.average is not None:
            self.average.network.load_state_dict(first)

    def roll_back(self, error: ExplodedError) -> None:
        """Go back to the last checkpoint and leave out the batches that led astray; or raise TrainingError."""
        if self.config.train.on_explosion == "stop":
            raise error
        if not self.restore_newest():
            raise TrainingError(f"{error}. There is no checkpoint yet to go back to: lower train.checkpoint_every")
        self.explosions.leave_out(error)
        self.meter = Meter(self.device)
        self.bar.reset()
        self.bar.update(self.step * self.config.train.batch_size)
        self.log.forget_after(self.step, self.verify_due)
        self.say(f"{error}\nback at step {self.step:,}, and on without steps {error.step - 1:,} and {error.step:,}")
        self.save(wait=True)
        if self.verify_due:
            self.verify_or_stop(saved=True)

    def explode(self, step: int, loss: float, norm: float) -> None:
        """Raise ExplodedError, with what there is to know of `step`."""
        epoch, batch = divmod(step, self.batches.batches)
        size = self.config.train.batch_size
        positions = self.batches.order(epoch)[batch * size : (batch + 1) * size]
        listed = self.run / f"exploded-step-{step}.txt"
        if self.ranks.first:
            write_text_atomic(listed, "".join(f"{self.faces.describe(int(i))}\n" for i in positions))
        advise_skipping = self.config.train.on_explosion == "stop"
        raise ExplodedError(step, loss, norm, float(self.learning_rates[step]), listed, advise_skipping)

    def limit_passes(self, error: torch.OutOfMemoryError, faces: int) -> None:
        """Let the run, once it is started again, take smaller passes than those that ran out of memory, if that helps.

        One process alone did so in the step itself. Of several, the others wait for this one, which cannot make up for
        what it left out.
        """
        smaller = self.training_step.half_a_pass(faces)
        special = bool(getattr(error, "__notes__", []))  # smaller passes are not what it wants
        if self.ranks.size > 1 and self.config.train.micro_batch == "auto" and smaller and not special:
            keep_limit(self.run, smaller)
            again = f"start it again with --resume auto --name {quote(self.run.name)}"
            error.add_note(f"Passes have {smaller} faces from now on: {again}")

    def describe(self) -> None:
        """Say what is about to happen."""
        an_epoch, size = self.batches.batches, self.config.train.batch_size
        tests = ", ".join(pairs.name for pairs in self.verifier.sets)
        why_not = "data.verification" if self.config.data.verification else "no .bin found"
        on = describe_device(self.device) + (f" x {self.ranks.size}" if self.ranks.size > 1 else "")
        left = len(self.faces) - an_epoch * size
        factor = self.config.train.backbone_lr
        rate = f"learning rate {self.peak:.4g} at its peak"
        if factor != 1:
            rate += f", {factor * self.peak:.4g} for the network"
        if self.config.train.frozen:
            weights = [(value.numel(), value.requires_grad) for value in self.network.parameters()]
            still = sum(count for count, learns in weights if not learns)
            rate += f"; {still:,} of the network's {sum(count for count, _ in weights):,} weights are frozen"
        for line in (
            f"{self.faces.path}: {len(self.faces):,} images of {len(self.faces.identities):,} identities",
            f"{an_epoch:,} steps an epoch; {left:,} images, others each time, do not fill a batch and wait",
            f"verified on: {tests or f'nothing ({why_not}): the last model is kept'}",
            f"{on}, {describe_precision(self.precision, self.device)}, {self.workers} workers, {self.steps:,} steps",
            rate,
            *unused_here(self.config, self.device, self.ranks, self.head),
        ):
            self.say(line)

    def say_where(self) -> None:
        """Say where the run stands."""
        where = f"run: {self.run}" + (f", from step {self.step:,}" if self.step else "")
        if not self.step and (self.run / CONFIG).exists():
            where += ", which has no checkpoint yet: from the start"
        self.say(where)
        if self.step >= self.steps:
            self.say(f"nothing is left to train: {self.steps:,} steps are all (train.epochs)")

    def open_record(self) -> TrainingLog:
        """Write what the run is, and open its log."""
        if self.ranks.first:
            write_text_atomic(self.run / CONFIG, to_json(self.config))
            write_csv_atomic(self.run / "classes.csv", ("class", "identity"), enumerate(self.faces.identities))
        again = self.verify_due or self.step == 0  # what a first try left, which had no checkpoint
        return TrainingLog(self.run, self.step, self.config.train.wandb, self.ranks.first, self.say, again)

    def say(self, line: str) -> None:
        """A line on the screen, from the first rank."""
        if self.ranks.first:
            say(line)


def train(config: Config) -> Path:
    """Train as `config` says, on all processes that torchrun started or on this one; returns the run's folder.

    Raises TrainingError, FaceSetError and the other errors of the parts; Stopped (a KeyboardInterrupt) once a signal
    was heeded and the state is saved.
    """
    device = pick_device(config.common.device)
    with join_ranks(device) as ranks:
        require_same_settings(config, ranks)
        run = Path(ranks.agree(ranks.together(lambda: str(run_folder(config)) if ranks.first else "")))
        try:
            trainer = ranks.together(lambda: Trainer(config, run, device, ranks))
            ranks.require_alike(lambda: set_facts(trainer.faces, trainer.verifier.sets))
            trainer.train()
        finally:
            if ranks.first:
                with suppress(OSError):  # there is something in it, unless the run could not begin
                    run.rmdir()
    return run


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("train", "the last checkpoint is kept"):
        config = parse_settings(
            Config, PRESETS, ("train", "common"), __doc__, argv, saved_settings, reads=READS["train"]
        )
        if os.environ.get("RANK", "0") == "0":
            print(describe(config, ("train", "common", "data", "model", "loss", "test")))
        try:
            run = train(config)
        except torch.OutOfMemoryError as error:
            (advice,) = getattr(error, "__notes__", ["Lower train.micro_batch, or train.batch_size"])[:1]
            raise TrainingError(f"{str(error).split('. ')[0]}. {advice}") from None
    if os.environ.get("RANK", "0") == "0":
        print(f"done: {run / BEST}; test it with: python all_pair_test.py --model {quote(str(run))}")


if __name__ == "__main__":
    main()
    end_rank()
