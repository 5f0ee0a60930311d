"""What is known of weights by their origin."""

from dataclasses import dataclass

from torch import Tensor

from models.inputs import Colour, Normalisation


@dataclass(frozen=True)
class Origin:
    """`state`: weights under the names of this project; `colour`, `normalisation`: what they were trained on.

    `doubt`: a warning for users who give no colour order, if the file does not show it; empty: it does.
    """

    state: dict[str, Tensor]
    colour: Colour = "rgb"
    normalisation: Normalisation = "127.5"
    doubt: str = ""
