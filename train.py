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

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import NoReturn

import torch
from torch import nn

from config import PRESETS, READS, Config
from data.augment import Chances, augment
from data.loading import Batch, DecodedFaces, EpochBatches, flips, training_loader
from data.orders import create_order
from data.prefetch import on_device
from utils.checkpoints import BEST, CONFIG, Progress, backbone_metadata
from utils.devices import describe_device, describe_precision, pick_device, pick_precision, set_float32_products
from utils.evaluation.verification import Verifier
from utils.files import write_csv_atomic, write_text_atomic
from utils.interrupts import Stopped, catch_interrupt
from utils.processes import worker_count
from utils.progress import progress_bar, say
from utils.ranks import Ranks, join_ranks
from utils.scripts import end_rank, is_first, is_restarted, readable_errors
from utils.settings import describe, flatten, parse_settings, to_json
from utils.training.best_network import BestNetwork
from utils.training.broken_images import BrokenImages
from utils.training.build_parts import build_head, build_network, build_schedule, describe_rates, unused_here
from utils.training.build_step import build_input, build_step
from utils.training.checkpoint_store import CheckpointStore
from utils.training.ema import WeightAverage
from utils.training.explosions import ExplodedError, ExplosionWatch
from utils.training.flops import forward_flops, quick_matmul_flops_per_s
from utils.training.log import Meter, TrainingLog, import_wandb, step_profiler
from utils.training.metrics import SECONDS_VERIFYING, VERIFIED, VERIFIED_AVERAGE
from utils.training.micro_batch import keep_limit, kept_limit
from utils.training.optimizers import create_optimizer, parameter_groups, train_mode
from utils.training.run_folders import CHECKPOINTS, TrainingError, has_checkpoints, run_folder, saved_settings
from utils.training.run_notes import require_run_notes
from utils.training.run_requests import RunRequests, SignalledError
from utils.training.same_run import check_notes, require_same_settings, set_facts, set_notes, unused_again
from utils.training.sets import open_faces, verification_sets
from utils.training.state import TrainingState
from utils.training.summary import summarise

#: What the progress bar has: tag, name and format. A loss that overflowed has no number.
SHOWN = (("train/loss", "loss", ".3f"), ("train/accuracy", "accuracy", ".1%"))


