"""Whether a checkpoint is whole, each rank reading a part of it."""

import json
import socket
from functools import partial
from pathlib import Path
from typing import NamedTuple

from utils.checkpoints import CheckpointError
from utils.files import SEEN_WITHIN, seen
from utils.ranks import Ranks
from utils.training.saved_checkpoints import DamagedError, MissingError, Saved


class _Problem(NamedTuple):
    """What a rank on `host` found wrong with a checkpoint; `text` is empty if nothing. `missing`: the file that it does
    not see, if that is what is wrong; `unclear`: whether the checkpoint may be whole."""

    text: str = ""
    missing: str = ""
    unclear: bool = False
    host: str = ""


def checked_by_all(path: Path, ranks: Ranks) -> tuple[Saved | None, list[str]]:
    """The checkpoint at `path`, of which each rank checks some of the files, and the damage that is found on any rank.

    Raises CheckpointError, on all ranks, where one cannot tell. What the first rank sees and another does not, it
    waits for, as other machines see files late.
    """
    saved, problem = _checked(path, ranks)
    for waited in (False, True):
        found = [_Problem(*json.loads(text)) for text in ranks.texts(json.dumps(problem))]
        late = [bool(one.missing) and Path(one.missing).exists() for one in found] if ranks.first else []
        late = json.loads(ranks.agree(json.dumps(late)))
        if waited or not any(late):
            break
        if late[ranks.rank]:
            seen(partial(_there, Path(problem.missing)), path, SEEN_WITHIN)
            saved, problem = _checked(path, ranks)
    for rank, (one, is_late) in enumerate(zip(found, late, strict=True)):
        if is_late or one.unclear:
            where = f" by process {rank} ({one.host})" if ranks.size > 1 else ""
            reason = f"{one.text}, though the first process sees it" if is_late else one.text
            raise CheckpointError(
                f"{path} could not be checked{where}, and is left as it is: {reason}. Mend that, or remove the "
                "checkpoint, to go on from the one before"
            )
    return saved, list(dict.fromkeys(one.text for one in found if one.text))


def _there(file: Path) -> Path | None:
    return file if file.exists() else None


def _checked(path: Path, ranks: Ranks) -> tuple[Saved | None, _Problem]:
    """The checkpoint, if its manifest and this rank's part of its files are undamaged; what is wrong with them."""
    host = socket.gethostname()
    try:
        saved = Saved(path)
        saved.check(saved.files[ranks.rank :: ranks.size])
    except MissingError as error:
        return None, _Problem(str(error), missing=str(error.path), host=host)
    except DamagedError as error:
        return None, _Problem(str(error), host=host)
    except CheckpointError as error:
        return None, _Problem(str(error), unclear=True, host=host)
    return saved, _Problem()
