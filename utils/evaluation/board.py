"""The numbers and pictures of a test for TensorBoard, beside the record of the run that was tested."""

from collections.abc import Sequence
from pathlib import Path

from data.images import decode_rgb
from utils.evaluation.folds import FoldResult
from utils.evaluation.report import TestedSet


def write_board(folder: Path, model: str, sets: Sequence[TestedSet]) -> None:
    """Write what `model` reached into `folder`, in place of an earlier test's record."""
    from torch.utils.tensorboard import SummaryWriter

    for earlier in folder.glob("events.out.tfevents.*"):
        earlier.unlink()
    with SummaryWriter(str(folder)) as board:
        for tested in sets:
            name = tested.test_set.name
            for one in tested.measured:
                if one.model != model:
                    continue
                if isinstance(one.result, FoldResult):
                    board.add_scalar(f"test/{name}/accuracy", one.result.accuracy, 0)
                board.add_scalar(f"test/{name}/eer", one.eer, 0)
                for point in one.points:
                    if point.supported:
                        board.add_scalar(f"test/{name}/tar_at_far_{point.far:.0e}", point.tar, 0)
            for picture in tested.pictures:
                pixels = decode_rgb(picture.file.read_bytes(), picture.file)
                board.add_image(f"test/{name}/{picture.file.stem}", pixels, 0, dataformats="HWC")
