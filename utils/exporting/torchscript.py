"""Networks as TorchScript, for C++ and for torch without this project.

torch warns that TorchScript is deprecated; it still traces, saves and loads it, and there is no other file that all
its C++ and mobile runtimes read.
"""

import io
import json
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from models.embedders.torchscript import EXTRA_FILE

METADATA_FILE = "metadata.json"


def write_torchscript(
    module: nn.Module, path: Path, image_size: int, face_embedder: dict[str, object], metadata: dict[str, str]
) -> None:
    """Trace `module`, float32 [B, 3, image_size, image_size] to [B, D], and write it with what it says of itself.

    The records in which torch notes where the code came from, with folders of this machine, are left out.
    """
    faces = torch.zeros(2, 3, image_size, image_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", ".*deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".*deprecated", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of checks of the shape, which is part of the file
        traced = torch.jit.trace(module, faces, check_trace=False)
        extra = {EXTRA_FILE: json.dumps(face_embedder), METADATA_FILE: json.dumps(metadata, indent=2)}
        whole = io.BytesIO()
        torch.jit.save(traced, whole, _extra_files=extra)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w") as bare:
        for record in archive.infolist():
            if not record.filename.endswith(".debug_pkl"):
                bare.writestr(record, archive.read(record))
