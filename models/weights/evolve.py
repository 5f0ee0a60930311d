"""State dicts of face.evoLVe (ZhaoJ9014/face.evoLVe) and InsightFace_Pytorch (TreB1eN), which have the same names.

face.evoLVe feeds RGB (util/extract_feature_v1.py, v2.py). InsightFace_Pytorch was trained on BGR: its data_pipe.py
saves what mxnet's `unpack_img` gives, BGR, as if it were RGB, and turns the verification sets around to match. Nothing
in a file says which of the two it is from.
"""

from models.weights.origin import Origin
from models.weights.reading import Checkpoint

_SLOPE, _NORM = "body.0.res_layer.2.weight", "body.0.res_layer.2.running_mean"


def evolve(checkpoint: Checkpoint) -> Origin | None:
    """The origin of a checkpoint of either; None for any other."""
    if _SLOPE not in checkpoint.state or _NORM in checkpoint.state:
        return None
    return Origin(
        checkpoint.state,
        doubt=f"{checkpoint.file} is face.evoLVe's, which takes RGB, or InsightFace_Pytorch's (TreB1eN), which takes "
        "BGR, and nothing in it says which: taken for RGB; say --model.colour rgb or bgr",
    )
