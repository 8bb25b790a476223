"""Dropout by a mask that is a function of a seed and the position alone, so that backward draws it again."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_lit.kernels.launch import jit, launches, tl, triton

BLOCK = 4096


def dropped_reference(x: Tensor, p: float, seed: int) -> Tensor:
    """The plain twin of ``dropped``; it draws other numbers than the kernel, from the same seed always the same."""
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * keep.to(x.dtype) / (1 - p)


@jit
def _dropout(x, out, add, count, width, stride, p, seed, HAS_ADD: tl.constexpr, BLOCK: tl.constexpr):
    # One draw gives four numbers, one for each quarter of the block.
    lanes = tl.arange(0, BLOCK // 4)
    draws = tl.rand4x(seed, (tl.program_id(0) * (BLOCK // 4) + lanes).to(tl.int32))
    start = tl.program_id(0).to(tl.int64) * BLOCK
    scale = 1.0 / (1.0 - p)
    for quarter in tl.static_range(4):
        at = start + quarter * (BLOCK // 4) + lanes
        inside = at < count
        value = tl.load(x + (at // width) * stride + at % width, inside, 0.0).to(tl.float32)
        value = tl.where(draws[quarter] >= p, value * scale, 0.0)
        if HAS_ADD:
            value += tl.load(add + at, inside, 0.0).to(tl.float32)
        tl.store(out + at, value, inside)


def dropped(x: Tensor, p: float, seed: int, add: Tensor | None = None) -> Tensor:
    """``dropout(x) + add`` by a mask that is a function of the seed and the position alone.

    Args:
        x: ``[rows, width]``; its rows may lie apart.
        p: share of zeros; the rest is divided by ``1 - p``.
        seed: below 2**31.
        add: of the same shape, contiguous; overwritten with the result where the kernel runs.

    Returns:
        Contiguous, of the shape and dtype of ``x``.
    """
    if not launches(x):
        masked = dropped_reference(x, p, seed)
        return masked if add is None else masked + add
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if add is None else add
    _dropout[(triton.cdiv(x.numel(), BLOCK),)](
        x, out, add, x.numel(), x.shape[1], x.stride(0), p, seed, HAS_ADD=add is not None, BLOCK=BLOCK, num_warps=8
    )
    return out
