"""What is known of weights by where they come from."""

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from models.inputs import Colour, Normalisation


@dataclass(frozen=True)
class Origin:
    """`state`: weights under the names of this project; `colour`, `normalisation`: what they were trained on.

    `doubt`: where the file cannot tell `colour`, what to say to whoever has not said it.
    """

    state: dict[str, Tensor]
    colour: Colour = "rgb"
    normalisation: Normalisation = "127.5"
    doubt: str = ""

    def __post_init__(self) -> None:
        if self.colour not in get_args(Colour) or self.normalisation not in get_args(Normalisation):
            raise ValueError(f"no such input: {self.colour!r}, {self.normalisation!r}")
