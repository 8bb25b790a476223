"""SwiGLU of ``packed.py`` beside products in 8 bits: what they multiply is made in the same pass over gate and up, or
over what is kept of them."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_lit.kernels.eight import LEAST, TOP, Narrow, empty_narrow, narrowed, quantize
from qwen_lit.kernels.kinds import Kind
from qwen_lit.kernels.launch import jit, launches, tl
from qwen_lit.kernels.packed import (
    BLOCK,
    Packed,
    empty_packed,
    packed,
    swiglu_packed,
    swiglu_packed_backward,
    unpacked,
)

BLOCKS = 32
"""Blocks of gate and of up that a program, which has a row, works on at a time."""


@jit
def _forward(
    both,
    out,
    values,
    scale,
    codes,
    scales,
    width,
    stride,
    blocks,
    WIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gate, codes, scales = both + row * stride, codes + row * 2 * width, scales + row * 2 * blocks
    lane = tl.arange(0, BLOCKS)
    most = tl.zeros((BLOCKS,), tl.float32)
    bad = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + lane
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        g = tl.load(gate + at, at < width, 0.0)
        u = tl.load(gate + width + at, at < width, 0.0)
        g32 = g.to(tl.float32)
        y = (g32 * tl.sigmoid(g32)).to(g.dtype) * u
        if WIDE:
            tl.store(out + row * width + at, y, at < width)
        y32 = y.to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(y32), 1))
        bad += tl.sum(y32 * 0.0, 1)
        found, bits = packed(g32)
        tl.store(codes + at, found, at < width)
        tl.store(scales + block, bits, block < blocks)
        found, bits = packed(u.to(tl.float32))
        tl.store(codes + width + at, found, at < width)
        tl.store(scales + blocks + block, bits, block < blocks)
    top = tl.maximum(tl.max(most, 0), LEAST)
    tl.store(scale + row, tl.div_rn(top, TOP) + tl.sum(bad, 0))
    factor = tl.div_rn(TOP, top)
    # What is read a second time comes from the L2 cache.
    for start in range(0, blocks, BLOCKS):
        at = (start + lane)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        g = tl.load(gate + at, at < width, 0.0)
        u = tl.load(gate + width + at, at < width, 0.0)
        g32 = g.to(tl.float32)
        y = (g32 * tl.sigmoid(g32)).to(g.dtype) * u
        tl.store(values + row * width + at, narrowed(y.to(tl.float32) * factor, False), at < width)


@jit
def _gradients(codes, scales, grad, block, at, width, blocks):
    g = unpacked(codes, scales, block, at, width, blocks)
    u = unpacked(codes + width, scales + blocks, block, at, width, blocks)
    d = tl.load(grad + at, at < width, 0.0)
    d32, s = d.to(tl.float32), tl.sigmoid(g)
    return (d32 * u * s * (1.0 + g * (1.0 - s))).to(d.dtype), (d32 * g * s).to(d.dtype)


@jit
def _backward(
    codes,
    scales,
    grad,
    both,
    values,
    scale,
    width,
    blocks,
    WIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    codes, scales, dy = codes + row * 2 * width, scales + row * 2 * blocks, grad + row * width
    place, wide = values + row * 2 * width, both + row * 2 * width
    lane = tl.arange(0, BLOCKS)
    most = tl.zeros((BLOCKS,), tl.float32)
    bad = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, blocks, BLOCKS):
        at = (start + lane)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        d_gate, d_up = _gradients(codes, scales, dy, start + lane, at, width, blocks)
        if WIDE:
            tl.store(wide + at, d_gate, at < width)
            tl.store(wide + width + at, d_up, at < width)
        gate32, up32 = d_gate.to(tl.float32), d_up.to(tl.float32)
        most = tl.maximum(most, tl.max(tl.maximum(tl.abs(gate32), tl.abs(up32)), 1))
        bad += tl.sum(gate32 * 0.0 + up32 * 0.0, 1)
    top = tl.maximum(tl.max(most, 0), LEAST)
    tl.store(scale + row, tl.div_rn(top, TOP) + tl.sum(bad, 0))
    factor = tl.div_rn(TOP, top)
    # What is kept is little, so that both gradients are worked out again, of what comes from the L2 cache.
    for start in range(0, blocks, BLOCKS):
        at = (start + lane)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        d_gate, d_up = _gradients(codes, scales, dy, start + lane, at, width, blocks)
        tl.store(place + at, narrowed(d_gate.to(tl.float32) * factor, False), at < width)
        tl.store(place + width + at, narrowed(d_up.to(tl.float32) * factor, False), at < width)


def swiglu_packed_narrow(
    both: Tensor, width: int, kind: Kind, wide: bool
) -> tuple[Tensor | None, Narrow | None, Packed]:
    """``silu(gate) * up`` for the product that reads it, and gate and up as ``swiglu_packed`` keeps them.

    Args:
        both: as for ``swiglu_packed``.
        width: as for ``swiglu_packed``.
        kind: of the product.
        wide: whether the result of ``swiglu`` is wanted beside 8 bits.

    Returns:
        ``[tokens, width]`` where it is wanted; the same in 8 bits where the product is; and what is kept.
    """
    if not kind.narrow:
        out, kept = swiglu_packed(both, width)
        return out, None, kept
    if kind is not Kind.FP8 or not launches(both):
        out, kept = swiglu_packed(both, width)
        return out if wide else None, quantize(out, kind), kept
    result = torch.empty(len(both), width, dtype=both.dtype, device=both.device) if wide else None
    narrow, kept = empty_narrow(both, width, kind), empty_packed(both, width)
    _forward[(len(both),)](
        both,
        result,
        *narrow,
        kept.codes,
        kept.scales.view(torch.int16),
        width,
        both.stride(0),
        kept.scales.shape[1] // 2,
        WIDE=wide,
        TOP=TOP[kind],
        LEAST=LEAST,
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return result, narrow, kept


def swiglu_packed_backward_narrow(
    kept: Packed, grad: Tensor, kind: Kind, wide: bool, extra: int = 0
) -> tuple[Tensor, Narrow | None]:
    """The gradients of gate and up side by side for the product that reads them.

    Args:
        kept: as ``swiglu_packed`` gave it.
        grad: as for ``swiglu_packed_backward``.
        kind: of the product.
        wide: whether they are wanted in the dtype of ``grad`` beside 8 bits.
        extra: as for ``swiglu_packed_backward``, where the product is not in 8 bits.

    Returns:
        ``[tokens, 2 width + extra]``, which has the memory of one number where it is not wanted; and the same in 8
        bits where the product is, with one scale for a row of both.
    """
    if not kind.narrow:
        return swiglu_packed_backward(kept, grad, extra), None
    unread = grad.new_zeros(()).expand(kept.codes.shape)
    if kind is not Kind.FP8 or not launches(grad):
        both = swiglu_packed_backward(kept, grad)
        return both if wide else unread, quantize(both, kind)
    (tokens, width), grad = grad.shape, grad.contiguous()
    result = torch.empty(tokens, 2 * width, dtype=grad.dtype, device=grad.device) if wide else unread
    narrow = empty_narrow(grad, 2 * width, kind)
    _backward[(tokens,)](
        kept.codes,
        kept.scales.view(torch.int16),
        grad,
        result,
        *narrow,
        width,
        kept.scales.shape[1] // 2,
        WIDE=wide,
        TOP=TOP[kind],
        LEAST=LEAST,
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
        num_warps=8,
    )
    return result, narrow
