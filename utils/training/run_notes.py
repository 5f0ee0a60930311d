"""What the notes of a run's checkpoint have to be, so that all who read them can rely on it."""

import sys
from collections.abc import Callable
from typing import Any

from utils.training.saved_checkpoints import BACKBONE, MANIFEST, DamagedError, Saved


def require_run_notes(saved: Saved) -> None:
    """Raise DamagedError unless `saved` has a network, and the notes of a run of this version or an older one."""
    if BACKBONE not in saved.files:
        raise DamagedError(f"{saved.folder / MANIFEST} has no {BACKBONE}")
    for name, good in _NOTES.items():
        if name not in saved.notes and name in _LATER:
            continue
        if not good(saved.notes.get(name)):
            raise DamagedError(f"{saved.folder / MANIFEST} has no {name!r} of a run in its notes")


def _is_count(found: Any) -> bool:
    return type(found) is int and found >= 0


def _is_number(found: Any, most: float) -> bool:
    return type(found) in (int, float) and 0 <= found <= most


def _are_settings(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(section, dict) for section in found.values())


def _is_measured(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("sets"), dict) and {"image_size", "mirror"} <= found.keys()


def _is_scaler(found: Any) -> bool:
    """Whether it is the state of a gradient scaler, which has none where it has nothing to do."""
    names = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    return isinstance(found, dict) and (
        not found or (names <= found.keys() and all(_is_number(found[name], sys.float_info.max) for name in names))
    )


_NOTES: dict[str, Callable[[Any], bool]] = {
    "settings": _are_settings,
    "best_accuracy": lambda found: _is_number(found, 1),
    "best_measured": _is_measured,
    "verify_due": lambda found: isinstance(found, bool),
    "images": _is_count,
    "labels": _is_count,
    "identities": _is_count,
    "scaler": _is_scaler,
    "skipped": lambda found: isinstance(found, list) and all(map(_is_count, found)),
}

# What older versions did not note.
_LATER = {"best_measured", "verify_due", "images", "labels"}
