"""The folder of a run, new or to be resumed, and its settings."""

import os
import warnings
from datetime import datetime
from pathlib import Path
from shlex import quote

from config import Config
from utils.checkpoints import CONFIG, settings_beside
from utils.settings import ConfigError, Settings, by_name
from utils.training.run_notes import require_run_notes
from utils.training.saved_checkpoints import DamagedError, Saved, checkpoint_folders

CHECKPOINTS = "checkpoints"


class TrainingError(ValueError):
    """The run cannot start or go on; the message says why and what to do."""


def run_folder(config: Config) -> Path:
    """The folder of a new run, or of the one to resume. A run that has no checkpoint yet may be started again."""
    run = _run_folder(config)
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and not config.train.resume:
        warnings.warn(
            "torchrun --max-restarts starts the same command again, which will not go on with this run: say "
            "--resume auto --name NAME",
            stacklevel=2,
        )
    try:
        str(run.resolve()).encode()
    except UnicodeEncodeError:
        raise TrainingError(
            f"{run.resolve()} is no UTF-8, so that its .safetensors could not be read: rename it"
        ) from None
    return run


def _run_folder(config: Config) -> Path:
    settings = config.train
    if settings.resume not in ("", "auto"):
        run = Path(settings.resume)
        if not has_checkpoints(run):
            again = f"; start it again with --name {quote(run.name)}" if _begun(run) else ""
            raise TrainingError(f"train.resume: {run} has no {CHECKPOINTS} to go on from{again}")
        return run
    if settings.resume == "auto" and not settings.name:
        raise TrainingError("train.resume: auto goes on with the run called train.name: name it with --name")
    if not settings.name:
        return _new_folder(Path(config.common.runs), f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.network}")
    run = Path(config.common.runs, settings.name)
    if settings.resume == "auto" or not run.exists():
        return run
    if has_checkpoints(run):
        raise TrainingError(
            f"{run} exists: name another with --name, go on with --resume {quote(str(run))}, or remove it"
        )
    if not _begun(run):
        raise TrainingError(f"{run} exists: name another with --name, or remove it")
    return run


def _new_folder(runs: Path, name: str) -> Path:
    """A new, empty folder `name`, or `name-2` and so on: several runs may start in the same second."""
    run, number = runs / name, 1
    run.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            run.mkdir()
            return run
        except FileExistsError:
            number += 1
            run = runs / f"{name}-{number}"


def has_checkpoints(run: Path) -> bool:
    """Whether a run has checkpoints, damaged ones included."""
    folder = run / CHECKPOINTS
    return any(path for kind in ("step-*", "damaged-*") for path in folder.glob(kind))


def _begun(run: Path) -> bool:
    """Whether a training made the folder."""
    return (run / CONFIG).exists() or (run / CHECKPOINTS).is_dir()


def _to_resume(resume: str, runs: str, name: str) -> Path | None:
    """The run that train.resume means, whether it is there or not; None: none is named."""
    if resume == "auto":
        return Path(runs, name) if name else None
    return Path(resume) if resume else None


def goes_on(config: Config) -> bool:
    """Whether the run to go on with, if one is asked for, is there."""
    run = _to_resume(config.train.resume, config.common.runs, config.train.name)
    return run is not None and has_checkpoints(run)


def saved_settings(settings: Settings) -> Settings:
    """The settings of the run to resume, {} if there is none: those of its config.json, or, with a warning, if that is
    lost those of its newest checkpoint. Raises TrainingError when no checkpoint has them either.
    """
    resume = settings["train.resume"]
    run = _to_resume(resume, settings["common.runs"], settings["train.name"])
    if run is None:
        return {}
    try:
        saved, lost = settings_beside(run), f"{run / CONFIG} has no settings of a run"
    except ConfigError as error:
        if not has_checkpoints(run):
            raise
        saved, lost = {}, str(error).split(";")[0]
    if not saved and has_checkpoints(run):
        saved = _noted_settings(run, lost)
    return {**saved, "train.resume": resume} if saved else {}


def _noted_settings(run: Path, lost: str) -> Settings:
    """The settings in the newest undamaged checkpoint."""
    for checkpoint in reversed(checkpoint_folders(run / CHECKPOINTS)):
        try:
            saved = Saved(checkpoint)
            require_run_notes(saved)
        except DamagedError:
            continue
        warnings.warn(f"{lost}: its settings are those of {checkpoint}", stacklevel=2)
        return by_name(saved.notes["settings"])
    raise TrainingError(f"train.resume: {lost}, and no whole checkpoint has them")
