"""Numbers in 8 bits with a scale for each row.

A row x of float numbers becomes x ≈ s · q, where q are e4m3 numbers or integers (``TOP`` is the largest of them)::

    s = max |x_i| / TOP,  q_i = round(x_i · TOP / max |x_i|)

Integers are taken of ``H x`` instead: blocks of 128 numbers are multiplied by the Hadamard matrix H of ones and minus
ones, ``H Hᵀ = 128``, which spreads a single large number over its block (Ashkboos et al., 2024, "QuaRot"). As
``x yᵀ = (H x)(H y)ᵀ / 128``, a product of two rows that are both transformed needs no inverse; the scale of each has
the factor 1 / sqrt(128).

Numbers are never e5m2: its two bits of mantissa cost more than its range gives where each row has a scale. A row with
a number that is not finite has a scale that is none, so its products are not finite either.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_lit.kernels.kinds import Kind
from qwen_lit.kernels.launch import cdiv, jit, launches, power_of_2, tl

BLOCK = 128
"""Numbers of a row that are transformed together."""
DTYPES = {Kind.FP8: torch.float8_e4m3fn, Kind.INT8: torch.int8}
TOP = {Kind.FP8: 448.0, Kind.INT8: 127.0}
LEAST = 1e-12
"""Stands for the largest number of a row of zeros."""
MOST_COLUMNS = 8192
"""Columns of a row that a program holds; of a wider one so many at a time, which it reads twice."""
TRANSFORMED_TILE, WIDE_TRANSFORMED_TILE = (16, 4), (2, 32)
"""Rows and blocks of a row that are transformed at a time: so few rows that the second reading of them all finds them
in the L2 cache."""
TRANSFORMED_PROGRAMS = 528
"""Programs at most that transform rows: four for each multiprocessor of an H100."""


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


def absent(like: Tensor, columns: int) -> Tensor:
    """Stands for a matrix that nothing reads: as many rows as another has, and the memory of one number.

    Args:
        like: of the rows, in the dtype that is wanted.
        columns: of a row.
    """
    return like.new_zeros(()).expand(len(like), columns)


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
    # torch divides a number by a tensor in two roundings, and tensors in one.
    up = torch.full_like(most, TOP[kind]) / most
    return Narrow(rounded(wide * up, kind), scale.flatten())


@jit
def narrowed(x, INTEGER: tl.constexpr):
    """Numbers that are scaled, as int8 or e4m3."""
    if INTEGER:
        return tl.where(x >= 0, x + 0.5, x - 0.5).to(tl.int32).to(tl.int8)
    else:
        return x.to(tl.float8e4nv)


@jit
def store_narrow(row, values, scale, inside, TOP: tl.constexpr, LEAST: tl.constexpr):
    """Store a whole row in e4m3, at ``values``, and its scale."""
    wide = row.to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(wide)), LEAST)
    tl.store(scale, tl.div_rn(top, TOP) + tl.sum(wide * 0.0))
    tl.store(values, narrowed(wide * tl.div_rn(TOP, top), False), inside)


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
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A tile is BLOCKS blocks of each of ROWS rows, one below the other.
    lane = tl.arange(0, BLOCK)
    turn = tl.load(matrix + lane[:, None] * BLOCK + lane[None, :])
    line = tl.arange(0, ROWS * BLOCKS)
    column = (line % BLOCKS)[:, None] * BLOCK + lane[None, :]
    # A program takes many rows, so that the matrix is read once for all of them.
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + line // BLOCKS)[:, None].to(tl.int64)
        most = tl.zeros((ROWS * BLOCKS,), tl.float32)
        bad = tl.zeros((ROWS * BLOCKS,), tl.float32)
        for start in range(0, width, BLOCKS * BLOCK):
            inside = (row < rows) & (start + column < width)
            value = tl.dot(tl.load(x + row * stride + start + column, inside, 0.0), turn)
            most = tl.maximum(most, tl.max(tl.abs(value), 1))
            bad += tl.sum(value * 0.0, 1)
        top = tl.maximum(tl.max(tl.reshape(most, (ROWS, BLOCKS)), 1), LEAST)
        bad = tl.sum(tl.reshape(bad, (ROWS, BLOCKS)), 1)
        mine = first + tl.arange(0, ROWS)
        tl.store(scale + mine, tl.div_rn(top, TOP) * UNIT + bad, mine < rows)
        up = tl.div_rn(TOP, top)
        up = tl.reshape(tl.broadcast_to(up[:, None], (ROWS, BLOCKS)), (ROWS * BLOCKS,))[:, None]
        # What is read a second time comes from the L2 cache.
        for start in range(0, width, BLOCKS * BLOCK):
            inside = (row < rows) & (start + column < width)
            value = tl.dot(tl.load(x + row * stride + start + column, inside, 0.0), turn)
            tl.store(out + row * width + start + column, narrowed(value * up, True), inside)


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
        block = min(power_of_2(width), MOST_COLUMNS)
        _quantize[(rows,)](x, out, scale, width, x.stride(0), TOP=TOP[kind], LEAST=LEAST, BLOCK=block, num_warps=8)
    else:
        lines, blocks = TRANSFORMED_TILE if width <= MOST_COLUMNS else WIDE_TRANSFORMED_TILE
        _quantize_transformed[(min(cdiv(rows, lines), TRANSFORMED_PROGRAMS),)](
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
            ROWS=lines,
            BLOCKS=blocks,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return Narrow(out, scale)
