"""Numbers in 8 bits with a scale for each row, and products of them.

A row x of float numbers becomes x ≈ s · q, where q are e4m3 numbers or integers (``TOP`` is the largest of them)::

    s = max |x_i| / TOP,  q_i = round(x_i · TOP / max |x_i|)

Integers are taken of ``H x`` instead: blocks of 128 numbers are multiplied by the Hadamard matrix H of ones and minus
ones, ``H Hᵀ = 128``, which spreads a single large number over its block (Ashkboos et al., 2024, "QuaRot"). As
``x yᵀ = (H x)(H y)ᵀ / 128``, a product of two rows that are both transformed needs no inverse; the scale of each has
the factor 1 / sqrt(128).

Of rows a ``[m, k]`` with scales ``s_a`` and rows b ``[n, k]`` with scales ``s_b`` the product is::

    y_ij = s_a,i s_b,j Σ_l a_il b_jl + Σ_r low_ir lift_jr + bias_j

Numbers are never e5m2: its two bits of mantissa cost more than its range gives where each row has a scale. A row with
a number that is not finite has a scale that is none, so its products are not finite either.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_lit.kernels.kinds import Kind
from qwen_lit.kernels.launch import jit, launches, tl, triton

BLOCK = 128
"""Numbers of a row that are transformed together."""
DTYPES = {Kind.FP8: torch.float8_e4m3fn, Kind.INT8: torch.int8}
TOP = {Kind.FP8: 448.0, Kind.INT8: 127.0}
LEAST = 1e-12
"""Stands for the largest number of a row of zeros."""
MOST_COLUMNS = 8192
"""Columns of a row that a program holds; of a wider one so many at a time, which it reads twice."""
MOST_RANK = 128
"""Columns of ``low`` up to which they are added within the product of integers."""


class Narrow(NamedTuple):
    """A matrix in 8 bits."""

    values: Tensor
    """``[rows, columns]``, of ``DTYPES``."""
    scale: Tensor
    """float32 ``[rows]``."""


def empty_narrow(like: Tensor, columns: int, kind: Kind) -> Narrow:
    """Room for as many rows as another matrix has.

    Args:
        like: of the rows, on their device.
        columns: of a row.
        kind: FP8 or INT8.
    """
    values = torch.empty(len(like), columns, dtype=DTYPES[kind], device=like.device)
    return Narrow(values, torch.empty(len(like), dtype=torch.float32, device=like.device))


@cache
def hadamard(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The Hadamard matrix ``[BLOCK, BLOCK]`` by Sylvester's construction: ones and minus ones."""
    found = torch.ones(1, 1)
    while len(found) < BLOCK:
        found = torch.cat((torch.cat((found, found), 1), torch.cat((found, -found), 1)))
    return found.to(device, dtype)


