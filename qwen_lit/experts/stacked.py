"""The experts of a layer as transformers has them, one parameter for all, and how that is held in 4 bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import bitsandbytes.functional as F
import torch
from torch import Tensor, nn

PARAMETERS = {"gate_up_proj": 2, "down_proj": 1}
"""The parameters of an experts module, ``[experts, out, in]``, and how many matrices of an expert each joins."""
SCALES = 256
"""Scales that share a scale, where the scales are quantised too; bitsandbytes' own number."""


@dataclass(frozen=True)
class Stacked4bit:
    """How the experts that are one parameter are held in 4 bits: as bytes, a row for each expert.

    Each matrix of an expert is quantised by itself, gate and up too, as bitsandbytes quantises a linear: what is held
    does not depend on whether a file has the matrices by themselves or as one tensor. A row has the packed numbers of
    the expert's matrices, then their scales; where the scales are quantised, then the scales of those and their means.
    """

    count: int
    """Experts."""
    rows: int
    columns: int
    parts: int
    """Matrices of an expert, one below the other."""
    kind: str
    """nf4 or fp4."""
    blocksize: int
    double: bool
    """Whether the scales are quantised too."""
    dtype: torch.dtype = torch.bfloat16
    """Of the numbers that come out, and of the experts when they are read."""
    compute: torch.dtype = torch.bfloat16
    """Of products."""
    storage: torch.dtype = torch.uint8
    """That the bytes are said to have, as ``bnb_4bit_quant_storage`` of linears."""

    @property
    def blocks(self) -> int:
        """Scales of a matrix."""
        return self.rows * self.columns // self.parts // self.blocksize

    @property
    def widths(self) -> list[int]:
        """Bytes of a row: packed numbers, scales, where these are quantised their scales and means, and a rest."""
        found = [self.rows * self.columns // 2, self.parts * self.blocks * (1 if self.double else 4)]
        if self.double:
            found += [4 * self.parts * -(-self.blocks // SCALES), 4 * self.parts]
        return [*found, -sum(found) % self.storage.itemsize]

    def quantize(self, weight: Tensor) -> Tensor:
        """The bytes that hold a weight.

        Args:
            weight: ``[count, rows, columns]``.

        Returns:
            ``[count, sum(widths)]`` bytes as ``storage``, on the weight's device.
        """
        held = torch.zeros(self.count, sum(self.widths), dtype=torch.uint8, device=weight.device)
        for row, expert in zip(held, weight, strict=True):
            # One piece of each kind for each matrix; a kind's pieces stand together.
            pieces = [self._quantized(matrix) for matrix in expert.chunk(self.parts)]
            made = torch.cat([piece for kind in zip(*pieces, strict=True) for piece in kind])
            row[: len(made)] = made
        return held.view(self.storage)

    def _quantized(self, matrix: Tensor) -> list[Tensor]:
        packed, state = F.quantize_4bit(
            matrix.contiguous(), blocksize=self.blocksize, compress_statistics=self.double, quant_type=self.kind
        )
        found = [packed, state.absmax]
        if self.double:
            found += [state.state2.absmax, state.offset]
        return [one.reshape(-1).view(torch.uint8) for one in found]

    def dequantize(self, held: Tensor) -> Tensor:
        """The matrices that some rows hold.

        Args:
            held: ``[n, sum(widths)]`` bytes as ``storage``.

        Returns:
            ``[n, rows, columns]`` in ``dtype``.
        """
        *pieces, _ = (piece.contiguous() for piece in held.view(torch.uint8).split(self.widths, dim=1))
        state = F.QuantState(
            absmax=self._scales(pieces[1:]),
            shape=torch.Size((len(held) * self.rows, self.columns)),
            blocksize=self.blocksize,
            quant_type=self.kind,
            dtype=self.dtype,
        )
        return F.dequantize_4bit(pieces[0].view(-1, 1), state).view(len(held), self.rows, self.columns)

    def _scales(self, pieces: list[Tensor]) -> Tensor:
        """The scale of each block, float32, in the order of the packed numbers."""
        if not self.double:
            return pieces[0].view(torch.float32).flatten()
        scales, (scale, mean) = pieces[0], (one.view(torch.float32) for one in pieces[1:])
        matrices = len(scales) * self.parts
        wide = scale.view(matrices, -1).repeat_interleave(SCALES, dim=1)[:, : self.blocks]
        found = _code(scales.device).index_select(0, scales.flatten().int()).view(matrices, self.blocks)
        return (found * wide + mean.view(matrices, 1)).flatten()


@cache
def _code(device: torch.device) -> Tensor:
    """The values of 8-bit scales, ``[256]`` float32."""
    return F.create_dynamic_map().to(device)


def stacks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of a model that hold experts as two parameters."""
    for name, module in model.named_modules():
        if hasattr(type(module), "_apply_gate") and set(dict(module.named_parameters(recurse=False))) == set(
            PARAMETERS
        ):
            yield name, module


def held_4bit(module: nn.Module) -> dict[str, Stacked4bit]:
    """How an experts module's parameters are held, by their names in it; empty where they are not held in 4 bits."""
    found: dict[str, Stacked4bit] = getattr(module, "held_4bit", {})
    return found
