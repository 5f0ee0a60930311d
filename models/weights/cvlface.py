"""CVLface's checkpoints (mk-minchul/CVLface): `model.pt` beside a `model.yaml`, or `model.safetensors` beside a
`config.json`, the network under `net.` or `model.net.`.

Which order of colours a network was trained on is in that configuration, as `color_space`; AdaFace's are there, too.
"""

import re
from pathlib import Path

from models.weights.origin import Origin
from models.weights.reading import Checkpoint

_FIRSTS = ("net.input_layer.0.weight", "model.net.input_layer.0.weight")
_CONFIGS = ("model.yaml", "config.json", "pretrained_model/model.yaml")
_COLOUR = re.compile(r"""["']?color_space["']?\s*:\s*["']?(RGB|BGR)\b""")


def cvlface(checkpoint: Checkpoint) -> Origin | None:
    """The origin of a CVLface checkpoint; None for any other. Without a configuration beside it the order is unsure."""
    if not any(name in checkpoint.names for name in _FIRSTS):
        return None
    for name in _CONFIGS:
        config = checkpoint.file.parent / name
        found = _COLOUR.search(_text(config))
        if found:
            return Origin(checkpoint.state, "bgr" if found[1] == "BGR" else "rgb")
    return Origin(
        checkpoint.state,
        doubt=f"{checkpoint.file} is CVLface's, whose networks take RGB or BGR, and no model.yaml or config.json "
        "beside it says which: taken for RGB; put its model.yaml there, or say --model.colour",
    )


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""
