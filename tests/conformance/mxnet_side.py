"""The mxnet side of the comparison: writes what it is told and tells what it reads, with mxnet and numpy alone.

    mxnet_side.py write-payloads PLAN.json OUT.rec    plan: [[key, payload in hex], ...]
    mxnet_side.py write-images PLAN.json OUT.rec      plan: [[key, [label or labels, id, id2, image in hex]], ...]
    mxnet_side.py write-faces PLAN.json OUT.rec       plan: [[image in hex, ...] of each identity, ...]
    mxnet_side.py read IN.rec OUT.json                the payloads, by key and one after the other
    mxnet_side.py read-images IN.rec OUT.json         every record taken apart
    mxnet_side.py read-faces IN.rec OUT.json          label and image of each face, found as insightface finds them
    mxnet_side.py read-pixels IN.rec OUT.json         shape and pixels of every 10th image

The `.idx` lies beside its `.rec`. What was read is told as SHA-256; `with_mxnet.py` says the same of our reader.
"""

import json
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.recordio import IRHeader, MXIndexedRecordIO, MXRecordIO, pack, unpack

Records = Iterable[tuple[int, bytes]]


def write(rec_path: Path, records: Records) -> None:
    file = MXIndexedRecordIO(str(rec_path.with_suffix(".idx")), str(rec_path), "w")
    for key, payload in records:
        file.write_idx(key, payload)
    file.close()


def image_records(images: Iterable[tuple[int, tuple]]) -> Records:
    """From (key, (label or labels, id, id2, image)); the flag is pack's own business."""
    for key, (label, id, id2, image) in images:
        yield key, pack(IRHeader(0, label, id, id2), image)


def face_records(people: Iterable[list[bytes]]) -> Records:
    """Insightface's layout: the images, identity records with the range of theirs, record 0 with the range of those."""
    ranges = []
    next_key = 1
    for label, images in enumerate(people):
        first = next_key
        for image in images:
            yield next_key, pack(IRHeader(0, float(label), next_key, 0), image)
            next_key += 1
        ranges.append((first, next_key))
    for key, images_of_identity in enumerate(ranges, next_key):
        yield key, pack(IRHeader(1, images_of_identity, key, 0), b"")
    yield 0, pack(IRHeader(1, (next_key, next_key + len(ranges)), 0, 0), b"")


def open_indexed(rec_path: Path) -> MXIndexedRecordIO:
    return MXIndexedRecordIO(str(rec_path.with_suffix(".idx")), str(rec_path), "r")


def hashed(content: bytes) -> str:
    return sha256(content).hexdigest()


def read(rec_path: Path) -> dict[str, Any]:
    file = open_indexed(rec_path)
    by_key = {key: hashed(file.read_idx(key)) for key in file.keys}
    sequential = MXRecordIO(str(rec_path), "r")
    return {"by_key": by_key, "in_order": [hashed(payload) for payload in iter(sequential.read, None)]}


def read_images(rec_path: Path) -> dict[int, Any]:
    file = open_indexed(rec_path)
    taken_apart = {}
    for key in file.keys:
        header, image = unpack(file.read_idx(key))
        labels = np.atleast_1d(np.asarray(header.label, np.float32))
        taken_apart[key] = [labels.tobytes().hex(), header.id, header.id2, hashed(image)]
    return taken_apart


def read_faces(rec_path: Path) -> list[tuple[int, str]]:
    file = open_indexed(rec_path)
    header, _ = unpack(file.read_idx(0))
    id_start, id_end = (int(key) for key in header.label)
    faces = []
    for label, key in enumerate(range(id_start, id_end)):
        header, _ = unpack(file.read_idx(key))
        for image_key in range(*(int(key) for key in header.label)):
            header, image = unpack(file.read_idx(image_key))
            if header.label != label:
                raise SystemExit(f"{rec_path}, record {image_key}: label {header.label}, in the range of {label}")
            faces.append((label, hashed(image)))
    return faces


def read_pixels(rec_path: Path) -> dict[int, tuple[tuple[int, ...], str]]:
    file = open_indexed(rec_path)
    images = ((key, unpack(file.read_idx(key))[1]) for key in file.keys[::10])
    decoded = {key: mx.image.imdecode(image).asnumpy() for key, image in images if image}
    return {key: (pixels.shape, hashed(pixels.tobytes())) for key, pixels in decoded.items()}


def main(task: str, source: Path, target: Path) -> None:
    if task.startswith("read"):
        readers = {"read": read, "read-images": read_images, "read-faces": read_faces, "read-pixels": read_pixels}
        target.write_text(json.dumps(readers[task](source)))
        return
    plan = json.loads(source.read_text())
    if task == "write-payloads":
        write(target, ((key, bytes.fromhex(payload)) for key, payload in plan))
    elif task == "write-images":
        write(target, image_records((key, (*header, bytes.fromhex(image))) for key, (*header, image) in plan))
    elif task == "write-faces":
        write(target, face_records([bytes.fromhex(image) for image in images] for images in plan))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
