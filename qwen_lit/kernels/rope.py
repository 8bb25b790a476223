"""Rotary position embedding (Su et al., 2021), with Qwen3's RMSNorm of each head before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen_lit.kernels.launch import jit, launches, tl, triton


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The plain twin of ``rope``, as transformers computes it."""
    if weight is not None:
        wide = x.float()
        x = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((left * c - right * s, right * c + left * s), -1)


@jit
def _rotate(
    x, cos, sin, weight, out, heads, eps, sign, HAS_NORM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    inside = head < heads
    lane = tl.arange(0, HALF)[None, :]
    at = (token * heads + head) * (2 * HALF) + lane
    a = tl.load(x + at, inside, 0.0).to(tl.float32)
    b = tl.load(x + at + HALF, inside, 0.0).to(tl.float32)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
        a = a * scale[:, None] * tl.load(weight + lane).to(tl.float32)
        b = b * scale[:, None] * tl.load(weight + HALF + lane).to(tl.float32)
    c = tl.load(cos + token * HALF + lane).to(tl.float32)
    s = tl.load(sin + token * HALF + lane).to(tl.float32) * sign
    tl.store(out + at, a * c - b * s, inside)
    tl.store(out + at + HALF, b * c + a * s, inside)


@jit
def _unnorm(x, weight, grad, out, heads, eps, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, 2 * HALF)
    base = (token * heads + head) * (2 * HALF)
    wide = tl.load(x + base + at).to(tl.float32)
    g = tl.load(grad + base + at).to(tl.float32) * tl.load(weight + at).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / (2 * HALF) + eps)
    hat = wide * scale
    tl.store(out + base + at, scale * (g - hat * (tl.sum(g * hat) / (2 * HALF))))


def _launch(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, sign: float) -> Tensor:
    tokens, heads, size = x.shape
    out = torch.empty_like(x)
    _rotate[(tokens,)](
        x, cos, sin, weight, out, heads, eps, sign,
        HAS_NORM=weight is not None, HALF=size // 2, HEADS=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x if weight is not None else None, cos, sin, weight)
        ctx.eps = eps
        return _launch(x, cos, sin, weight, eps, 1.0) if launches(x) else rope_reference(x, cos, sin, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, cos, sin, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        gpu = launches(grad)
        # The inverse of a rotation is the rotation by the opposite angle.
        grad = _launch(grad, cos, sin, None, 0.0, -1.0) if gpu else rope_reference(grad, cos, -sin, None, 0.0)
        if weight is not None:
            if gpu:
                tokens, heads, size = x.shape
                out = torch.empty_like(grad)
                _unnorm[(tokens, heads)](x, weight, grad, out, heads, ctx.eps, HALF=size // 2, num_warps=1)
                grad = out
            else:
                wide, g = x.float(), grad.float() * weight.float()
                scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ctx.eps)
                hat = wide * scale
                grad = (scale * (g - hat * (g * hat).mean(-1, keepdim=True))).to(x.dtype)
        return grad, None, None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Rotate each head by its token's position, after its RMSNorm where ``weight`` is given.

    Args:
        x: ``[tokens, heads, size]``, contiguous, ``size`` a power of two.
        cos: float ``[tokens, size / 2]``.
        sin: the same.
        weight: ``[size]``, frozen; None for models without q/k norm.
        eps: of the norm.
    """
    return _Rope.apply(x, cos, sin, weight, eps)  # type: ignore[no-any-return]