def transformed(x: Tensor) -> Tensor:
    """Each block of a row times the Hadamard matrix, float32, without the factor 1 / sqrt(BLOCK)."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    return (blocks @ hadamard(x.device, torch.float32)).flatten(-2)


def rounded(x: Tensor, kind: Kind) -> Tensor:
    """Numbers that are scaled to at most ``TOP``, in 8 bits."""
    if kind is Kind.FP8:
        return x.to(DTYPES[kind])
    # Halves go away from zero.
    return torch.trunc(x + torch.copysign(torch.full_like(x, 0.5), x)).nan_to_num(0.0).to(torch.int8)


def quantize_reference(x: Tensor, kind: Kind) -> Narrow:
    """The reference of ``quantize``."""
    wide = x.float() if kind is Kind.FP8 else transformed(x)
    most = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    unit = 1.0 if kind is Kind.FP8 else BLOCK**-0.5
    scale = most / TOP[kind] * unit + (x.float() * 0).sum(-1, keepdim=True)
    return Narrow(rounded(wide * (TOP[kind] / most), kind), scale.flatten())


@jit
def narrowed(x, INTEGER: tl.constexpr):
    """Numbers that are scaled, as int8 or e4m3."""
    if INTEGER:
        return tl.where(x >= 0, x + 0.5, x - 0.5).to(tl.int32).to(tl.int8)
    else:
        return x.to(tl.float8e4nv)


@jit
def _quantize(x, out, scale, width, stride, TOP: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        value = tl.load(x + row * stride + start + lane, start + lane < width, 0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(value))
        bad += value * 0.0
    top = tl.maximum(tl.max(most), LEAST)
    tl.store(scale + row, tl.div_rn(top, TOP) + tl.sum(bad))
    up = tl.div_rn(TOP, top)
    for start in range(0, width, BLOCK):
        value = tl.load(x + row * stride + start + lane, start + lane < width, 0.0).to(tl.float32)
        tl.store(out + row * width + start + lane, narrowed(value * up, False), start + lane < width)


@jit
def _quantize_transformed(
    x,
    out,
    scale,
    matrix,
    rows,
    width,
    stride,
    UNIT: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    place = row[:, None] * stride + lane[None, :]
    turn = tl.load(matrix + lane[:, None] * BLOCK + lane[None, :])
    most = tl.zeros((ROWS,), tl.float32)
    bad = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, BLOCK):
        value = tl.dot(tl.load(x + place + start, inside, 0.0), turn)
        most = tl.maximum(most, tl.max(tl.abs(value), 1))
        bad += tl.sum(value * 0.0, 1)
    top = tl.maximum(most, LEAST)
    tl.store(scale + row, tl.div_rn(top, TOP) * UNIT + bad, row < rows)
    up = tl.div_rn(TOP, top)[:, None]
    for start in range(0, width, BLOCK):
        value = tl.dot(tl.load(x + place + start, inside, 0.0), turn)
        tl.store(out + row[:, None] * width + start + lane[None, :], narrowed(value * up, True), inside)


def quantize(x: Tensor, kind: Kind) -> Narrow:
    """A matrix in 8 bits, with a scale for each row.

    Args:
        x: ``[rows, columns]``, the rows may lie apart; for integers the columns are whole blocks.
        kind: FP8 or INT8.
    """
    if not launches(x):
        return quantize_reference(x, kind)
    rows, width = x.shape
    out, scale = empty_narrow(x, width, kind)
    if kind is Kind.FP8:
        block = min(triton.next_power_of_2(width), MOST_COLUMNS)
        _quantize[(rows,)](x, out, scale, width, x.stride(0), TOP=TOP[kind], LEAST=LEAST, BLOCK=block, num_warps=8)
    else:
        _quantize_transformed[(triton.cdiv(rows, 32),)](
            x,
            out,
            scale,
            hadamard(x.device, x.dtype),
            rows,
            width,
            x.stride(0),
            UNIT=BLOCK**-0.5,
            TOP=TOP[kind],
            LEAST=LEAST,
            ROWS=32,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return Narrow(out, scale)


def product_reference(
    a: Narrow,
    b: Narrow,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    lift: Tensor | None = None,
) -> Tensor:
    """The reference of ``product``; sums of integers are exact."""
    sums = a.values.double() @ b.values.double().t()
    y = sums.float() * a.scale[:, None] * b.scale[None, :]
    if low is not None and lift is not None:
        y = y + low.float() @ lift.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


@jit
def _product(
    a,
    b,
    out,
    scale_a,
    scale_b,
    bias,
    low,
    lift,
    rows,
    columns,
    depth,
    rank,
    low_stride,
    lift_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs that run at one time share rows and columns, so that these come from the L2 cache.
    down, across = tl.cdiv(rows, M), tl.cdiv(columns, N)
    tile = tl.program_id(0)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    row = (first + (tile % (GROUP * across)) % height) * M + tl.arange(0, M)
    column = (tile % (GROUP * across)) // height * N + tl.arange(0, N)
    lane = tl.arange(0, K)
    at_a = a + (row % rows)[:, None].to(tl.int64) * depth + lane[None, :]
    at_b = b + (column % columns)[None, :].to(tl.int64) * depth + lane[:, None]
    sums = tl.zeros((M, N), tl.int32)
    for start in range(0, depth, K):
        left = tl.load(at_a, (start + lane < depth)[None, :], 0)
        right = tl.load(at_b, (start + lane < depth)[:, None], 0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        at_a += K
        at_b += K
    there, within = (row < rows)[:, None], (column < columns)[None, :]
    y = sums.to(tl.float32) * tl.load(scale_a + row, row < rows, 0.0)[:, None]
    y = y * tl.load(scale_b + column, column < columns, 0.0)[None, :]
    if RANK > 0:
        lane = tl.arange(0, RANK)
        mine = (lane < rank)[None, :]
        left = tl.load(low + row[:, None].to(tl.int64) * low_stride + lane[None, :], there & mine, 0.0)
        right = tl.load(lift + column[:, None].to(tl.int64) * lift_stride + lane[None, :], within.T & mine, 0.0)
        y += tl.dot(left, right.T)
    if HAS_BIAS:
        y += tl.load(bias + column, column < columns, 0.0).to(tl.float32)[None, :]
    place = row[:, None].to(tl.int64) * out_stride + column[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), there & within)


TILE = {"M": 128, "N": 128, "K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
"""Of ``_product`` on every card."""


def product(
    a: Narrow,
    b: Narrow,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    lift: Tensor | None = None,
) -> Tensor:
    """``a bᵀ + low liftᵀ + bias`` ``[m, n]``, as the module says it.

    Args:
        a: ``[m, k]``.
        b: ``[n, k]`` of the same kind; k and n are multiples of 16.
        dtype: of the result.
        bias: ``[n]``.
        low: ``[m, r]`` in ``dtype``, beside it ``lift``; its rows may lie apart.
        lift: ``[n, r]`` in ``dtype``.
    """
    if not launches(a.values):
        return product_reference(a, b, dtype, bias, low, lift)
    inside = low is not None and low.shape[1] <= MOST_RANK and a.values.dtype == torch.int8
    if a.values.dtype == torch.int8:
        y = _integer_product(a, b, dtype, bias, low if inside else None, lift if inside else None)
    else:
        y = _fp8_product(a, b, dtype, bias)
    if low is not None and lift is not None and not inside:
        y.addmm_(low, lift.t())
    return y


def _fp8_product(a: Narrow, b: Narrow, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    if not a.values.is_cuda:
        return product_reference(a, b, dtype, bias)
    return torch._scaled_mm(
        a.values,
        b.values.t(),
        scale_a=a.scale[:, None],
        scale_b=b.scale[None, :],
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )


def _integer_product(
    a: Narrow, b: Narrow, dtype: torch.dtype, bias: Tensor | None, low: Tensor | None, lift: Tensor | None
) -> Tensor:
    (rows, depth), columns = a.values.shape, len(b.values)
    out = torch.empty(rows, columns, dtype=dtype, device=a.values.device)
    rank = 0 if low is None else low.shape[1]
    _product[(triton.cdiv(rows, TILE["M"]) * triton.cdiv(columns, TILE["N"]),)](
        a.values,
        b.values,
        out,
        a.scale,
        b.scale,
        bias,
        low,
        lift,
        rows,
        columns,
        depth,
        rank,
        0 if low is None else low.stride(0),
        0 if lift is None else lift.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        RANK=max(16, triton.next_power_of_2(rank)) if rank else 0,
        # A fused multiply-add would round once where the reference rounds twice.
        enable_fp_fusion=False,
        **TILE,
    )
    return out
