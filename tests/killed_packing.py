"""A program that packs a set in child processes which kill themselves at chosen file operations; for test_pack_kills.

    python tests/killed_packing.py '{"source": ..., "fit": {...}, "runs": [{"output": "a", "kill_at": 9}, ...]}'

Each run is a fork of this process, so that nothing is imported again. It ends by SIGKILL at file operation `kill_at` of
those on the unfinished set, or meets a full disk when a file grows over `largest_file` bytes. For each run it prints
as JSON `status` (negative: the signal), `operations` counted, images `taken_over`, and what is `left` in the
folder of the output.
"""

import itertools
import json
import os
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PackConfig
from data import fitting, resumable_set
from data.fitting import Fit
from data.pack_set import pack, select
from data.set_sources import open_source

OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}
IMAGES_BETWEEN_SAVES = 3
# Bytes of a number in the report of a run: operations, then images taken over.
WIDTH = 16


def count_operations(kill_at: int, report: int) -> None:
    """From here on die at operation `kill_at`; the number of those so far is written to the descriptor `report`."""
    number = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal number
        if event in OPERATIONS and ".partial" in str(arguments[0]):
            number += 1
            os.pwrite(report, b"%d" % number, 0)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_once(source: str, fit: Fit, output: Path, report: int, kill_at: int = 0, largest_file: int = 0) -> None:
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    count_operations(kill_at, report)
    faces = open_source(source)
    packed = pack(faces, select(faces, PackConfig()), output, fit, 0)
    os.pwrite(report, b"%d" % packed.taken_over, WIDTH)


def main() -> None:
    task = json.loads(sys.argv[1])
    resumable_set.SECONDS_BETWEEN_SAVES = IMAGES_BETWEEN_SAVES
    resumable_set.time = SimpleNamespace(monotonic=itertools.count().__next__)
    fitting.IMAGES_PER_BLOCK = 1
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote
    report = os.memfd_create("operations")
    for run in task["runs"]:
        output = Path(run.pop("output"))
        os.ftruncate(report, 0)
        child = os.fork()
        if not child:
            try:
                run_once(task["source"], Fit(**task["fit"]), output, report, **run)
            except OSError as error:
                print(error, file=sys.stderr)
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = sorted(path.name for path in output.parent.iterdir())
        operations, taken_over = (int(os.pread(report, WIDTH, place).strip(b"\0") or 0) for place in (0, WIDTH))
        outcome = {"status": status, "operations": operations, "taken_over": taken_over, "left": left}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
