"""AdaFace's checkpoints (mk-minchul/AdaFace): PyTorch Lightning's, the network under `model.`, the classes beside it.

They were trained on BGR: its `inference.py` turns RGB around before the network.
"""

from models.weights.origin import Origin
from models.weights.reading import Checkpoint

_FIRST = "model.input_layer.0.weight"
_HEAD = "head.kernel"


def adaface(checkpoint: Checkpoint) -> Origin | None:
    """The origin of an AdaFace checkpoint; None for any other."""
    lightning = isinstance(checkpoint.content, dict) and "pytorch-lightning_version" in checkpoint.content
    if _FIRST in checkpoint.names and (lightning or _HEAD in checkpoint.names):
        return Origin(checkpoint.state, colour="bgr")
    return None
