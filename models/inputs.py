"""The input that a network expects: colour order, normalisation, and crop."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

Normalisation = Literal["none", "127.5", "128"]
Colour = Literal["rgb", "bgr"]


@dataclass(frozen=True)
class InputSpec:
    """From uint8 RGB faces to a network's input.

    `normalisation`: `none` feeds 0..255, `127.5` (x - 127.5) / 127.5, `128` (x - 127.5) / 128. `colour`: the order of
    the channels. `rows`, `columns`: the first and one past the last that the network sees; None: all.
    """

    normalisation: Normalisation = "127.5"
    colour: Colour = "rgb"
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, values in (("normalisation", Normalisation), ("colour", Colour)):
            if getattr(self, name) not in get_args(values):
                raise ValueError(f"{name} must be one of {', '.join(get_args(values))}, got {getattr(self, name)!r}")
        for name, seen in (("rows", self.rows), ("columns", self.columns)):
            if seen is not None and not _is_range(seen):
                raise ValueError(f"{name} must be the first and one past the last, got {seen!r}")

    def chosen(self, normalisation: str = "auto", colour: str = "auto") -> "InputSpec":
        """A copy with the given values in place, where they are not `auto`. Raises ValueError for unknown ones."""
        said: dict[str, Any] = {"normalisation": normalisation, "colour": colour}
        return replace(self, **{name: value for name, value in said.items() if value != "auto"})

    def to_input(self, faces: Tensor, mirror: bool = False) -> Tensor:
        """uint8 [B, size, size, 3] RGB, on any device, to float32 [B, 3, height, width], channels last in memory."""
        if mirror:
            faces = faces.flip(2)
        faces = faces[:, slice(*(self.rows or (None,))), slice(*(self.columns or (None,)))]
        if self.colour == "bgr":
            faces = faces.flip(3)
        pixels = faces.permute(0, 3, 1, 2).float()
        return pixels if self.normalisation == "none" else pixels.sub_(127.5).div_(float(self.normalisation))

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them, for fingerprints and metadata."""
        return asdict(self)


def _is_range(seen: Any) -> bool:
    """Whether it is two whole numbers from 0 on, in a tuple or in a list, as JSON has it, the second one larger."""
    pair = isinstance(seen, tuple | list) and [type(end) for end in seen] == [int, int]
    return pair and 0 <= seen[0] < seen[1]


def check_choices(normalisation: str, colour: str) -> None:
    """Raise ValueError unless these are `auto` or what InputSpec knows: else `BGR` would be taken for not `bgr`."""
    for name, value, values in (("normalisation", normalisation, Normalisation), ("colour", colour, Colour)):
        known = ("auto", *get_args(values))
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
