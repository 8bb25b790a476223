"""Dropout (Srivastava et al., 2014) by a mask that is a function of a seed and the position alone.

With ``m`` of 0 and 1, drawn by Philox (Salmon et al., 2011) from seed and position, and ``p`` the share of zeros::

    forward   y = x · m / (1 - p)
    backward  dx = dy · m / (1 - p)

Backward draws ``m`` again from the same seed, so no mask is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_lit.kernels.launch import cdiv, jit, launches, tl

BLOCK = 512
"""Columns of one program; eight of them share one draw, sixteen bits each."""


@dataclass(frozen=True)
class Seed:
    """A seed of which a part is on the device, read when the mask is drawn: a replayed CUDA graph draws by what stands
    there then."""

    on_device: Tensor
    """int64 ``[1]``, below 2**30."""
    offset: int = 0
    """What is added to it."""

    def __add__(self, more: int) -> Seed:
        return Seed(self.on_device, self.offset + more)

    def __int__(self) -> int:
        return int(self.on_device) + self.offset


def dropped_reference(x: Tensor, p: float, seed: int | Seed) -> Tensor:
    """The reference of ``dropped``. Its numbers differ from the kernel's, and are the same for the same seed."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * keep.to(x.dtype) / (1 - p)


@jit
def _dropout(
    x,
    out,
    add,
    width,
    stride,
    threshold,
    scale,
    seed,
    on_device,
    HAS_ADD: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if ON_DEVICE:
        seed += tl.load(on_device)
    row, block = tl.program_id(0), tl.program_id(1)
    lane = (row * tl.num_programs(1) + block) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    # Seven rounds of Philox pass the tests of its authors (Salmon et al., 2011, table 2).
    first, second, third, fourth = tl.randint4x(seed, lane, n_rounds=7)
    words = tl.join(tl.join(first, second), tl.join(third, fourth))
    draws = tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (BLOCK,))
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row.to(tl.int64) * stride + at, inside, 0.0).to(tl.float32)
    value = tl.where(draws >= threshold, value * scale, 0.0)
    place = row.to(tl.int64) * width + at
    if HAS_ADD:
        value += tl.load(add + place, inside, 0.0).to(tl.float32)
    tl.store(out + place, value, inside)


def dropped(x: Tensor, p: float, seed: int | Seed, add: Tensor | None = None) -> Tensor:
    """``dropout(x) + add`` by a mask that is a function of the seed and the position alone.

    Args:
        x: ``[rows, width]``; its rows may lie apart.
        p: share of zeros, which the kernel takes to the nearest 1/65,536; the rest is divided by ``1 - p``.
        seed: below 2**31.
        add: of the same shape, contiguous; overwritten with the result where the kernel runs.

    Returns:
        Contiguous, of the shape and dtype of ``x``.
    """
    if not launches(x):
        masked = dropped_reference(x, p, seed)
        return masked if add is None else masked + add
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if add is None else add
    threshold = min(round(p * 2**16), 2**16 - 1)
    number, on_device = (seed.offset, seed.on_device) if isinstance(seed, Seed) else (seed, None)
    _dropout[(x.shape[0], cdiv(x.shape[1], BLOCK))](
        x,
        out,
        add,
        x.shape[1],
        x.stride(0),
        threshold,
        1 / (1 - threshold / 2**16),
        number,
        on_device,
        HAS_ADD=add is not None,
        ON_DEVICE=on_device is not None,
        BLOCK=BLOCK,
        num_warps=2,
    )
    return out
