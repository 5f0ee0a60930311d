"""Runs programs of the mxnet environment; plans and answers go through files of a scratch folder."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from golden.records import Image

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parents[1] / ".venv-mxnet" / "bin" / "python"


class Mxnet:
    """mxnet, in its own process."""

    def __init__(self, scratch: Path) -> None:
        self._plan = scratch / "plan.json"
        self._answer = scratch / "answer.json"

    def run(self, *arguments: str | Path) -> str:
        """The output of mxnet's python with these arguments; CalledProcessError when it fails."""
        return subprocess.run([PYTHON, *arguments], check=True, text=True, stdout=subprocess.PIPE).stdout

    def write_payloads(self, rec_path: Path, payloads: dict[int, bytes]) -> None:
        self._write("write-payloads", rec_path, [(key, payload.hex()) for key, payload in payloads.items()])

    def write_images(self, rec_path: Path, images: dict[int, Image]) -> None:
        plan = [(key, (*header, image.hex())) for key, (*header, image) in images.items()]
        self._write("write-images", rec_path, plan)

    def write_faces(self, rec_path: Path, people: Iterable[list[bytes]]) -> None:
        self._write("write-faces", rec_path, [[image.hex() for image in images] for images in people])

    def _write(self, task: str, rec_path: Path, plan: list) -> None:
        self._plan.write_text(json.dumps(plan))
        self.run(HERE / "mxnet_side.py", task, self._plan, rec_path)

    def read(self, task: str, rec_path: Path) -> Any:
        """What mxnet reads, `task` being one of mxnet_side.py's."""
        self.run(HERE / "mxnet_side.py", task, rec_path, self._answer)
        return json.loads(self._answer.read_text())
