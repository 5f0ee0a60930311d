"""What is known of weights by where they come from."""

from dataclasses import dataclass

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
