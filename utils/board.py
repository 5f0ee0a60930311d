"""A writer of TensorBoard's event files that survives a full disk, of which torch's own dies, in a thread.

torch's also imports TensorFlow where there is one, which is not needed here.
"""

import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.appended_file import AppendedFile
from utils.texts import encodable

#: Bars of a histogram, all of one width.
_BINS = 64

_PREFIX = "events.out.tfevents."


class Board:
    """A new file of events in `folder`. TensorBoard drops what older ones have of `first_step` and later.

    `say` is given lines for people about a disk that is full.
    """

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], object]) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a folder in the order of their names: this is the last, also where the clock
        # went back, or is that of another machine.
        began = max([time.time(), *(before + 0.001 for before in _times(folder))])
        name = f"{_PREFIX}{began:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(AppendedFile(folder / name, say))
        self._add(file_version="brain.Event:2")
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._value(step, name, simple_value=value)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """`values`, not empty and finite."""
        from tensorboard.compat.proto.summary_pb2 import HistogramProto

        flat = values.astype(np.float64).reshape(-1)
        low, high = flat.min(), flat.max()
        # Of equal values numpy makes bars around them that are too narrow to be told apart where the values are huge.
        margin = max(0.5, 1e-3 * abs(low)) if low == high else 0.0
        counts, edges = np.histogram(flat, _BINS, (low - margin, high + margin))
        histogram = HistogramProto(
            min=low,
            max=high,
            num=flat.size,
            sum=flat.sum(),
            sum_squares=flat @ flat,
            bucket_limit=edges.tolist(),  # right ones: an empty bar tells where the first begins
            bucket=[0, *counts.tolist()],
        )
        self._value(step, name, histo=histogram)

    def image(self, name: str, png: bytes, step: int) -> None:
        """A picture, as the bytes of a PNG file in RGB."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
        self._value(step, name, image=image)

    def close(self) -> None:
        """Give up the file."""
        self._records.close()

    def _value(self, step: int, name: str, **value: Any) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # Sets are called as their files, whose names need not be UTF-8.
        self._add(step, summary=Summary(value=[Summary.Value(tag=encodable(name), **value)]))

    def _add(self, step: int = 0, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


def _times(folder: Path) -> Iterator[float]:
    """When, by their names, the files of a folder that such a Board made were begun, in seconds."""
    for file in folder.glob(f"{_PREFIX}*"):
        if match := re.match(r"\d+\.\d{6}(?=\.)", file.name.removeprefix(_PREFIX)):
            yield float(match[0])
