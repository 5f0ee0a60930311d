"""A program that embeds images into a cache in child processes that kill themselves; for test_feature_cache.

    python tests/killed_embedding.py CACHE[,CACHE...] KILL_AT[,KILL_AT...] MARK

Each run is a fork of this process, so that nothing is imported again. It ends by SIGKILL when it has embedded KILL_AT
images; 0: it goes on to the end. Those without KILL_AT run all at once, after the others. Each image that a run embeds
into CACHE is one byte more in the file CACHE/../MARK. It prints the status of every run (negative: the signal).
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from counting_embedder import CountingEmbedder, Greys
from models import feature_cache
from models.embedding import embed_images


class Mortal(CountingEmbedder):
    """Dies when it has seen `kill_at` images."""

    def __init__(self, kill_at: int, mark: Path) -> None:
        super().__init__()
        self.kill_at, self.mark = kill_at, mark

    def features(self, faces: torch.Tensor, mirror: bool) -> torch.Tensor:
        result = super().features(faces, mirror)
        with self.mark.open("ab") as file:
            file.write(b"x" * len(faces))
        if self.kill_at and self.seen >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def start(cache: Path, kill_at: int, mark: Path) -> int:
    """The process that does it."""
    process = os.fork()
    if not process:
        try:
            embed_images(Mortal(kill_at, mark), Greys(30), 3, 0, False, "greys", cache=cache)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return process


def status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    feature_cache.BLOCK = 4
    torch.set_num_threads(1)
    for cache in map(Path, sys.argv[1].split(",")):
        limits, mark = [int(limit) for limit in sys.argv[2].split(",")], cache.parent / sys.argv[3]
        killed = [status(start(cache, limit, mark)) for limit in limits if limit]
        together = [start(cache, 0, mark) for limit in limits if not limit]
        print(*killed, *map(status, together), flush=True)


if __name__ == "__main__":
    main()
