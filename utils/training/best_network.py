"""The best network of a run so far, by its mean accuracy on the verification sets."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.verification_bin import VerificationPairs
from utils.checkpoints import BEST, Progress, save_backbone
from utils.files import atomic_path
from utils.ranks import Ranks
from utils.training.run_folders import TrainingError
from utils.training.same_run import describe_pairs


class BestNetwork:
    """`accuracy`: the mean of the best network so far on all sets, 0..1; 0 where nothing is verified.

    Another set, size of face or use of the mirror image makes accuracies that cannot be compared.
    """

    def __init__(
        self,
        run: Path,
        sets: Sequence[VerificationPairs],
        image_size: int,
        mirror: bool,
        ranks: Ranks,
        say: Callable[[str], object],
    ) -> None:
        self.accuracy = 0.0
        self._file, self._ranks, self._say = run / BEST, ranks, say
        described = {one.name: describe_pairs(one) for one in sets}
        self._measured = {"sets": described, "image_size": image_size, "mirror": mirror}

    def notes(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best_accuracy": self.accuracy, "best_measured": self._measured}

    def restore(self, notes: Mapping[str, Any], step: int) -> bool:
        """Go on from the `notes` of a checkpoint of `step`; returns whether they do not hold any more.

        Where the file is gone, or was the best on other sets, the next network that is verified is the best; such a
        file is kept under another name.
        """
        self.accuracy = notes["best_accuracy"]
        if not self.accuracy:
            return False
        # Checkpoints of older versions do not say on what it was measured.
        others = notes.get("best_measured", self._measured) != self._measured
        there = self._ranks.any(self._ranks.first and self._file.exists())
        if there and not others:
            return False
        self.accuracy = 0.0
        if not there:
            self._say(f"{self._file} is gone: the next network that is verified becomes the best")
            return True
        self._say(
            f"{self._file} was chosen on {_named(notes['best_measured'])}, now it is {_named(self._measured)}: the "
            f"next network that is verified becomes the best{self._put_aside(step)}"
        )
        return True

    def _put_aside(self, step: int) -> str:
        """Copy the file to another name; returns what to say of it."""
        kept = self._file.with_name(f"best-until-step-{step}{self._file.suffix}")
        try:
            if self._ranks.first and not kept.exists():
                with atomic_path(kept) as temporary:
                    shutil.copyfile(self._file, temporary)
        except OSError as error:
            return f"; that of before could not be kept ({error})"
        return f"; that of before is kept as {kept.name}"

    def keep(self, network: nn.Module, accuracy: float, step: int, settings: str) -> None:
        """Write `network`, the best so far, at `step` of the run with these `settings` (JSON).

        Raises OSError when the disk is full, say, and TrainingError for weights that are not finite.
        """
        weights = [value for value in network.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in weights]).all():
            raise TrainingError(
                f"step {step:,}: weights of the network are no numbers any more: lower train.lr, and go on from an "
                "earlier checkpoint, or begin anew"
            )
        if self._ranks.first:
            save_backbone(self._file, network, settings, Progress(step, accuracy))
        self.accuracy = accuracy


def _named(measured: Mapping[str, Any]) -> str:
    """On what an accuracy was measured, for people."""
    sets = ", ".join(f"{name} ({what})" for name, what in measured["sets"].items()) or "nothing"
    mirror = "with" if measured["mirror"] else "without"
    return f"{sets} at {measured['image_size']} pixels {mirror} the mirror image"
