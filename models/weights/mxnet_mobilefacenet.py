"""insightface's MobileFaceNet "y1" under the names of its mxnet symbol (fmobilefacenet).

The last norm has `fix_gamma`: mxnet takes its scale for 1, whatever the file says.
"""

import torch
from torch import Tensor

from models.weights.origin import Origin
from models.weights.reading import Checkpoint

_LAYERS = {"conv_1": "conv1", "conv_2_dw": "dw_conv1", "conv_6sep": "conv2", "conv_6dw7_7": "linear7"}
# The stages in their order, each with its units.
_STAGES = (("dconv_23", 0), ("res_3", 4), ("dconv_34", 0), ("res_4", 6), ("dconv_45", 0), ("res_5", 2))
_IN_UNIT = {"conv_sep": (0, 1, 2), "conv_dw": (3, 4, 5), "conv_proj": (6, 7, -1)}
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}


def mxnet_mobilefacenet(checkpoint: Checkpoint) -> Origin | None:
    """The origin of y1's weights under mxnet's names; None for any other."""
    if not {"conv_1_conv2d_weight", "pre_fc1_bias", "fc1_weight", "fc1_gamma"} <= checkpoint.names.keys():
        return None
    if checkpoint.names["fc1_weight"].dim() != 2:
        return None
    names = _names()
    state: dict[str, Tensor] = {names.get(name, name): value for name, value in checkpoint.names.items()}
    state["linear1.conv.weight"] = state.pop("fc1_weight")[:, :, None, None]
    state["linear1.bn.weight"] = torch.ones_like(state["linear1.bn.weight"])
    return Origin(state)


def _names() -> dict[str, str]:
    """mxnet's name to ours, of every weight that only changes its name."""
    names = {"pre_fc1_bias": "linear1.conv.bias"}
    names |= {f"fc1_{theirs}": f"linear1.bn.{ours}" for theirs, ours in _NORM.items()}
    for theirs, ours in _LAYERS.items():
        names |= _block(theirs, f"{ours}.conv", f"{ours}.bn", f"{ours}.prelu")
    units = [f"{stage}_block{i}" if count else stage for stage, count in _STAGES for i in range(max(1, count))]
    for number, unit in enumerate(units):
        for part, layers in _IN_UNIT.items():
            names |= _block(f"{unit}_{part}", *(f"blocks.{number}.conv.{layer}" for layer in layers))
    return names


def _block(theirs: str, conv: str, norm: str, prelu: str) -> dict[str, str]:
    names = {f"{theirs}_conv2d_weight": f"{conv}.weight", f"{theirs}_relu_gamma": f"{prelu}.weight"}
    return names | {f"{theirs}_batchnorm_{name}": f"{norm}.{ours}" for name, ours in _NORM.items()}
