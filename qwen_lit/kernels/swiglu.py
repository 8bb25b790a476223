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

from qwen_lit.kernels.launch import jit, launches, tl, triton

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
    _forward[(both.shape[0], triton.cdiv(width, BLOCK))](both, out, width, both.stride(0), BLOCK=BLOCK, num_warps=8)
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
        _backward[(both.shape[0], triton.cdiv(width, BLOCK))](
            both, grad, width, both.stride(0), BLOCK=BLOCK, num_warps=8
        )
        return
    gate, up = both[:, :width], both[:, width : 2 * width]
    dtype = torch.promote_types(both.dtype, torch.float32)
    g, u, d = gate.to(dtype), up.to(dtype), grad.to(dtype)
    s = torch.sigmoid(g)
    both[:, : 2 * width] = torch.cat((d * u * s * (1 + g * (1 - s)), d * g * s), 1)
