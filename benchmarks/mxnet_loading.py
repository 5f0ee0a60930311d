#!/usr/bin/env python3
"""Images/s of the loading that other trainers have: mxnet's records and decoder, Pillow and torchvision, one by one.

    .venv-mxnet/bin/python benchmarks/mxnet_loading.py SET.rec SITE_PACKAGES

It does to an image what `MXFaceDataset.__getitem__` does in insightface's arcface_torch, and runs in the environment of
`make conformance`. It has no torchvision: torch, torchvision and Pillow come from SITE_PACKAGES of another environment
with the same Python, behind mxnet's own numpy. `benchmarks/loading.py` drives it: the first line of standard input is
the JSON list of the keys to load; for every further line, a number of workers, they are loaded once and images/s
printed. 0: `__getitem__` alone, in this process; else batches that arrive from a DataLoader, its start left out.
"""

import json
import numbers
import sys
import time

import mxnet as mx

sys.path.append(sys.argv[2])  # after mxnet is imported: it would take what it finds there and cannot use

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms

BATCH = 128


class MxnetFaces(torch.utils.data.Dataset):
    """Faces of a `.rec` as float32 [3, 112, 112] in [-1, 1], mirrored at random, with their labels (int64).

    `keys`: the records; an index is a position among them, as theirs is among all images.
    """

    def __init__(self, rec_path: str, keys: list[int]) -> None:
        self.keys = np.array(keys)
        self.records = mx.recordio.MXIndexedRecordIO(rec_path[: -len("rec")] + "idx", rec_path, "r")
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
            ]
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        header, image = mx.recordio.unpack(self.records.read_idx(self.keys[index]))
        label = header.label if isinstance(header.label, numbers.Number) else header.label[0]
        label = torch.tensor(label, dtype=torch.long)
        sample = mx.image.imdecode(image).asnumpy()
        return self.transform(sample), label


def load_once(loader: DataLoader) -> float:
    """Images/s."""
    began = time.perf_counter()
    images = sum(len(labels) for _, labels in loader)
    return images / (time.perf_counter() - began)


def main() -> None:
    """Measure when told to."""
    torch.set_num_threads(1)
    faces = MxnetFaces(sys.argv[1], json.loads(sys.stdin.readline()))
    order = range(len(faces.keys))
    loaders: dict[int, DataLoader] = {}
    for line in sys.stdin:
        workers = int(line)
        if workers == 0:
            began = time.perf_counter()
            for index in order:
                faces[index]
            rate = len(order) / (time.perf_counter() - began)
        else:
            if workers not in loaders:
                options = {"persistent_workers": True, "multiprocessing_context": "fork"}
                loaders[workers] = DataLoader(faces, BATCH, sampler=order, num_workers=workers, **options)
                load_once(loaders[workers])
            rate = load_once(loaders[workers])
        print(rate, flush=True)


if __name__ == "__main__":
    main()
