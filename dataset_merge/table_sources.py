"""`merge.sets.json`, beside `merge.csv`: of which sets, cleaned how, that table was made.

Names and counts alone do not tell: those of prepared sets are the numbers from 0 on in each of them, so that a table
that is applied to the sets in another order would join strangers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from config import MergeConfig
from data.face_sets import FaceSet
from data.images_fingerprint import images_fingerprint, joined_digest
from dataset_merge.decisions import DecisionsError
from utils.files import write_text_atomic

SETS_JSON = "merge.sets.json"


def describe_sources(merge: MergeConfig, sets: Sequence[FaceSet]) -> dict[str, Any]:
    """What a table of a merge of `sets`, as they lie on the disk, is made of."""
    described = [
        {
            "path": str(faces.path),
            "images": images_fingerprint(faces),
            "labels": joined_digest(
                faces.labels, [name.encode(errors="surrogateescape").hex() for name in faces.identities]
            ),
        }
        for faces in sets
    ]
    return {"sets": described, "cleaning": _cleaning(merge)}


def write_sources(folder: Path, merge: MergeConfig, sets: Sequence[FaceSet]) -> None:
    """Write `merge.sets.json` into the `folder` of a table."""
    write_text_atomic(folder / SETS_JSON, json.dumps(describe_sources(merge, sets), indent=1) + "\n")


def check_sources(table: Path, merge: MergeConfig, sets: Sequence[FaceSet]) -> str | None:
    """Raise DecisionsError unless the `table` was made of these sets, in this order, cleaned in this way. Returns what
    to say where nothing beside the table tells.
    """
    path = table.with_name(SETS_JSON)
    if not path.exists():
        return (
            f"{path} is not there, so that only names and numbers of images tell whether {table.name} is of these sets "
            "in this order: look at the report"
        )
    try:
        made = json.loads(path.read_text())
        before = [(_text(known["images"]), _text(known["labels"])) for known in made["sets"]]
        cleaning, paths = made["cleaning"], [_text(known["path"]) for known in made["sets"]]
        made_with = _flags(cleaning)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DecisionsError(f"{path} is damaged ({error!r}): take it from the folder of the merge again") from None
    now = [(known["images"], known["labels"]) for known in describe_sources(merge, sets)["sets"]]
    if now != before:
        if sorted(now) == sorted(before):
            order = ",".join(str(merge.sets[now.index(key)]) for key in before)
            raise DecisionsError(f"{table} was made of these sets in another order: give --merge {quote(order)}")
        if len(now) != len(before):
            raise DecisionsError(f"{table} was made of {len(before)} sets, {', '.join(paths)}: give these to --merge")
        number = next(i for i in range(len(now)) if now[i] != before[i])
        what = "images" if now[number][0] != before[number][0] else "labels"
        raise DecisionsError(
            f"{table} was made of other {what} than those of set {number} ({sets[number].path}; then "
            f"{paths[number]}): give the sets that it was made of. If only the files' times have changed, remove "
            f"{path}"
        )
    if cleaning != _cleaning(merge):
        raise DecisionsError(f"{table} was made with {made_with}, not with {_flags(_cleaning(merge))}")
    return None


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"{found!r:.60} is no text")
    return found


def _cleaning(merge: MergeConfig) -> dict[str, float] | None:
    """How identities were changed before they were compared; None: not at all."""
    return {"outlier": merge.clean_outlier, "mixed": merge.clean_mixed} if merge.clean == "apply" else None


def _flags(cleaning: dict[str, float] | None) -> str:
    if cleaning is None:
        return "uncleaned sets (no --clean apply)"
    return "--clean apply " + " ".join(f"--clean-{name} {value:g}" for name, value in cleaning.items())
