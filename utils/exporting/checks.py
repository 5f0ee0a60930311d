"""Whether what files say of a model is of the kinds that its metadata and its card need."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from config import DataConfig, LossConfig, TrainConfig
from utils.checkpoints import CheckpointError
from utils.settings import ConfigError, check_type, require

# Settings that are computed with, or are taken apart; all others are shown as they are, whatever they are.
_USED: dict[str, tuple[type, set[str]]] = {
    "data": (DataConfig, {"root", "verification"}),
    "loss": (LossConfig, set(get_type_hints(LossConfig))),
    "train": (TrainConfig, {"name", "init", "lr", "optimizer", "batch_size"}),
}


def require_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Raise CheckpointError, naming `file`, for settings of a run that are not of their kinds. Words may be of a later
    version: a loss that is not known here, say.
    """
    try:
        for section, (kind, used) in _USED.items():
            values = settings.get(section, {})
            require(isinstance(values, dict), section, f"must have settings by name, got {values!r}")
            hints = get_type_hints(kind)
            for name in sorted(used & values.keys()):
                value = tuple(values[name]) if isinstance(values[name], list) else values[name]
                check_type(value, str if get_origin(hints[name]) is Literal else hints[name], f"{section}.{name}")
        loss, train = settings.get("loss", {}), settings.get("train", {})
        require(not loss or "name" in loss, "loss.name", "is not there")
        require(train.get("batch_size", 1) > 0, "train.batch_size", "must be above 0")
    except ConfigError as error:
        raise CheckpointError(f"{file}: in its settings, {str(error)[:300]}") from None


def require_results(found: Mapping[str, Any]) -> None:
    """Raise ValueError, TypeError or AttributeError unless it has the numbers of sets, as `results.json` has them."""
    for name, result in found.get("sets", {}).items():
        points = result.get("points", [])
        numbers = [result[key] for key in ("accuracy", "std", "eer", "auc") if key in result]
        numbers += [point.get(key) for point in points for key in ("far", "tar")]
        numbers += [end for point in points for end in point.get("interval") or ()]
        if not all(type(number) in (int, float) and 0 <= round(number, 9) <= 1 for number in numbers):
            raise ValueError(f"of {name[:60]!r} it has what is no number from 0 to 1")
