"""The numbers and pictures of a test for TensorBoard, beside the record of the run that was tested."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from utils.board import Board
from utils.evaluation.folds import FoldResult
from utils.evaluation.tested import Picture, TestedSet


def write_board(folder: Path, sets: Sequence[TestedSet], overview: Sequence[Picture]) -> None:
    """Write what the first model reached, and pictures, into `folder`, in place of an earlier test's record.

    overview: pictures of all sets together."""
    for earlier in folder.glob("events.out.tfevents.*"):
        earlier.unlink()
    with closing(Board(folder, 0, print)) as board:
        for picture in overview:
            board.image(f"test/{picture.file.stem}", picture.file.read_bytes(), 0)
        for tested in sets:
            name, one = tested.test_set.name, tested.measured[0]
            if isinstance(one.result, FoldResult):
                board.scalar(f"test/{name}/accuracy", one.result.accuracy, 0)
            board.scalar(f"test/{name}/eer", one.eer, 0)
            for point in one.points:
                if point.supported:
                    board.scalar(f"test/{name}/tar_at_far_{point.far:.0e}", point.tar, 0)
            for picture in tested.pictures:
                board.image(f"test/{name}/{picture.file.stem}", picture.file.read_bytes(), 0)