class Trainer:
    """A run in the folder `run`, on this process; `ranks`: all processes that share it.

    The way of a batch: `train` (the loop), `train_on` (a step), `TrainingStep` (forward, backward, update), the head.
    """

    def __init__(self, config: Config, run: Path, device: torch.device, ranks: Ranks) -> None:
        """Make all that the run needs and that needs no word of other ranks. Nothing is written.

        Raises TrainingError, FaceSetError and the errors of the parts.
        """
        settings = config.train
        self.config, self.run, self.device, self.ranks = config, run, device, ranks
        if settings.wandb and ranks.first:
            import_wandb()
        self.precision = pick_precision(settings.precision, device)
        set_float32_products(settings.precision, device)
        self.workers = worker_count(config.common.workers)

        self.faces = open_faces(config.data)
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
        self.best = BestNetwork(run, self.verifier.sets, config.data.image_size, config.test.mirror, ranks, self.say)
        self.set_notes = set_notes(self.faces)
        order = create_order(config.data.order, self.faces.labels, settings.seed)
        self.batches = EpochBatches(order, len(self.faces), settings.batch_size, ranks.rank, ranks.size)
        self.steps_per_epoch = self.batches.batches
        if self.steps_per_epoch == 0:
            raise TrainingError(
                f"train.batch_size is {settings.batch_size}, but {self.faces.path} has only {len(self.faces)} images"
            )
        self.steps = settings.epochs * self.steps_per_epoch
        self.learning_rates = build_schedule(settings, self.steps_per_epoch)

        self.network = build_network(config, device, with_init=not has_checkpoints(run))
        classes = len(self.faces.identities)
        self.head = build_head(config, classes, self.steps_per_epoch, device, self.precision, ranks)
        flops = forward_flops(self.network, config.data.image_size, training=True)
        self.flops_per_image = 3 * flops  # backward takes twice as many
        groups = parameter_groups(self.network, settings.weight_decay, settings.decay_all, settings.backbone_lr)
        self.optimizer = create_optimizer(settings.optimizer, groups, settings.momentum)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.average = WeightAverage(self.network, settings.ema) if settings.ema else None
        self.state = TrainingState(self.network, self.head, self.optimizer, self.average)

        self.step = 0
        self.verify_due = False  # whether the weights of this step are to be verified
        self.notes_changed = False  # whether the newest checkpoint has other ones
        self.explosions = ExplosionWatch(settings.loss_limit, self.scaler.is_enabled())
        images_per_epoch = self.steps_per_epoch * settings.batch_size // ranks.size
        self.broken = BrokenImages(config.data.broken_limit, images_per_epoch, ranks)

    def train(self) -> None:
        """Train from the newest checkpoint, or from the start, to the end.

        Raises TrainingError when the run cannot go on, Stopped when a signal ended it, with the state saved.
        """
        self.describe()
        self.set_up_step()
        with ExitStack() as stack:
            self.open_run(stack)
            if self.notes_changed:
                self.save(wait=True)
            if self.verify_due or (self.step == 0 and self.config.train.verify_at_start):
                self.verify_or_stop(saved=self.verify_due)
            loader = self.load_faces()
            while self.step < self.steps:  # an epoch, or what is left of it, at a time
                epoch, first_batch = divmod(self.step, self.steps_per_epoch)
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
        """Build the training step and try it, before anything is written: it may show that the settings do not work."""
        settings, ranks = self.config.train, self.ranks
        limit = ranks.least(ranks.together(lambda: kept_limit(self.run) or settings.batch_size))
        self.training_step = build_step(
            self.config, self.network, self.head, self.optimizer, self.scaler, self.precision, self.device, ranks,
            self.say, limit,
        )  # fmt: skip
        self.to_input = build_input(settings, self.device)

    def open_run(self, stack: ExitStack) -> None:
        """Restore the newest checkpoint, and open the log, the profiler and the progress bar, which `stack` closes."""
        settings, ranks = self.config.train, self.ranks
        self.store = stack.enter_context(
            CheckpointStore(self.run / CHECKPOINTS, ranks, settings.checkpoints_kept, say=self.say)
        )
        if not self.restore_newest():
            if ranks.any(has_checkpoints(self.run)):
                raise TrainingError(
                    f"train.resume: {self.run} has no whole checkpoint to go on from; to begin anew, give the run "
                    f"another --name, or remove {CHECKPOINTS} from it"
                )
        elif not settings.resume:
            raise TrainingError(
                f"{self.run} was made by another process meanwhile: name another with --name, or go on with "
                f"--resume {quote(str(self.run))}"
            )
        self.describe_position()
        self.device_flops = ranks.size * quick_matmul_flops_per_s(self.device, self.precision)
        self.log = stack.enter_context(ranks.together(self.open_log))
        self.profiler = stack.enter_context(step_profiler(settings.profile if ranks.first else 0, self.run))
        interrupt = stack.enter_context(catch_interrupt(shared=ranks.size > 1))
        self.requests = RunRequests(interrupt, ranks, settings.checkpoint_minutes)
        size = settings.batch_size
        self.bar = stack.enter_context(
            progress_bar(self.steps * size, "image", initial=self.step * size, smoothing=0.05, disable=not ranks.first)
        )
        self.meter = Meter(self.device)

    def load_faces(self) -> Iterable[Batch]:
        """The batches that `self.batches` lists, decoded."""
        data = self.config.data
        decoded = DecodedFaces(self.faces, self.faces.labels, data.image_size, data.resize, tolerant=True)
        return training_loader(decoded, self.batches, self.workers, self.device, data.decode)

    def train_on(self, batch: Batch) -> None:
        """One optimizer step, and what is due after it."""
        settings, step = self.config.train, self.step
        self.broken.note(batch.broken, len(batch.labels))
        if step not in self.explosions.skipped:
            inputs = self.prepare_inputs(batch.faces)
            if step == 0:
                self.log.inputs(inputs[:64], step)
            # For dropout and the like: the same numbers in a resumed run, others on each rank.
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

    def prepare_inputs(self, faces: torch.Tensor) -> torch.Tensor:
        """The network's input, float [B, 3, H, W], from uint8 [B, H, W, 3]: augmented, mirrored, normalised."""
        seed, (epoch, batch) = self.config.train.seed, divmod(self.step, self.steps_per_epoch)
        rank, ranks = self.ranks.rank, self.ranks.size
        chances = Chances(*(getattr(self.config.data, f"augment_{name}") for name in Chances._fields))
        mirror = flips(seed, epoch, batch, self.config.train.batch_size, rank, ranks)
        faces = augment(faces, chances, seed, epoch, batch, rank, ranks)
        return self.to_input(faces, mirror.to(self.device, non_blocking=True))

    def after_step(self) -> None:
        """Log, save a checkpoint, verify, or stop, as far as that is due."""
        settings, step = self.config.train, self.step
        last = step == self.steps
        verify_now = last or step % (settings.verify_every or self.steps_per_epoch) == 0
        save_now = last or step % (settings.checkpoint_every or self.steps_per_epoch) == 0
        log_now = step % settings.log_every == 0 or verify_now or save_now
        # A signal that comes later is seen by the verification or after the next step.
        asked = self.requests.read(log_now, failing=self.broken.too_many)
        if asked.failing:
            self.broken.refuse()
        if log_now or asked.signal:
            self.log_metrics()
        self.verify_due = verify_now
        save_now = save_now or (log_now and asked.overdue)
        if save_now or asked.signal:
            self.save(wait=asked.signal > 0)
        if asked.signal:
            self.stop(asked.signal)
        if verify_now:
            self.verify_or_stop(saved=save_now)

    def stop(self, signal: int) -> NoReturn:
        """End the run, whose state is saved, because of `signal`."""
        self.store.wait()
        go_on = f"go on with: python train.py --resume {quote(str(self.run))}"
        raise Stopped(f"stopped and saved at step {self.step:,} of {self.steps:,}; {go_on}", 128 + signal)

    def verify_or_stop(self, saved: bool) -> None:
        """Verify. If a signal or an error ends that, the state is saved first, unless it is `saved` already."""
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

    def log_metrics(self) -> None:
        """Log the steps since the last call. Raises ExplodedError, before anything is saved, if the loss exploded."""
        noted = self.meter.read()
        if noted is None:
            return
        if exploded := self.explosions.exploded(noted):
            self.explode(*exploded)
        flops = noted.means["train/images_per_s"] * self.flops_per_image
        rates = {
            "train/lr": float(self.learning_rates[self.step - 1]),
            "train/tflops_per_s": flops / 1e12,
            "train/mfu": flops / self.device_flops,
        }
        self.log.scalars(self.step, {**noted.means, **rates})
        self.log.distributions(self.step, noted.distributions)
        shown = {name: format(noted.means[tag], form) for tag, name, form in SHOWN if tag in noted.means}
        self.bar.set_postfix(shown, refresh=False)

    @property
    def verifies_again(self) -> bool:
        """Whether the weights of this step, which a checkpoint held, are still to be verified on something."""
        return self.verify_due and bool(self.verifier.sets)

    def verify(self) -> None:
        """Verify on every set, log the accuracies, and keep the network, or its average, if it is the best so far."""
        networks = {VERIFIED: self.network}
        if self.average is not None:
            networks[VERIFIED_AVERAGE] = self.average.network
        best, accuracy, began = None, self.best.accuracy, time.perf_counter()
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
        """Write `network`, the best so far. If the disk is full, the next better one is tried, save at the end."""
        try:
            self.best.keep(network, accuracy, self.step, to_json(self.config))
        except OSError as error:
            if self.step >= self.steps:
                raise
            self.say(f"the best network so far could not be written ({error}): the next verification tries again")

    def save(self, wait: bool) -> None:
        """Save a checkpoint: all that the next step depends on."""
        notes = {
            "settings": asdict(self.config),
            **self.best.notes(),
            "verify_due": self.verify_due,
            **self.set_notes,
            "scaler": self.scaler.state_dict(),
            "skipped": sorted(self.explosions.skipped),
            "torch": torch.__version__,
        }
        about = backbone_metadata(to_json(self.config), Progress(self.step, self.best.accuracy))
        state = self.state
        with self.meter.paused():
            self.store.save(self.step, state.whole(), state.rows(), notes, wait, state.backbone(), about)
        self.requests.saved()

    def restore_newest(self) -> bool:
        """Restore the newest undamaged checkpoint. False: there is none."""
        saved = self.store.newest(require_run_notes)
        if saved is None:
            return False
        check_notes(saved.notes, self.config, self.faces, self.run)
        self.state.restore(saved)
        if self.step == 0:
            for line in unused_again(saved.notes, self.config, self.run):
                self.say(line)
        self.step = saved.step
        self.notes_changed = self.best.restore(saved.notes, saved.step)
        self.explosions.skipped |= set(saved.notes["skipped"])
        self.verify_due = saved.notes.get("verify_due", False)
        if saved.notes["scaler"] and self.scaler.is_enabled():  # a run may go on in another precision
            self.scaler.load_state_dict(saved.notes["scaler"])
        return True

    def roll_back(self, error: ExplodedError) -> None:
        """Go back to the last checkpoint that has neither the step of `error` nor the one before it, which may have
        broken the weights, and leave both out, or raise TrainingError."""
        self.store.set_aside_from(error.step)
        if self.config.train.on_explosion == "stop":
            raise error
        if not self.restore_newest():
            every = max(1, min(100, error.step // 2))
            raise TrainingError(
                f"{error}. There is no whole checkpoint to go back to: save more often, --checkpoint-every {every} say"
            )
        self.explosions.leave_out(error)
        self.meter = Meter(self.device)
        self.bar.reset()
        self.bar.update(self.step * self.config.train.batch_size)
        self.log.forget_after(self.step, self.verifies_again)
        without = f"steps {error.step - 1:,} and {error.step:,}"
        if error.step == 0:
            without = "step 0"
        elif self.step == error.step:
            without = f"step {error.step:,}; there is no checkpoint without step {error.step - 1:,}"
        self.say(f"{error}\nback at step {self.step:,}, and on without {without}")
        self.save(wait=True)
        if self.verify_due:
            self.verify_or_stop(saved=True)

    def explode(self, step: int, loss: float, norm: float) -> None:
        """Raise ExplodedError for `step`, and list its images in a file."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        size = self.config.train.batch_size
        positions = self.batches.order(epoch)[batch * size : (batch + 1) * size]
        listed = self.run / f"exploded-step-{step}.txt"
        if self.ranks.first:
            write_text_atomic(listed, "".join(f"{self.faces.describe(int(i))}\n" for i in positions))
        advise_skipping = self.config.train.on_explosion == "stop"
        limit = self.config.train.loss_limit
        raise ExplodedError(step, loss, norm, limit, float(self.learning_rates[step]), listed, advise_skipping)

    def limit_passes(self, error: torch.OutOfMemoryError, faces: int) -> None:
        """Note that the run, when it is started again, is to take smaller passes, if that helps.

        A process that trains alone does so in the step itself. One of several cannot: the others wait for it.
        """
        smaller = self.training_step.half_a_pass(faces)
        special = bool(getattr(error, "__notes__", []))  # smaller passes are not what it wants
        if self.ranks.size > 1 and self.config.train.micro_batch == "auto" and smaller and not special:
            keep_limit(self.run, smaller)
            again = f"start it again with --resume auto --name {quote(self.run.name)}"
            error.add_note(f"Passes have {smaller} faces from now on: {again}")

    def describe(self) -> None:
        """Print what will be trained, on what, and where."""
        tests = ", ".join(pairs.name for pairs in self.verifier.sets)
        why_not = "data.verification" if self.config.data.verification else "no .bin found"
        on = describe_device(self.device) + (f" x {self.ranks.size}" if self.ranks.size > 1 else "")
        left = len(self.faces) - self.steps_per_epoch * self.config.train.batch_size
        waiting = f"; {left:,} images, others each time, do not fill a batch and wait" if left else ""
        for line in (
            f"{self.faces.path}: {len(self.faces):,} images of {len(self.faces.identities):,} identities",
            f"{self.steps_per_epoch:,} steps an epoch{waiting}",
            f"verified on: {tests or f'nothing ({why_not}): the last model is kept'}",
            f"{on}, {describe_precision(self.precision, self.device)}, {self.workers} workers, {self.steps:,} steps",
            describe_rates(self.config.train, self.network),
            *unused_here(self.config, self.device, self.ranks, self.head),
        ):
            self.say(line)

    def describe_position(self) -> None:
        """Print at which step the run begins or goes on."""
        where = f"run: {self.run}" + (f", from step {self.step:,}" if self.step else "")
        if (self.run / CONFIG).exists() and not has_checkpoints(self.run):
            where += ", which has no checkpoint yet: from the start"
        self.say(where)
        if self.step >= self.steps:
            self.say(f"nothing is left to train: {self.steps:,} steps are all (train.epochs)")

    def open_log(self) -> TrainingLog:
        """Write the run's settings and classes, and open its log."""
        if self.ranks.first:
            write_text_atomic(self.run / CONFIG, to_json(self.config))
            write_csv_atomic(self.run / "classes.csv", ("class", "identity"), enumerate(self.faces.identities))
        again = self.verifies_again or self.step == 0  # what a first try left, which had no checkpoint
        wandb, settings = self.config.train.wandb, flatten(self.config)
        return TrainingLog(self.run, self.step, wandb, self.ranks.first, self.say, again, settings)

    def say(self, line: str) -> None:
        """Print a line, on the first rank only."""
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


def _advice_on_memory(smallest: bool) -> str:
    """What to do when memory ran out; `smallest`: passes are as small as they can be already."""
    if not smallest:
        return "Lower train.micro_batch, or train.batch_size"
    return "Lower train.batch_size, or let the classes take less: more cards, or data.min_images (docs/losses.md)"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("train", "the last checkpoint is kept"):
        config = parse_settings(
            Config, PRESETS, ("train", "common"), __doc__, argv, saved_settings, reads=READS["train"]
        )
        if is_first() and not is_restarted():
            print(describe(config, READS["train"]))
        try:
            run = train(config)
        except torch.OutOfMemoryError as error:
            advice, *_ = getattr(error, "__notes__", [_advice_on_memory(config.train.micro_batch == "auto")])
            raise TrainingError(f"{str(error).split('. ')[0]}. {advice}") from None
    if is_first():
        print(f"done: {run / BEST}; test it with: python all_pair_test.py --model {quote(str(run))}")


if __name__ == "__main__":
    main()
    end_rank()
