"""SwiGLU (Shazeer, 2020, equation 5, its products aside): silu(gate) * up, of two halves of one matrix.

With ``s = σ(gate)``::

    forward   y = gate · s · up
    backward  d_gate = dy · up · s · (1 + gate · (1 - s))
              d_up   = dy · gate · s

Computed in float32, element by element; stored in the dtype of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen_lit.kernels.eight import LEAST, TOP, Narrow, empty_narrow, narrowed, quantize, store_narrow
from qwen_lit.kernels.kinds import Kind
from qwen_lit.kernels.launch import cdiv, jit, launches, power_of_2, tl

BLOCK = 2048


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The reference of ``swiglu``."""
    return silu(gate) * up


@jit
def _forward(both, out, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(both + row * stride + at, inside, 0.0)
    u = tl.load(both + row * stride + width + at, inside, 0.0)
    gate32 = g.to(tl.float32)
    tl.store(out + row * width + at, (gate32 * tl.sigmoid(gate32)).to(g.dtype) * u, inside)


@jit
def _backward(both, grad, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = both + row * stride + at
    up = gate + width
    g = tl.load(gate, inside, 0.0).to(tl.float32)
    u = tl.load(up, inside, 0.0).to(tl.float32)
    d = tl.load(grad + row * width + at, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(up, d * g * s, inside)
    tl.store(gate, d * u * s * (1.0 + g * (1.0 - s)), inside)


@jit
def _forward_narrow(
    both,
    out,
    values,
    scale,
    width,
    stride,
    WIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(both + row * stride + at, inside, 0.0)
    u = tl.load(both + row * stride + width + at, inside, 0.0)
    g32 = g.to(tl.float32)
    y = (g32 * tl.sigmoid(g32)).to(g.dtype) * u
    if WIDE:
        tl.store(out + row * width + at, y, inside)
    store_narrow(y, values + row * width + at, scale + row, inside, TOP, LEAST)


@jit
def _gradients(gate, up, grad, at, inside):
    g = tl.load(gate + at, inside, 0.0)
    g32, u = g.to(tl.float32), tl.load(up + at, inside, 0.0).to(tl.float32)
    d = tl.load(grad + at, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(g32)
    return (d * u * s * (1.0 + g32 * (1.0 - s))).to(g.dtype), (d * g32 * s).to(g.dtype)


@jit
def _backward_narrow(
    both,
    grad,
    values,
    scale,
    width,
    stride,
    WIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    gate, dy = both + row * stride, grad + row * width
    up = gate + width
    most = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + lane
        d_gate, d_up = _gradients(gate, up, dy, at, at < width)
        if WIDE:
            tl.store(gate + at, d_gate, at < width)
            tl.store(up + at, d_up, at < width)
        wide_gate, wide_up = d_gate.to(tl.float32), d_up.to(tl.float32)
        most = tl.maximum(most, tl.maximum(tl.abs(wide_gate), tl.abs(wide_up)))
        bad += wide_gate * 0.0 + wide_up * 0.0
    top = tl.maximum(tl.max(most), LEAST)
    tl.store(scale + row, tl.div_rn(top, TOP) + tl.sum(bad))
    factor = tl.div_rn(TOP, top)
    # What one thread has written another may read.
    tl.debug_barrier()
    place = values + row * (2 * width)
    for start in range(0, width, BLOCK):
        at = start + lane
        if WIDE:
            d_gate = tl.load(gate + at, at < width, 0.0)
            d_up = tl.load(up + at, at < width, 0.0)
        else:
            d_gate, d_up = _gradients(gate, up, dy, at, at < width)
        tl.store(place + at, narrowed(d_gate.to(tl.float32) * factor, False), at < width)
        tl.store(place + width + at, narrowed(d_up.to(tl.float32) * factor, False), at < width)


def swiglu(both: Tensor, width: int) -> Tensor:
    """``silu(gate) * up``.

    Args:
        both: ``[tokens, ≥ 2 width]``: gate, then up.
        width: of each.

    Returns:
        ``[tokens, width]``, contiguous.
    """
    if not launches(both):
        return swiglu_reference(both[:, :width], both[:, width : 2 * width])
    out = torch.empty(both.shape[0], width, dtype=both.dtype, device=both.device)
    _forward[(both.shape[0], cdiv(width, BLOCK))](both, out, width, both.stride(0), BLOCK=BLOCK, num_warps=8)
    return out


def swiglu_backward_(both: Tensor, grad: Tensor) -> None:
    """Overwrite gate and up with their gradients, by the formula of the module.

    Args:
        both: ``[tokens, ≥ 2 width]`` as ``swiglu`` took it; overwritten.
        grad: ``[tokens, width]``, of the result of ``swiglu``.
    """
    width = grad.shape[1]
    if launches(both):
        grad = grad.contiguous()
        _backward[(both.shape[0], cdiv(width, BLOCK))](both, grad, width, both.stride(0), BLOCK=BLOCK, num_warps=8)
        return
    gate, up = both[:, :width], both[:, width : 2 * width]
    dtype = torch.promote_types(both.dtype, torch.float32)
    g, u, d = gate.to(dtype), up.to(dtype), grad.to(dtype)
    s = torch.sigmoid(g)
    both[:, : 2 * width] = torch.cat((d * u * s * (1 + g * (1 - s)), d * g * s), 1)


MOST_COLUMNS = 32768
"""Columns of a row that a program of forward holds at once."""
GRADIENTS_AT_ONCE = 4096
"""Columns of which a program of backward holds the gradients; what it reads a second time comes from the L2 cache."""


def swiglu_narrow(both: Tensor, width: int, kind: Kind, wide: bool) -> tuple[Tensor | None, Narrow]:
    """``silu(gate) * up`` in 8 bits.

    Args:
        both: as for ``swiglu``.
        width: as for ``swiglu``.
        kind: FP8 or INT8.
        wide: whether the result of ``swiglu`` is wanted beside it.
    """
    if kind is not Kind.FP8 or width > MOST_COLUMNS or not launches(both):
        out = swiglu(both, width)
        return out if wide else None, quantize(out, kind)
    result = torch.empty(len(both), width, dtype=both.dtype, device=both.device) if wide else None
    narrow = empty_narrow(both, width, kind)
    block = power_of_2(width)
    _forward_narrow[(len(both),)](
        both,
        result,
        *narrow,
        width,
        both.stride(0),
        WIDE=wide,
        TOP=TOP[kind],
        LEAST=LEAST,
        BLOCK=block,
        num_warps=max(4, min(32, block // 1024)),
    )
    return result, narrow


def swiglu_backward_narrow_(both: Tensor, grad: Tensor, kind: Kind, wide: bool) -> Narrow:
    """The gradients of gate and up side by side in 8 bits, with one scale for a row of both.

    Args:
        both: as for ``swiglu_backward_``; what it holds after this is defined only where ``wide`` is set.
        grad: as for ``swiglu_backward_``.
        kind: FP8 or INT8.
        wide: whether gate and up are overwritten with their gradients.
    """
    width = grad.shape[1]
    if kind is not Kind.FP8 or not launches(both):
        swiglu_backward_(both, grad)
        return quantize(both[:, : 2 * width], kind)
    grad, narrow = grad.contiguous(), empty_narrow(both, 2 * width, kind)
    _backward_narrow[(len(both),)](
        both,
        grad,
        *narrow,
        width,
        both.stride(0),
        WIDE=wide,
        TOP=TOP[kind],
        LEAST=LEAST,
        BLOCK=GRADIENTS_AT_ONCE,
        num_warps=16,
    )
    return narrow
