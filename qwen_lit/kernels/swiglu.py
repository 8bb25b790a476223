"""SwiGLU (Shazeer, 2020): silu(gate) * up."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen_lit.kernels.launch import jit, on_gpu, tl, triton

BLOCK = 2048


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The plain twin of ``swiglu``."""
    return silu(gate) * up


@jit
def _forward(gate, up, out, count, BLOCK: "tl.constexpr"):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, inside, 0.0)
    u = tl.load(up + at, inside, 0.0)
    wide = g.to(tl.float32)
    tl.store(out + at, (wide * tl.sigmoid(wide)).to(g.dtype) * u, inside)


@jit
def _backward(gate, up, grad, d_gate, d_up, count, BLOCK: "tl.constexpr"):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + at, inside, 0.0).to(tl.float32)
    d = tl.load(grad + at, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_up + at, d * g * s, inside)
    tl.store(d_gate + at, d * u * s * (1.0 + g * (1.0 - s)), inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if not on_gpu(gate):
            return swiglu_reference(gate, up)
        out = torch.empty_like(gate)
        _forward[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=8)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        grad = grads[0].contiguous()
        if on_gpu(gate):
            d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
            _backward[(triton.cdiv(gate.numel(), BLOCK),)](
                gate, up, grad, d_gate, d_up, gate.numel(), BLOCK=BLOCK, num_warps=8
            )
            return d_gate, d_up
        g, u, d = gate.float(), up.float(), grad.float()
        s = torch.sigmoid(g)
        return (d * u * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``; both contiguous and of one shape and dtype, which the result has too."""
    return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return]
