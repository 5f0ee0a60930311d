"""What TensorBoard shows, in a file that a full disk does not stop: torch's own writer dies of it, in a thread."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils.appended_file import AppendedFile

#: Bars of a histogram, all of one width.
_BINS = 64


class Board:
    """A new file of events in `folder`. TensorBoard drops what older ones have of `first_step` and later.

    `say` is given lines for people about a disk that is full.
    """

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], object]) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(AppendedFile(folder / name, say))
        self._add(file_version="brain.Event:2")
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        from torch.utils.tensorboard.summary import scalar

        self._add(step, summary=scalar(name, value))

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """`values`, not empty and finite."""
        from torch.utils.tensorboard.summary import histogram

        self._add(step, summary=histogram(name, values, _BINS))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [3, H, W], RGB."""
        from torch.utils.tensorboard.summary import image

        self._add(step, summary=image(name, pixels, dataformats="CHW"))

    def close(self) -> None:
        """Give up the file."""
        self._records.close()

    def _add(self, step: int = 0, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
