"""Whether a checkpoint is whole, each rank reading a part of it."""

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from utils.checkpoints import CheckpointError
from utils.files import SEEN_WITHIN, seen
from utils.ranks import Ranks
from utils.training.saved_checkpoints import DamagedError, MissingError, Saved


class _Problem(NamedTuple):
    """What a rank on `host` found wrong with a checkpoint; `text` is empty if nothing. `missing`: the name of the file
    that it does not see, if that is what is wrong; `unclear`: whether the checkpoint may be whole."""

    text: str = ""
    missing: str = ""
    unclear: bool = False
    host: str = ""


def checked_by_all(path: Path, ranks: Ranks, require: Callable[[Saved], object]) -> tuple[Saved | None, list[str]]:
    """The checkpoint at `path`, of which each rank checks some of the files, and the damage that is found on any rank,
    that which `require` raises included.

    Raises CheckpointError, on all ranks, where one cannot tell. What one rank sees and another does not, that one waits
    for, as other machines see files late.
    """
    saved, problem = _checked(path, ranks, require)
    for waited in (False, True):
        found = [_Problem(*json.loads(text)) for text in ranks.texts(json.dumps(problem))]
        seen_by = _seen_by(path, {one.missing for one in found if one.missing}, ranks)
        if waited or not seen_by:
            break
        if problem.missing in seen_by:
            seen(partial(_there, path / problem.missing), path, SEEN_WITHIN)
            saved, problem = _checked(path, ranks, require)
    for rank, one in enumerate(found):
        if one.unclear or one.missing in seen_by:
            where = f" by process {rank} ({one.host})" if ranks.size > 1 else ""
            reason = one.text if one.unclear else f"{one.text}, though process {seen_by[one.missing]} sees it"
            raise CheckpointError(
                f"{path} could not be checked{where}, and is left as it is: {reason}. Mend that, or remove the "
                "checkpoint, to go on from the one before"
            )
    return saved, list(dict.fromkeys(one.text for one in found if one.text))


def _seen_by(path: Path, names: set[str], ranks: Ranks) -> dict[str, int]:
    """Of the files of these names that some rank sees in its folder `path`, the first rank that does."""
    here = [name for name in sorted(names) if _there(path / name)]
    by_rank = [json.loads(text) for text in ranks.texts(json.dumps(here))]
    return {name: rank for rank, its in reversed([*enumerate(by_rank)]) for name in its}


def _there(file: Path) -> Path | None:
    with suppress(OSError):  # a server that is away
        return file if file.exists() else None
    return None


def _checked(path: Path, ranks: Ranks, require: Callable[[Saved], object]) -> tuple[Saved | None, _Problem]:
    """The checkpoint, if its manifest and this rank's part of its files are undamaged; what is wrong with them."""
    host = socket.gethostname()
    try:
        saved = Saved(path)
        require(saved)
        saved.check(saved.files[ranks.rank :: ranks.size])
    except MissingError as error:
        return None, _Problem(str(error), missing=error.path.name, host=host)
    except DamagedError as error:
        return None, _Problem(str(error), host=host)
    except CheckpointError as error:
        return None, _Problem(str(error), unclear=True, host=host)
    return saved, _Problem()
