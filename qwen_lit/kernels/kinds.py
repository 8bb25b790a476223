"""The numbers that a product of a frozen weight multiplies."""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """The numbers of one product."""

    WIDE = "wide"
    """Those of the model: bf16."""
    FP8 = "fp8"
    """e4m3: a scale for each token, and one for all weights of an input."""
    INT8 = "int8"
    """A scale for each token and each row of the weight, after a Hadamard transform along the summed dimension."""

    @property
    def narrow(self) -> bool:
        """Whether they are in 8 bits."""
        return self is not Kind.WIDE


@dataclass(frozen=True)
class Passes:
    """The kinds of one product in both passes."""

    forward: Kind = Kind.WIDE
    backward: Kind = Kind.WIDE
    """Of the product that makes the gradient of the input."""

    @property
    def narrow(self) -> bool:
        """Whether any of them is in 8 bits."""
        return self.forward.narrow or self.backward.narrow


WIDE = Passes()
