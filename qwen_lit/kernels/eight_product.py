"""Products of rows in 8 bits (``eight.py``): of e4m3 by torch where it has them, else and of integers by kernels that
add what comes after.

Of rows a ``[m, k]`` with scales ``s_a`` and rows b ``[n, k]`` with scales ``s_b``::

    y_ij = s_a,i s_b,j Σ_l a_il b_jl + Σ_r low_ir lift_jr + bias_j

Sums of integers are exact: 127² times 2¹⁷ numbers are within 32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qwen_lit.kernels.eight import Narrow
from qwen_lit.kernels.launch import TensorDescriptor, cdiv, jit, launches, power_of_2, tl

MOST_RANK = 32
"""Columns of ``low`` up to which they are added within the product of integers; more do not fit beside its tiles."""


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
def _finished(
    sums,
    row,
    column,
    scale_a,
    scale_b,
    bias,
    low,
    lift,
    rows,
    columns,
    rank,
    low_stride,
    lift_stride,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
):
    y = sums.to(tl.float32) * tl.load(scale_a + row, row < rows, 0.0)[:, None]
    y = y * tl.load(scale_b + column, column < columns, 0.0)[None, :]
    if RANK > 0:
        lane = tl.arange(0, RANK)
        mine = (lane < rank)[None, :]
        left = low + row[:, None].to(tl.int64) * low_stride + lane[None, :]
        right = lift + column[:, None].to(tl.int64) * lift_stride + lane[None, :]
        left = tl.load(left, (row < rows)[:, None] & mine, 0.0)
        right = tl.load(right, (column < columns)[:, None] & mine, 0.0)
        y += tl.dot(left, right.T)
    if HAS_BIAS:
        y += tl.load(bias + column, column < columns, 0.0).to(tl.float32)[None, :]
    return y


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
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    INTEGER: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # a and b are bytes: integers, or e4m3.
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
    sums = tl.zeros((M, N), tl.int32 if INTEGER else tl.float32)
    for start in range(0, depth, K):
        left = tl.load(at_a, (start + lane < depth)[None, :], 0)
        right = tl.load(at_b, (start + lane < depth)[:, None], 0)
        if INTEGER:
            sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(left.to(tl.float8e4nv, bitcast=True), right.to(tl.float8e4nv, bitcast=True), sums)
        at_a += K
        at_b += K
    y = _finished(
        sums,
        row,
        column,
        scale_a,
        scale_b,
        bias,
        low,
        lift,
        rows,
        columns,
        rank,
        low_stride,
        lift_stride,
        HAS_BIAS,
        RANK,
    )
    there = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * columns + column[None, :], y.to(out.dtype.element_ty), there)


@jit
def _product_of_tiles(
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
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # As _product; a, b and out are descriptors of tiles, which the hardware copies, and a program computes many.
    down, across = tl.cdiv(rows, M), tl.cdiv(columns, N)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        first = tile // (GROUP * across) * GROUP
        height = tl.minimum(down - first, GROUP)
        top = (first + (tile % (GROUP * across)) % height) * M
        left = (tile % (GROUP * across)) // height * N
        sums = tl.zeros((M, N), tl.int32)
        for step in range(tl.cdiv(depth, K)):
            sums = tl.dot(a.load([top, step * K]), b.load([left, step * K]).T, sums, out_dtype=tl.int32)
        y = _finished(
            sums,
            top + tl.arange(0, M),
            left + tl.arange(0, N),
            scale_a,
            scale_b,
            bias,
            low,
            lift,
            rows,
            columns,
            rank,
            low_stride,
            lift_stride,
            HAS_BIAS,
            RANK,
        )
        # Half a tile at a time takes half of the shared memory.
        first_half, second_half = tl.split(tl.permute(tl.reshape(y, (M, 2, N // 2)), (0, 2, 1)))
        out.store([top, left], first_half.to(out.dtype))
        out.store([top, left + N // 2], second_half.to(out.dtype))


TILE = {"M": 128, "N": 128, "K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
"""Of ``_product``, on every card and of both kinds."""
COPIED_TILE = {"M": 128, "N": 256, "K": 128, "GROUP": 16, "num_warps": 8, "num_stages": 3}
"""Of ``_product_of_tiles``, on those with a tensor memory accelerator."""


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
        y = _integer_product(a, b, dtype, _Added(bias, low, lift) if inside else _Added(bias))
    else:
        y = _fp8_product(a, b, dtype, bias)
    if low is not None and lift is not None and not inside:
        y.addmm_(low, lift.t())
    return y


def _fp8_product(a: Narrow, b: Narrow, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    if a.values.is_cuda:
        try:
            return torch._scaled_mm(
                a.values,
                b.values.t(),
                scale_a=a.scale[:, None],
                scale_b=b.scale[None, :],
                bias=bias,
                out_dtype=dtype,
                use_fast_accum=True,
            )
        # cuBLAS has no product of few long rows (pytorch/ao#4582), and on some cards none with a scale for each row.
        except RuntimeError:
            pass
    return _product_by_pointers(a, b, dtype, _Added(bias))


@dataclass(frozen=True)
class _Added:
    """What is added to a product within its kernel."""

    bias: Tensor | None
    low: Tensor | None = None
    lift: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Arguments of both kernels."""
        return (self.bias, self.low, self.lift)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Rank and strides, arguments too."""
        if self.low is None or self.lift is None:
            return (0, 0, 0)
        return (self.low.shape[1], self.low.stride(0), self.lift.stride(0))

    @property
    def options(self) -> dict[str, object]:
        """Of both kernels."""
        rank = self.numbers[0]
        return {
            "HAS_BIAS": self.bias is not None,
            "RANK": max(16, power_of_2(rank)) if rank else 0,
            # A fused multiply-add would round once where the reference rounds twice.
            "enable_fp_fusion": False,
        }


def _integer_product(a: Narrow, b: Narrow, dtype: torch.dtype, added: _Added) -> Tensor:
    if copies_tiles(a.values.device):
        return _product_by_tiles(a, b, dtype, added)
    return _product_by_pointers(a, b, dtype, added)


def _product_by_pointers(a: Narrow, b: Narrow, dtype: torch.dtype, added: _Added) -> Tensor:
    (rows, depth), columns = a.values.shape, len(b.values)
    out = torch.empty(rows, columns, dtype=dtype, device=a.values.device)
    tiles = cdiv(rows, TILE["M"]) * cdiv(columns, TILE["N"])
    _product[(tiles,)](
        a.values.view(torch.int8),
        b.values.view(torch.int8),
        out,
        a.scale,
        b.scale,
        *added.tensors,
        rows,
        columns,
        depth,
        *added.numbers,
        INTEGER=a.values.dtype == torch.int8,
        **added.options,
        **TILE,
    )
    return out


def _product_by_tiles(a: Narrow, b: Narrow, dtype: torch.dtype, added: _Added) -> Tensor:
    (rows, depth), columns = a.values.shape, len(b.values)
    out = torch.empty(rows, columns, dtype=dtype, device=a.values.device)
    m, n, k = (COPIED_TILE[one] for one in "MNK")
    described = [
        TensorDescriptor.from_tensor(matrix, block)
        for matrix, block in ((a.values, [m, k]), (b.values, [n, k]), (out, [m, n // 2]))
    ]
    programs = min(cdiv(rows, m) * cdiv(columns, n), multiprocessors(a.values.device))
    _product_of_tiles[(programs,)](
        *described,
        a.scale,
        b.scale,
        *added.tensors,
        rows,
        columns,
        depth,
        *added.numbers,
        PROGRAMS=programs,
        **added.options,
        **COPIED_TILE,
    )
    return out


@cache
def copies_tiles(device: torch.device) -> bool:
    """Whether products of integers take the kernel for Hopper's tensor memory accelerator."""
    return TensorDescriptor is not None and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
