"""SwiGLU that keeps gate and up for its backward in 8 bits: integers, with a scale for each block of 128 numbers of a
row.

With ``scale = max |x| / 127`` of a block, rounded up to bf16::

    code = round(x / scale), half to even
    x̂    = code · scale, which backward takes for x

Scales are bf16: they have the range of the numbers themselves, where those of fp16 end at 65,504. Rounded up, a scale
is at most 0.8 % too large, and never lets a code go beyond 127. The result of forward is that of ``swiglu``, to the
bit. A block with a number that is not finite comes back as NaN, one whose numbers are all below ``SMALLEST`` as zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwen_lit.kernels.launch import cdiv, jit, launches, tl
from qwen_lit.kernels.swiglu import swiglu_backward_, swiglu_reference

BLOCK = 128
"""Numbers that share a scale."""
BLOCKS = 16
"""Blocks of gate and of up that one program of the device works on."""
SMALLEST = 2.0**-118
"""The least maximum of a block whose scale and its inverse are normal numbers of float32."""

_LEAST, _INFINITY, _NAN = 0x04800000, 0x7F800000, 0x7FC0
"""The bits of ``SMALLEST`` and of infinity in float32, and those of a NaN in bf16."""


class Packed(NamedTuple):
    """Gate and up in 8 bits."""

    codes: Tensor
    """int8 ``[tokens, 2 width]``: gate, then up."""
    scales: Tensor
    """bf16 ``[tokens, 2 blocks]``: those of gate, then those of up."""


def scales_of(width: int) -> int:
    """Blocks of gate and up together, the last one of each with fewer numbers.

    Args:
        width: of each.
    """
    return 2 * -(-width // BLOCK)


def packed_bytes(width: int) -> int:
    """Bytes a token of ``Packed``; argument as of ``scales_of``."""
    return 2 * width + 2 * scales_of(width)


def empty_packed(like: Tensor, width: int) -> Packed:
    """Room for gate and up of as many tokens as another matrix has.

    Args:
        like: of the tokens, on their device.
        width: of gate and of up.
    """
    codes = torch.empty(len(like), 2 * width, dtype=torch.int8, device=like.device)
    return Packed(codes, torch.empty(len(like), scales_of(width), dtype=torch.bfloat16, device=like.device))


def pack_reference(both: Tensor, width: int) -> Packed:
    """Gate and up in 8 bits, bit for bit as the kernel writes them."""
    x = pad(both[:, : 2 * width].float().reshape(-1, 2, width), (0, -width % BLOCK)).view(len(both), -1, BLOCK)
    # As integers, NaN is above infinity, and infinity above all that is finite.
    most = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True)
    usable = (most >= _LEAST) & (most < _INFINITY)
    scale = torch.where(usable, most.view(torch.float32), 127.0) / 127.0
    bits = (scale.view(torch.int32) + 0xFFFF) >> 16
    codes = (torch.where(usable, x, 0.0) * (1.0 / (bits << 16).view(torch.float32))).round()
    bits = torch.where(usable, bits, (most >= _INFINITY) * _NAN)
    codes = codes.to(torch.int8).view(len(both), 2, -1)[:, :, :width].reshape(len(both), 2 * width)
    return Packed(codes, bits.squeeze(-1).to(torch.int16).view(torch.bfloat16))


def unpack_reference(kept: Packed) -> Tensor:
    """Gate and up as backward takes them, float32 ``[tokens, 2 width]``."""
    codes, scales = kept
    tokens, width = codes.shape[0], codes.shape[1] // 2
    every = scales.float().view(tokens, 2, -1).repeat_interleave(BLOCK, -1)[:, :, :width]
    return (codes.view(tokens, 2, width) * every).view(tokens, 2 * width)


@jit
def packed(x):
    """Codes of float32 ``[blocks, numbers]``, and the bits of their scales in bf16, ``[blocks]``.

    A kernel that calls it is compiled without fused products and sums: they are not rounded in between, and a code
    could differ from the reference's.
    """
    most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    usable = (most >= 0x04800000) & (most < 0x7F800000)
    scale = tl.div_rn(tl.where(usable, most.to(tl.float32, bitcast=True), 127.0), 127.0)
    bits = (scale.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    inverse = tl.div_rn(1.0, (bits << 16).to(tl.float32, bitcast=True))
    # Adding 1.5 · 2²³ rounds to whole numbers, half to even.
    codes = tl.where(usable[:, None], x, 0.0) * inverse[:, None] + 12582912.0 - 12582912.0
    bits = tl.where(usable, bits, tl.where(most >= 0x7F800000, 0x7FC0, 0))
    return codes.to(tl.int8), bits.to(tl.int16)


@jit
def unpacked(codes, scales, block, at, width, blocks):
    """Numbers of gate or of up as backward takes them, float32 ``[blocks, numbers]``."""
    scale = (tl.load(scales + block, block < blocks, 0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.load(codes + at, at < width, 0).to(tl.float32) * scale[:, None]


@jit
def _forward(
    both,
    out,
    codes,
    scales,
    width,
    stride,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, there = at < width, block < blocks
    g = tl.load(both + row * stride + at, inside, 0.0)
    u = tl.load(both + row * stride + width + at, inside, 0.0)
    gate32 = g.to(tl.float32)
    tl.store(out + row * width + at, (gate32 * tl.sigmoid(gate32)).to(g.dtype) * u, inside)
    found, scale = packed(gate32)
    tl.store(codes + row * 2 * width + at, found, inside)
    tl.store(scales + row * 2 * blocks + block, scale, there)
    found, scale = packed(u.to(tl.float32))
    tl.store(codes + row * 2 * width + width + at, found, inside)
    tl.store(scales + row * 2 * blocks + blocks + block, scale, there)


@jit
def _backward(codes, scales, grad, both, width, stride, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < width
    codes, scales = codes + row * 2 * width, scales + row * 2 * blocks
    g = unpacked(codes, scales, block, at, width, blocks)
    u = unpacked(codes + width, scales + blocks, block, at, width, blocks)
    d = tl.load(grad + row * width + at, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(both + row * stride + at, d * u * s * (1.0 + g * (1.0 - s)), inside)
    tl.store(both + row * stride + width + at, d * g * s, inside)


def swiglu_packed(both: Tensor, width: int) -> tuple[Tensor, Packed]:
    """``silu(gate) * up``, and gate and up in 8 bits, in one pass over them.

    Args:
        both: ``[tokens, ≥ 2 width]``: gate, then up.
        width: of each.

    Returns:
        ``[tokens, width]``, contiguous, as ``swiglu`` computes it; and what ``swiglu_packed_backward`` needs.
    """
    if not launches(both):
        return swiglu_reference(both[:, :width], both[:, width : 2 * width]), pack_reference(both, width)
    out = torch.empty(len(both), width, dtype=both.dtype, device=both.device)
    codes, scales = found = empty_packed(both, width)
    _forward[(len(both), cdiv(width, BLOCK * BLOCKS))](
        both,
        out,
        codes,
        scales.view(torch.int16),
        width,
        both.stride(0),
        scales.shape[1] // 2,
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out, found


def swiglu_packed_backward(kept: Packed, grad: Tensor, extra: int = 0) -> Tensor:
    """The gradients of gate and up, by the formula of ``kernels/swiglu.py``.

    Args:
        kept: as ``swiglu_packed`` gave it.
        grad: ``[tokens, width]``, of the result of ``swiglu_packed``.
        extra: columns that are left free on the right.

    Returns:
        ``[tokens, 2 width + extra]`` in the dtype of ``grad``: gate's, up's, and what is undefined.
    """
    tokens, width = grad.shape
    both = torch.empty(tokens, 2 * width + extra, dtype=grad.dtype, device=grad.device)
    if not launches(grad):
        wide = unpack_reference(kept)
        swiglu_backward_(wide, grad)
        both[:, : 2 * width] = wide
        return both
    codes, scales = kept
    _backward[(tokens, cdiv(width, BLOCK * BLOCKS))](
        codes,
        scales.view(torch.int16),
        grad.contiguous(),
        both,
        width,
        both.stride(0),
        scales.shape[1] // 2,
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
        num_warps=8,
    )
    return both
