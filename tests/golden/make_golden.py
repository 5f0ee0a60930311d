"""Write the golden files with mxnet: `.venv-mxnet/bin/python tests/golden/make_golden.py tests/golden`.

`make conformance` makes the environment; it also makes the files anew and compares them with those in this folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conformance.mxnet_side import face_records, image_records, write
from golden.records import IMAGES, PAYLOADS, PEOPLE

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder / "payloads.rec", PAYLOADS.items())
    write(folder / "images.rec", image_records(IMAGES.items()))
    write(folder / "faces.rec", face_records(PEOPLE))
