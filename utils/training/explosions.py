"""Steps whose loss explodes: detected before a checkpoint is saved, and left out where that helps."""

import math
from pathlib import Path

from utils.training.log import Noted
from utils.training.run_folders import TrainingError

#: So many steps may be left out among so many. If there are more, the batches are not to blame.
MOST_SKIPPED, SKIPPED_AMONG = 20, 1000

#: Steps in a row that may overflow in float16 while the gradient scaler lowers its scale.
MOST_OVERFLOWS = 20


class ExplodedError(TrainingError):
    """The loss of `step` is not a number, or above its limit.

    `limit`: that of the loss; `lr`: the learning rate of the step; `norm`: its gradient norm; `listed`: the file in the
    run's folder that lists its images; `advise_skipping`: whether to suggest --on-explosion skip.
    """

    def __init__(
        self, step: int, loss: float, norm: float, limit: float, lr: float, listed: Path, advise_skipping: bool
    ) -> None:
        beyond = f", the limit being {limit:g} (train.loss_limit)" if limit < loss < math.inf else ""
        super().__init__(
            f"the loss became {loss} at step {step:,} (learning rate {lr:.3g}, gradient norm {norm:.3g}; its images "
            f"are listed in {listed}){beyond}; what {listed.parent} holds of earlier steps is kept. Lower train.lr, "
            "raise train.warmup_epochs, or lower loss.scale"
            + (", or leave such batches out: --on-explosion skip" if advise_skipping else "")
        )
        self.step = step


class ExplosionWatch:
    """Watches the losses and gradient norms of a run. `skipped`: the steps to leave out.

    `loss_limit`: above it a loss has exploded. `overflows`: whether there is a gradient scaler, which skips steps whose
    gradients are not finite, and lowers its scale: some of those in a row are no explosion.
    """

    def __init__(self, loss_limit: float, overflows: bool) -> None:
        self.skipped: set[int] = set()
        self._limit, self._overflows, self._bad_in_a_row = loss_limit, overflows, 0

    def exploded(self, noted: Noted) -> tuple[int, float, float] | None:
        """The first step of `noted` that exploded, its loss and gradient norm; None: there is none."""
        for step, loss, norm in zip(noted.steps, noted.losses, noted.gradient_norms, strict=True):
            good = loss <= self._limit and math.isfinite(norm)
            self._bad_in_a_row = 0 if good else self._bad_in_a_row + 1
            skipped = self._overflows and not math.isfinite(norm)
            if not good and (not skipped or self._bad_in_a_row > MOST_OVERFLOWS):
                return step, loss, norm
        return None

    def leave_out(self, error: ExplodedError) -> None:
        """Skip the step of `error` and the one before, if any. Raises TrainingError when there were too many lately."""
        # The loss of a step is that of the weights before it: the step before may be the one that broke them.
        self.skipped |= {max(0, error.step - 1), error.step}
        self._bad_in_a_row = 0  # the run goes on from before them
        lately = sum(error.step - SKIPPED_AMONG < step <= error.step for step in self.skipped)
        if lately > MOST_SKIPPED:
            raise TrainingError(f"{error}. {lately} of the last {SKIPPED_AMONG:,} steps exploded or led to it")
