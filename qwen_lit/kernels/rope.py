"""Rotary position embedding (Su et al., 2021, equation 34), with Qwen3's RMSNorm of each head before it.

A head ``x = [a, b]`` of two halves at a position with angles θ, float ``[size / 2]``::

    forward   [a', b'] = [a cos θ - b sin θ, b cos θ + a sin θ]
    backward  the rotation by -θ, its inverse:  [da, db] = [da' cos θ + db' sin θ, db' cos θ - da' sin θ]

Where a norm comes before it, ``x̂ = x / RMS(x)`` is rotated after its multiplication with ``w``, and backward goes on
with ``dx = (g - x̂ · mean(g x̂)) / RMS(x)`` for ``g = w · (the rotated-back gradient)``, as in ``norm.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_lit.kernels.launch import jit, launches, power_of_2, tl


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The reference of ``rope``: as transformers computes it."""
    if weight is not None:
        x32 = x.float()
        x = weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((left * c - right * s, right * c + left * s), -1)


@jit
def _rotate(
    x,
    cos,
    sin,
    weight,
    out,
    heads,
    stride,
    out_stride,
    eps,
    sign,
    HAS_NORM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    inside = head < heads
    lane = tl.arange(0, HALF)[None, :]
    at = head * (2 * HALF) + lane
    a = tl.load(x + token * stride + at, inside, 0.0).to(tl.float32)
    b = tl.load(x + token * stride + at + HALF, inside, 0.0).to(tl.float32)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
        a = a * scale[:, None] * tl.load(weight + lane).to(tl.float32)
        b = b * scale[:, None] * tl.load(weight + HALF + lane).to(tl.float32)
    c = tl.load(cos + token * HALF + lane).to(tl.float32)
    s = tl.load(sin + token * HALF + lane).to(tl.float32) * sign
    tl.store(out + token * out_stride + at, a * c - b * s, inside)
    tl.store(out + token * out_stride + at + HALF, b * c + a * s, inside)


@jit
def _unnorm(x, weight, grad, heads, stride, grad_stride, eps, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * (2 * HALF) + tl.arange(0, 2 * HALF)
    x32 = tl.load(x + token * stride + at).to(tl.float32)
    place = grad + token * grad_stride + at
    g = tl.load(place).to(tl.float32) * tl.load(weight + tl.arange(0, 2 * HALF)).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x32 * x32) / (2 * HALF) + eps)
    hat = x32 * scale
    tl.store(place, scale * (g - hat * (tl.sum(g * hat) / (2 * HALF))))


def _launch(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, sign: float, out: Tensor) -> None:
    tokens, heads, size = x.shape
    _rotate[(tokens,)](
        x,
        cos,
        sin,
        weight,
        out,
        heads,
        x.stride(0),
        out.stride(0),
        eps,
        sign,
        HAS_NORM=weight is not None,
        HALF=size // 2,
        HEADS=power_of_2(heads),
        num_warps=4,
    )


def rope(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, out: Tensor) -> None:
    """Rotate each head by its token's position, after its RMSNorm where ``weight`` is given.

    Args:
        x: ``[tokens, heads, size]``, ``size`` a power of two; the rows of tokens may lie apart.
        cos: float ``[tokens, size / 2]``.
        sin: float ``[tokens, size / 2]``.
        weight: ``[size]``, frozen; None for models without q/k norm.
        eps: of the norm.
        out: as ``x``, overwritten; it may be ``x`` itself.
    """
    if launches(x):
        _launch(x, cos, sin, weight, eps, 1.0, out)
    else:
        out.copy_(rope_reference(x, cos, sin, weight, eps))


def rope_backward(
    grad: Tensor, cos: Tensor, sin: Tensor, x: Tensor | None, weight: Tensor | None, eps: float, out: Tensor
) -> None:
    """The gradient of ``rope``'s input.

    Args:
        grad: ``[tokens, heads, size]``, of its result.
        cos: as ``rope`` took it.
        sin: as ``rope`` took it.
        x: the input of ``rope``, before its norm; read only where there is a ``weight``.
        weight: as ``rope`` took it.
        eps: as ``rope`` took it.
        out: as ``grad``, overwritten; the rows of tokens may lie apart.
    """
    # The inverse of a rotation is the rotation by the opposite angle.
    if launches(grad):
        grad = grad if grad.stride(2) == 1 and grad.stride(1) == grad.shape[2] else grad.contiguous()
        _launch(grad, cos, sin, None, 0.0, -1.0, out)
        if weight is not None and x is not None:
            tokens, heads, size = x.shape
            _unnorm[(tokens, heads)](
                x, weight, out, heads, x.stride(0), out.stride(0), eps, HALF=size // 2, num_warps=1
            )
        return
    turned = rope_reference(grad, cos, -sin, None, 0.0)
    if weight is not None and x is not None:
        x32, g = x.float(), turned.float() * weight.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        hat = x32 * scale
        turned = scale * (g - hat * (g * hat).mean(-1, keepdim=True))
    out.copy_(turned)
