"""Dequantisation of bitsandbytes' NF4 weights (Dettmers et al., 2023), nested scales included, in one launch.

A weight is rows of numbers in blocks of ``blocksize`` (64) consecutive ones. With ``q`` its 4-bit index and ``b`` its
block::

    w = table[q] · absmax[b]
    absmax[b] = code[level[b]] · outer[b // 256] + offset,  where scales are nested (section 3, "double quantization")

``table`` is the 16 quantiles of a normal distribution (appendix E); ``level`` is uint8, all scales are float32, the
result has the dtype of the products. Weights are frozen: there is no backward.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from qwen_lit.kernels.launch import cdiv, jit, launches, tl

ROWS = 64
"""Quantisation blocks of one program."""


def dequantize_reference(packed: Tensor, state: Any) -> Tensor:
    """The reference of ``dequantize``: bitsandbytes' own."""
    return dequantize_4bit(packed, state)


@jit
def block_scales(absmax, code, outer, offset, block, inside, NESTED: tl.constexpr, OUTER: tl.constexpr):
    """absmax of quantisation blocks by their numbers."""
    if NESTED:
        level = tl.load(absmax + block, inside, 0).to(tl.int32)
        return tl.load(code + level) * tl.load(outer + block // OUTER, inside, 0.0) + tl.load(offset)
    else:
        return tl.load(absmax + block, inside, 0.0)


@jit
def _dequantize(
    packed,
    absmax,
    code,
    outer,
    offset,
    table,
    out,
    inverse,
    blocks,
    across,
    stride,
    SCALED: tl.constexpr,
    NESTED: tl.constexpr,
    OUTER: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < blocks
    scale = block_scales(absmax, code, outer, offset, row, inside, NESTED, OUTER)
    if SCALED:
        scale = scale * tl.load(inverse)
    lane = tl.arange(0, BYTES)
    byte = tl.load(packed + row[:, None] * BYTES + lane[None, :], inside[:, None], 0).to(tl.int32)
    high = tl.load(table + (byte >> 4)) * scale[:, None]
    low = tl.load(table + (byte & 15)) * scale[:, None]
    both = tl.interleave(high, low)
    lane = tl.arange(0, 2 * BYTES)
    start = (row // across) * stride + (row % across) * (2 * BYTES)
    tl.store(out + start[:, None] + lane[None, :], both.to(out.dtype.element_ty), inside[:, None])


def can_dequantize(packed: Tensor, state: Any) -> bool:
    """Whether the kernel reads this layout: NF4 on CUDA, whole blocks, scales in float32 or nested in 8 bits."""
    count = state.shape.numel()
    return (
        launches(packed)
        and state.quant_type == "nf4"
        and count % state.blocksize == 0
        and (not state.nested or state.state2.absmax.dtype == torch.float32)
    )


def scales_of(state: Any) -> tuple[tuple[Tensor | None, ...], int]:
    """What ``block_scales`` reads of a quantisation state, and how many scales have an outer one."""
    if not state.nested:
        return (state.absmax, None, None, None), 1
    outer = state.state2
    return (state.absmax, outer.code, outer.absmax, state.offset), outer.blocksize


def dequantize(packed: Tensor, state: Any, out: Tensor, inverse: Tensor | None = None) -> Tensor:
    """The weight of a 4-bit linear.

    Args:
        packed: two values a byte, the first in its high half; the bytes may be stored as a wider dtype.
        state: bitsandbytes' quantisation state, for which ``can_dequantize`` is true.
        out: of the weight's shape, overwritten and returned; contiguous, or, where a row is whole blocks, a part of
            a wider matrix.
        inverse: float32, one number by which all are multiplied before they are rounded to the dtype of ``out``.
    """
    blocks = state.shape.numel() // state.blocksize
    scales, size = scales_of(state)
    across = blocks if out.is_contiguous() else out.shape[1] // state.blocksize
    _dequantize[(cdiv(blocks, ROWS),)](
        packed.view(torch.uint8),
        *scales,
        state.code,
        out,
        inverse,
        blocks,
        across,
        out.stride(0),
        SCALED=inverse is not None,
        NESTED=state.nested,
        OUTER=size,
        BYTES=state.blocksize // 2,
        ROWS=ROWS,
        num_warps=4,
        # A fused multiply-add would round once where bitsandbytes rounds twice.
        enable_fp_fusion=False,
    )
    return out
