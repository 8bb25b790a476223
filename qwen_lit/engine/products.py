"""How the products of frozen weights are computed: in bf16, or in 8 bits in one pass or in both.

What is trained stays as it is: the products with LoRA's A and B, lm_head and its loss, attention, norms and the
residual stream are computed in the dtype of the model whatever is chosen here.
"""

from dataclasses import dataclass, field
from typing import Literal

from qwen_lit.kernels.kinds import WIDE, Kind, Passes

__all__ = ["NAMED", "WIDE", "Kind", "Passes", "Product", "Products", "ProductsName"]

ProductsName = Literal["bf16", "fp8_backward", "mixed8", "int8", "fp8"]
Product = tuple[int, int]
"""Numbers of the layer and of the group of linears in it: 0 is q, k and v; 1 o; 2 gate and up; 3 down."""


NAMED: dict[ProductsName, Passes] = {
    "bf16": WIDE,
    "fp8_backward": Passes(Kind.WIDE, Kind.FP8),
    "mixed8": Passes(Kind.INT8, Kind.FP8),
    "int8": Passes(Kind.INT8, Kind.INT8),
    "fp8": Passes(Kind.FP8, Kind.FP8),
}
"""By the values of ``model.products``."""


@dataclass(frozen=True)
class Products:
    """How the products of every layer are computed."""

    name: ProductsName = "bf16"
    wide: frozenset[Product] = field(default_factory=frozenset)
    """The products whose forward stays in bf16 all the same."""

    def of(self, layer: int, group: int) -> Passes:
        """The kinds of the products of one group of linears.

        Args:
            layer: its number.
            group: its number in the layer.
        """
        passes = NAMED[self.name]
        return Passes(Kind.WIDE, passes.backward) if (layer, group) in self.wide else passes

    @property
    def narrow(self) -> bool:
        """Whether any product is in 8 bits."""
        return NAMED[self.name].narrow
