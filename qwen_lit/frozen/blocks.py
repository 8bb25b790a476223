"""The 4-bit weights of a decoder layer as one block of bytes, which is written, copied and read as a whole.

A block has, for each linear, its packed numbers and their scales as bitsandbytes holds them; where the scales are
quantised too ("double quantization", Dettmers et al., 2023, section 3), their own scales and their mean. The tables of
codes are the same for every weight and are in no block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import bitsandbytes.functional as F
import torch
from torch import Tensor

from qwen_lit.quantization import Held

ALIGN = 256
"""Bytes at whose multiples a piece begins: what a GPU reads at once."""
PAGE = 4096
"""Bytes of which a block is a multiple, so that each one can be mapped and pinned by itself."""
NESTED_BLOCK = 256
"""Scales that share a scale; bitsandbytes' own number."""


@dataclass(frozen=True)
class FrozenLinear:
    """One linear whose weight is in a block."""

    path: str
    """In the decoder layer: ``self_attn.q_proj``."""
    shape: tuple[int, int]
    """``[out, in]``."""
    held: Held
    """nf4 or fp4, of one matrix."""

    @property
    def numbers(self) -> int:
        """In the weight."""
        return self.shape[0] * self.shape[1]

    def pieces(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what is held of it."""
        blocks = -(-self.numbers // self.held.blocksize)
        packed = ("weight", torch.uint8, (-(-self.numbers // 2), 1))
        if not self.held.double:
            return [packed, ("absmax", torch.float32, (blocks,))]
        return [
            packed,
            ("absmax", torch.uint8, (blocks,)),
            ("nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)),
            ("offset", torch.float32, ()),
        ]


@dataclass(frozen=True)
class Piece:
    """One tensor in a block."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """What is where in a layer's block."""

    linears: tuple[FrozenLinear, ...]

    @cached_property
    def pieces(self) -> Mapping[str, Piece]:
        """By name, such as ``self_attn.q_proj.absmax``."""
        found, end = {}, 0
        for linear in self.linears:
            for name, dtype, shape in linear.pieces():
                piece = found[f"{linear.path}.{name}"] = Piece(dtype, shape, end)
                end += -(-piece.size // ALIGN) * ALIGN
        return found

    @cached_property
    def size(self) -> int:
        """Bytes of the block."""
        if not self.pieces:
            return 0
        last = list(self.pieces.values())[-1]
        return -(-(last.start + last.size) // PAGE) * PAGE

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The tensors of a block, which share its memory.

        Args:
            block: uint8, at least ``[size]``.
        """
        return {
            name: block[piece.start : piece.start + piece.size].view(piece.dtype).view(piece.shape)
            for name, piece in self.pieces.items()
        }

    def quantize(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The block of a layer.

        Args:
            weights: ``[out, in]`` by the linear's path, in the dtype in which they are quantised, on the device that
                quantises them.

        Returns:
            uint8 ``[size]`` on that device; what lies between the pieces is 0.
        """
        block = torch.zeros(self.size, dtype=torch.uint8, device=next(iter(weights.values())).device)
        views = self.views(block)
        for linear in self.linears:
            held = linear.held
            packed, state = F.quantize_4bit(
                weights[linear.path].contiguous(),
                blocksize=held.blocksize,
                compress_statistics=held.double,
                quant_type=held.kind,
            )
            found = {"weight": packed, "absmax": state.absmax}
            if held.double:
                found |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
            for name, tensor in found.items():
                views[f"{linear.path}.{name}"].copy_(tensor)
        return block


@cache
def _codes(kind: str, device: torch.device) -> Tensor:
    """The 16 values of 4-bit numbers, float32."""
    return F.get_4bit_type(kind, device=device)


@cache
def _scale_codes(device: torch.device) -> Tensor:
    """The 256 values of 8-bit scales, float32."""
    return F.create_dynamic_map().to(device)


class AwayState(F.QuantState):  # type: ignore[misc]
    """Quantisation state of a weight that is not at hand: its form alone.

    A kernel that was given anything for the scales would read past the end of it, so whoever asks for them gets an
    error instead.
    """

    @property
    def absmax(self) -> Tensor:
        """Scales, which every product asks for.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("the weight of a layer that lives on the host is read before it is on the device")

    @absmax.setter
    def absmax(self, value: Tensor | None) -> None:
        """There is nothing to keep."""

    def to(self, device: torch.device) -> None:
        """There is nothing to move."""

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Nothing: a state dict of the model, which PEFT reads the names of, lists what is at hand."""
        return {}


def away_state(linear: FrozenLinear, dtype: torch.dtype, device: torch.device) -> AwayState:
    """What stands for the quantisation state of a weight that is not at hand.

    Args:
        linear: in the block.
        dtype: of the numbers that would come out.
        device: where they would.
    """
    held = linear.held
    inner = AwayState(None, blocksize=NESTED_BLOCK, code=_scale_codes(device), dtype=torch.float32)
    return AwayState(
        None,
        shape=torch.Size(linear.shape),
        code=_codes(held.kind, device),
        blocksize=held.blocksize,
        quant_type=held.kind,
        dtype=dtype,
        state2=inner if held.double else None,
    )


def quant_state(linear: FrozenLinear, views: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """bitsandbytes' quantisation state of a weight, over the memory of its block.

    Args:
        linear: in the block.
        views: of the block.
        dtype: of the numbers that come out.
    """
    held, absmax = linear.held, views[f"{linear.path}.absmax"]
    nested: dict[str, Any] = {}
    if held.double:
        inner = F.QuantState(
            absmax=views[f"{linear.path}.nested_absmax"],
            blocksize=NESTED_BLOCK,
            code=_scale_codes(absmax.device),
            dtype=torch.float32,
        )
        nested = {"offset": views[f"{linear.path}.offset"], "state2": inner}
    return F.QuantState(
        absmax=absmax,
        shape=torch.Size(linear.shape),
        code=_codes(held.kind, absmax.device),
        blocksize=held.blocksize,
        quant_type=held.kind,
        dtype=dtype,
        **nested,
    )
