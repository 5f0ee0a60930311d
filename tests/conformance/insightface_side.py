"""The insightface side of the comparison: embeds faces with insightface's own classes, which know nothing of ours.

    insightface_side.py FACES.npy OUT.npz FILE.onnx [FILE.onnx ...]

FACES.npy: uint8 [n, 112, 112, 3], RGB. OUT.npz gets the embeddings of each file under its name without ending, float32
[n, D], and under `NAME:how` what insightface made of it: the class, the mean and the divisor that it feeds with.
"""

import sys
from pathlib import Path

import insightface
import numpy as np

faces, out, *files = sys.argv[1:]
bgr = [np.ascontiguousarray(face[:, :, ::-1]) for face in np.load(faces)]  # as cv2.imread gives them
results: dict[str, np.ndarray] = {"version": np.array(insightface.__version__)}
for file in files:
    model = insightface.model_zoo.get_model(file, providers=["CPUExecutionProvider"])
    name = Path(file).stem
    results[f"{name}:how"] = np.array([type(model).__name__, str(model.input_mean), str(model.input_std)])
    results[name] = np.concatenate([model.get_feat(bgr[:1]), model.get_feat(bgr[1:])])
np.savez(out, **results)
