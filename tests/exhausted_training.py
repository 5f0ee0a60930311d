"""train.py, where the second process runs out of memory with more than two faces in a pass, for
test_distributed_training.py."""

import os
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from models.backbones.demonet import DemoNet
from train import main
from utils.scripts import end_rank

MOST = 2

_forward = DemoNet.forward


def _limited(network: DemoNet, faces: Tensor) -> Tensor:
    if network.training and len(faces) > MOST and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return _forward(network, faces)


if __name__ == "__main__":
    # The second process is alone in what it has to say: it need not wait for the first one to say it.
    with patch.object(DemoNet, "forward", _limited), patch("utils.scripts._FIRST_SPEAKS", 0.1):
        main()
    end_rank()
