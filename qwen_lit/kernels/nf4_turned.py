"""NF4 weights (``nf4.py``) in 8 bits, in tiles: turned over, and with the Hadamard transform of ``eight.py``.

Of a weight W ``[n, k]`` and a scale s::

    forward   rows of W, or of W H along k:         [n, k]
    backward  rows of Wᵀ, or of Wᵀ H along n:       [k, n], written without W being written first
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from qwen_lit.kernels.eight import BLOCK, hadamard, narrowed, rounded, transformed
from qwen_lit.kernels.kinds import Kind
from qwen_lit.kernels.launch import cdiv, jit, tl
from qwen_lit.kernels.nf4 import block_scales, dequantize_reference, scales_of


def narrow_reference(packed: Tensor, state: Any, kind: Kind, turned: bool, inverse: Tensor) -> Tensor:
    """The reference of ``narrow``."""
    wide = copy(state)
    # Integers are of what a product in the dtype of the model would multiply.
    wide.dtype = torch.float32 if kind is Kind.FP8 else state.dtype
    weight = dequantize_reference(packed, wide).float()
    weight = weight.t() if turned else weight
    if kind is Kind.INT8:
        return rounded((transformed(weight) * inverse[:, None]).clamp(-127, 127), kind)
    return rounded((weight * inverse).clamp(-448, 448), kind)


@jit
def _narrow(
    packed,
    absmax,
    code,
    outer,
    offset,
    table,
    inverse,
    matrix,
    out,
    rows,
    across,
    stride,
    NESTED: tl.constexpr,
    OUTER: tl.constexpr,
    TURNED: tl.constexpr,
    INTEGER: tl.constexpr,
    PER: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # A tile is PER quantisation blocks wide.
    block = tl.program_id(1) * PER + tl.arange(0, PER)
    number = row[:, None].to(tl.int64) * across + block[None, :]
    inside = (row < rows)[:, None] & (block < across)[None, :]
    scale = block_scales(absmax, code, outer, offset, number, inside, NESTED, OUTER)
    half: tl.constexpr = TILE // 2
    wide: tl.constexpr = TILE // PER
    byte = tl.program_id(1) * half + tl.arange(0, half)
    start = row[:, None].to(tl.int64) * (across * (wide // 2)) + byte[None, :]
    both = tl.load(packed + start, (row < rows)[:, None] & (byte < across * (wide // 2))[None, :], 0).to(tl.int32)
    value = tl.interleave(tl.load(table + (both >> 4)), tl.load(table + (both & 15)))
    value = tl.reshape(tl.reshape(value, (TILE, PER, wide)) * scale[:, :, None], (TILE, TILE))
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if INTEGER:
        lane = tl.arange(0, TILE)
        turn = tl.load(matrix + lane[:, None] * TILE + lane[None, :])
        value = value.to(turn.dtype)
        if TURNED:
            value = tl.dot(turn, value) * tl.load(inverse + column, column < across * wide, 0.0)[None, :]
        else:
            value = tl.dot(value, turn) * tl.load(inverse + row, row < rows, 0.0)[:, None]
        value = tl.clamp(value, -127.0, 127.0)
    else:
        value = value * tl.load(inverse)
    done = narrowed(value, INTEGER)
    there = (row < rows)[:, None] & (column < across * wide)[None, :]
    if TURNED:
        tl.store(out + column[:, None].to(tl.int64) * stride + row[None, :], done.T, there.T)
    else:
        tl.store(out + row[:, None].to(tl.int64) * stride + column[None, :], done, there)


def narrow(packed: Tensor, state: Any, kind: Kind, turned: bool, inverse: Tensor, out: Tensor) -> Tensor:
    """A 4-bit weight in 8 bits.

    Args:
        packed: as for ``dequantize``.
        state: as for ``dequantize``, with rows of whole blocks; for integers the summed dimension is whole blocks of
            the transform too.
        kind: FP8 or INT8.
        turned: write Wᵀ, whose rows run along the outputs.
        inverse: float32, by which numbers are multiplied: one of them, or for integers one for each row of ``out``.
        out: ``[n, k]``, or ``[k, n]`` where it is turned; overwritten and returned; its rows may lie apart.
    """
    rows, across = state.shape[0], state.shape[1] // state.blocksize
    scales, size = scales_of(state)
    per = max(1, BLOCK // state.blocksize)
    low = torch.float16 if not out.is_cuda else torch.bfloat16
    _narrow[(cdiv(rows, BLOCK), cdiv(across, per))](
        packed.view(torch.uint8),
        *scales,
        state.code,
        inverse,
        hadamard(out.device, low) if kind is Kind.INT8 else None,
        out,
        rows,
        across,
        out.stride(0),
        NESTED=state.nested,
        OUTER=size,
        TURNED=turned,
        INTEGER=kind is Kind.INT8,
        PER=per,
        TILE=BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out
