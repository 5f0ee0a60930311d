"""The insightface side of the comparison of detectors: finds faces with insightface's own class.

    insightface_detect_side.py PHOTOS.npz OUT.npz SIZE THRESHOLD FILE.onnx [FILE.onnx ...]

PHOTOS.npz: uint8 [height, width, 3], RGB, each. OUT.npz gets what each file finds in each, on inputs of SIZE x SIZE:
under `FILE:PHOTO` boxes and scores, float32 [faces, 5], under `FILE:PHOTO:landmarks` float32 [faces, 5, 2].
"""

import sys
from pathlib import Path

import insightface
import numpy as np

photos, out, size, threshold, *files = sys.argv[1:]
results: dict[str, np.ndarray] = {}
for file in files:
    model = insightface.model_zoo.get_model(file, providers=["CPUExecutionProvider"])
    for name, photo in np.load(photos).items():
        bgr = np.ascontiguousarray(photo[:, :, ::-1])
        faces, landmarks = model.detect(bgr, input_size=(int(size), int(size)), det_thresh=float(threshold))
        results[f"{Path(file).stem}:{name}"] = faces
        results[f"{Path(file).stem}:{name}:landmarks"] = landmarks
np.savez(out, **results)
