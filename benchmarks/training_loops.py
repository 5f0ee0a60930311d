"""The training loops that the benchmarks time: ours, and the one that other trainers have."""

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, ModelConfig, TrainConfig
from data.face_sets import open_face_set
from data.loading import Batch, DecodedFaces, EpochBatches, flips, training_loader
from data.prefetch import on_device
from models import create_network
from utils.devices import pick_precision, set_float32_products
from utils.processes import worker_count
from utils.ranks import Ranks
from utils.training.build_parts import build_head, build_network
from utils.training.build_step import build_input, build_step
from utils.training.optimizers import create_optimizer, parameter_groups

SIZE = 112  # pixels
IN_MEMORY = 4  # batches of random faces, used in turn
LR = 0.01


@dataclass(frozen=True)
class Case:
    """What a process measures: `side` is ours or peer."""

    side: str
    network: str
    batch_size: int
    classes: int
    steps: int
    faces: Path
    cuda_graph: bool = False

    @property
    def untimed(self) -> int:
        """Steps ahead of those that are timed."""
        return -(-self.steps // 4)

    @property
    def batches(self) -> int:
        """Batches of a turn."""
        return self.untimed + self.steps


class OurLoop:
    """The trainer's step, made as train.py makes it; see Trainer.prepare_inputs there for its inputs."""

    def __init__(self, case: Case, device: torch.device) -> None:
        settings = TrainConfig(batch_size=case.batch_size, cuda_graph=case.cuda_graph)
        config = Config(model=ModelConfig(network=case.network), train=settings)
        self.notes: list[str] = []  # what the step says: that it is not compiled, or takes several passes
        precision, ranks = pick_precision("auto", device), Ranks()
        set_float32_products(settings.precision, device)
        self.network = build_network(config, device)
        head = build_head(config, case.classes, steps_per_epoch=1, device=device, precision=precision, ranks=ranks)
        groups = parameter_groups(self.network, settings.weight_decay)
        optimizer = create_optimizer(settings.optimizer, groups, settings.momentum)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        began = time.perf_counter()
        self._step = build_step(config, self.network, head, optimizer, scaler, precision, device, ranks, self._note)
        self._to_input = build_input(settings, device)
        say_aside(f"{case.network}, ours: step built in {time.perf_counter() - began:.1f} s")
        self._device, self._steps = device, 0

    def _note(self, line: str) -> None:
        self.notes.append(line)
        say_aside(line)

    def __call__(self, batch: Batch) -> None:
        step, faces = self._steps, batch.faces
        mirror = flips(0, 0, step, len(faces))
        inputs = self._to_input(faces, mirror.to(self._device, non_blocking=True))
        torch.manual_seed(step)
        self._step(inputs, batch.labels, step, LR)
        self._steps += 1

    def in_memory(self, case: Case) -> Iterator[Batch]:
        """Batches of random faces, as they come from `on_device`."""
        shape = (case.batch_size, SIZE, SIZE, 3)
        return in_turn(lambda: torch.randint(0, 256, shape, dtype=torch.uint8), case, self._device)

    def from_jpegs(self, case: Case) -> Callable[[], Iterator[Batch]]:
        """Starts the next pass over the face set, a turn's batches of it, loaded as training does."""
        images = open_face_set(case.faces)
        if len(images.identities) > case.classes:
            raise ValueError(f"{case.faces} has {len(images.identities)} identities: raise --classes to that at least")
        number = case.batch_size * case.batches

        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng(epoch).permutation(max(number, len(images))) % len(images)

        batches = EpochBatches(order, number, case.batch_size)
        decoded = DecodedFaces(images, images.labels, SIZE)
        loader = training_loader(decoded, batches, worker_count(-1), self._device)
        return lambda: on_device(loader, self._device)


class PlainLoop:
    """The step as other trainers write it.

    NCHW, eager; float16 autocast with a gradient scaler on CUDA, where cuDNN looks for its fastest convolutions,
    float32 on the CPU; a float32 head over all classes with its margin outside of autograd; torch.optim.SGD as it
    comes; the loss read in every step.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.network = create_network(case.network, 512, SIZE).to(device).train()
        self.centres = nn.Parameter(torch.normal(0, 0.01, (case.classes, 512), device=device))
        parameters = [*self.network.parameters(), self.centres]
        self.optimizer = torch.optim.SGD(parameters, LR, momentum=0.9, weight_decay=5e-4)
        self.device, self.half = device, device.type == "cuda"
        self.notes: list[str] = []
        torch.backends.cudnn.benchmark = True
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)
        self.loss = 0.0

    def __call__(self, batch: Batch) -> None:
        inputs, labels = batch.faces, batch.labels
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            embeddings = self.network(inputs)
        cosine = F.linear(F.normalize(embeddings.float()), F.normalize(self.centres)).clamp(-1, 1)
        rows = torch.arange(len(labels), device=self.device)
        with torch.no_grad():
            cosine[rows, labels] = torch.cos(cosine[rows, labels].acos() + 0.5)
        loss = F.cross_entropy(64 * cosine, labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), 5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.loss = loss.item()

    def in_memory(self, case: Case) -> Iterator[Batch]:
        """Batches of random faces, float32 [B, 3, 112, 112] in [-1, 1], as they come from `on_device`."""
        shape = (case.batch_size, 3, SIZE, SIZE)
        return in_turn(lambda: torch.rand(shape).mul_(2).sub_(1), case, self.device)


def in_turn(draw: Callable[[], Tensor], case: Case, device: torch.device) -> Iterator[Batch]:
    """A turn's batches on `device`, a few of faces that `draw` gives used over and over."""
    batches = []
    for _ in range(IN_MEMORY):
        faces, labels = draw(), torch.randint(0, case.classes, (case.batch_size,))
        pinned = (faces.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (faces, labels)
        batches.append(Batch(*pinned, []))
    return on_device(itertools.islice(itertools.cycle(batches), case.batches), device)


def turn(
    step: Callable[[Batch], None], batches: Iterable[Batch], case: Case, device: torch.device
) -> tuple[float, float]:
    """Images/s, and seconds that a step waits for its batch, of the steps that are timed."""
    source = iter(batches)
    batch: Batch | None = next(source)
    for _ in range(case.untimed):
        assert batch is not None
        step(batch)
        batch = next(source)
    steps, waited = 0, 0.0
    synchronise(device)
    began = time.perf_counter()
    while batch is not None:
        step(batch)
        steps += 1
        asked = time.perf_counter()
        batch = next(source, None)
        waited += time.perf_counter() - asked
    synchronise(device)
    return steps * case.batch_size / (time.perf_counter() - began), waited / steps


def say_aside(line: str) -> None:
    """A line for who watches, not for the table."""
    print(line, file=sys.stderr, flush=True)


def synchronise(device: torch.device) -> None:
    """Wait for a card."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
