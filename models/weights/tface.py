"""State dicts of IR networks under the names of TFace (Tencent/TFace), which AdaFace has as well.

TFace feeds RGB, AdaFace BGR. What tells AdaFace's checkpoints apart, Lightning's notes and the classes, is gone from
files in which somebody kept the network alone.
"""

from models.weights.origin import Origin
from models.weights.reading import Checkpoint

_FIRST, _NORM = "input_layer.0.weight", "body.0.res_layer.2.running_mean"


def tface(checkpoint: Checkpoint) -> Origin | None:
    """The origin of a checkpoint of either; None for any other."""
    if _FIRST not in checkpoint.state or _NORM not in checkpoint.state:
        return None
    return Origin(
        checkpoint.state,
        doubt=f"{checkpoint.file} is TFace's, which takes RGB, or AdaFace's without its notes, which takes BGR, and "
        "nothing in it says which: taken for RGB; say --model.colour rgb or bgr",
    )
