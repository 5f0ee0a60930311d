"""The end of a run, or of an attempt at some steps, whose loss exploded."""

from pathlib import Path

from utils.training.run_folders import TrainingError


class ExplodedError(TrainingError):
    """The loss of `step` is not a number, or above its limit.

    `lr`: the learning rate of the step; `norm`: that of its gradient; `listed`: the file in the run's folder that names
    its images; `advise_skipping`: whether leaving out such batches is worth a word.
    """

    def __init__(self, step: int, loss: float, norm: float, lr: float, listed: Path, advise_skipping: bool) -> None:
        super().__init__(
            f"the loss became {loss} at step {step:,} (learning rate {lr:.3g}, gradient norm {norm:.3g}; its images "
            f"are listed in {listed}); what {listed.parent} holds of earlier steps is kept. Lower train.lr, raise "
            "train.warmup_epochs, or lower loss.scale"
            + (", or leave such batches out: --on-explosion skip" if advise_skipping else "")
        )
        self.step = step
