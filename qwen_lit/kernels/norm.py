"""RMSNorm with the residual addition before it (Zhang and Sennrich, 2019, equation 4).

With ``t = residual + delta`` and ``RMS(t) = sqrt(mean(t²) + eps)`` over the ``n`` numbers of a row::

    forward   y_i = w_i t_i / RMS(t)
    backward  with g_i = w_i dy_i and x̂_i = t_i / RMS(t)
              dt_i = (g_i - x̂_i · (Σ_j g_j x̂_j) / n) / RMS(t) + dt_i from the residual stream

``dt`` is the gradient of both addends. ``w`` is frozen and has none. Rows are summed in float32; what is stored has
the dtype of the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen_lit.kernels.eight import LEAST, TOP, Narrow, absent, empty_narrow, quantize, store_narrow
from qwen_lit.kernels.footprint import LinearSize, Op, Saved, eight_bits, forward_columns_of, rank_of
from qwen_lit.kernels.kinds import Kind
from qwen_lit.kernels.launch import jit, launches, power_of_2, tl


def add_norm_reference(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The reference of ``add_norm``: as transformers computes it."""
    total = residual if delta is None else residual + delta
    x32 = total.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * normed.to(total.dtype)


@jit
def _forward(
    residual,
    delta,
    weight,
    total,
    normed,
    rstd,
    values,
    unit,
    width,
    stride,
    eps,
    HAS_DELTA: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(residual + row * width + columns, inside, 0.0)
    if HAS_DELTA:
        x = (x.to(tl.float32) + tl.load(delta + row * width + columns, inside, 0.0).to(tl.float32)).to(x.dtype)
        tl.store(total + row * width + columns, x, inside)
    x32 = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x32 * x32) / width + eps)
    tl.store(rstd + row, scale)
    w = tl.load(weight + columns, inside, 0.0)
    y = (x32 * scale).to(x.dtype) * w
    if WIDE:
        tl.store(normed + row * stride + columns, y, inside)
    if NARROW:
        store_narrow(y, values + row * width + columns, unit + row, inside, TOP, LEAST)


@jit
def _backward(
    total,
    weight,
    rstd,
    d_normed,
    d_total,
    out,
    width,
    d_stride,
    stride,
    HAS_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(total + row * width + columns, inside, 0.0).to(tl.float32)
    w = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    g = tl.load(d_normed + row * width + columns, inside, 0.0).to(tl.float32) * w
    scale = tl.load(rstd + row)
    x_hat = x * scale
    grad = scale * (g - x_hat * (tl.sum(g * x_hat) / width))
    if HAS_TOTAL:
        grad += tl.load(d_total + row * d_stride + columns, inside, 0.0).to(tl.float32)
    tl.store(out + row * stride + columns, grad, inside)


class _AddNorm(torch.autograd.Function):
    """Saves the sum ``[tokens, width]`` and 1/RMS, float32 ``[tokens]``; backward states the formula of the module."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        eps: float,
        columns: int,
        columns_back: int,
        kind: Kind,
        wide: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        rows, width = residual.shape
        residual, delta = residual.contiguous(), None if delta is None else delta.contiguous()
        fused = kind is Kind.FP8 and launches(residual)
        narrow = empty_narrow(residual, width, kind) if fused else None
        normed = absent(residual, width)
        if wide or not fused:
            normed = torch.empty(rows, width + columns, dtype=residual.dtype, device=residual.device)[:, :width]
        if launches(residual):
            total = residual if delta is None else torch.empty_like(residual)
            rstd = torch.empty(rows, dtype=torch.float32, device=residual.device)
            _forward[(rows,)](
                residual,
                delta,
                weight,
                total,
                normed,
                rstd,
                None if narrow is None else narrow.values,
                None if narrow is None else narrow.scale,
                width,
                width + columns,
                eps,
                HAS_DELTA=delta is not None,
                WIDE=wide or not fused,
                NARROW=fused,
                TOP=TOP[Kind.FP8],
                LEAST=LEAST,
                BLOCK=power_of_2(width),
                num_warps=8,
            )
        else:
            total, plain = add_norm_reference(residual, delta, weight, eps)
            normed.copy_(plain)
            rstd = torch.rsqrt(total.float().pow(2).mean(-1) + eps).flatten()
        if kind.narrow and narrow is None:
            narrow = quantize(normed, kind)
        if not wide:
            normed = absent(residual, width)
        ctx.save_for_backward(total, weight, rstd)
        ctx.has_delta, ctx.columns_back = delta is not None, columns_back
        if delta is None:
            # An input that is returned as it came must be marked; a view of it keeps the graph right.
            total = total.view_as(total)
        if narrow is None:
            return total, normed, None, None
        ctx.mark_non_differentiable(*narrow)
        return total, normed, *narrow

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_total, d_normed, *_ = grads
        total, weight, rstd = ctx.saved_tensors
        rows, width = total.shape
        out = torch.empty(rows, width + ctx.columns_back, dtype=total.dtype, device=total.device)[:, :width]
        if launches(total):
            if d_total is not None and d_total.stride(1) != 1:
                d_total = d_total.contiguous()
            _backward[(rows,)](
                total,
                weight,
                rstd,
                d_normed.contiguous(),
                d_total,
                out,
                width,
                0 if d_total is None else d_total.stride(0),
                out.stride(0),
                HAS_TOTAL=d_total is not None,
                BLOCK=power_of_2(width),
                num_warps=8,
            )
        else:
            scale = rstd.view(rows, 1)
            x_hat = total.float() * scale
            g = d_normed.float() * weight.float()
            grad32 = scale * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
            out.copy_(grad32 if d_total is None else grad32 + d_total.float())
        return out, out if ctx.has_delta else None, None, None, None, None, None, None


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    columns: int = 0,
    columns_back: int = 0,
    kind: Kind = Kind.WIDE,
    wide: bool = True,
) -> tuple[Tensor, Tensor, Narrow | None]:
    """``residual + delta`` and its RMSNorm.

    Args:
        residual: ``[tokens, width]``.
        delta: the same shape, or None.
        weight: ``[width]``, frozen.
        eps: added to the mean square.
        columns: numbers of free space after each row of the normed sum, for the product with LoRA's A.
        columns_back: free space after each row of the gradient of both inputs.
        kind: in which the normed sum is wanted too.
        wide: whether the normed sum is read in the dtype of ``residual``; otherwise it is ``absent``.

    Returns:
        The sum and the normed sum, both ``[tokens, width]`` in the dtype of ``residual``; and the normed sum in 8
        bits where ``kind`` asks for it.
    """
    total, normed, values, scale = _AddNorm.apply(residual, delta, weight, eps, columns, columns_back, kind, wide)
    return total, normed, None if values is None else Narrow(values, scale)


def add_norm_op(name: str, width: int, size: int, group: tuple[LinearSize, ...], columns_back: int) -> Op:
    """What ``add_norm`` costs; whether its result is saved, the next operation tells.

    Args:
        name: of the norm.
        width: of the residual stream.
        size: bytes of a number.
        group: the linears that read its result; none for the head.
        columns_back: as of ``add_norm``.
    """
    narrow = bool(group) and group[0].passes.forward.narrow
    columns = forward_columns_of(group) if group else 0
    return Op(
        name,
        (Saved("sum of the residual", width * size), Saved("1 / RMS, float32", 4)),
        # Without an adapter nothing reads it but in 8 bits.
        output=0 if narrow and not rank_of(group) else (width + columns) * size,
        beside=eight_bits(width) * narrow,
        grad=(width + columns_back) * size,
        joins_residual=True,
    )
