"""Rows of a matrix in pinned host memory, read by the device itself: an embedding that takes no memory there.

Forward copies the rows; the matrix is frozen, so there is no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from qwen_lit.kernels.launch import HAS_TRITON, INTERPRETED, cdiv, jit, tl

BLOCK = 1024


def host_rows_reference(table: Tensor, ids: Tensor) -> Tensor:
    """The reference of ``host_rows``: rows are looked up on the host and copied, for which the host waits."""
    return embedding(ids.to(table.device), table).to(ids.device)


@jit
def _rows(table, ids, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(table + tl.load(ids + row) * width + at, inside, 0.0)
    tl.store(out + row * width + at, value, inside)


def can_read_host(table: Tensor) -> bool:
    """Whether the device reads this matrix by itself: it is contiguous and pinned."""
    return INTERPRETED or (HAS_TRITON and not table.is_cuda and table.is_contiguous() and table.is_pinned())


def host_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of a matrix by their numbers; nothing waits for them.

    Args:
        table: ``[rows, width]`` on the host, for which ``can_read_host`` is true.
        ids: int64 ``[n]``, on the device.

    Returns:
        ``[n, width]`` on the device of ``ids``.
    """
    width = table.shape[1]
    out = torch.empty(len(ids), width, dtype=table.dtype, device=ids.device)
    _rows[(len(ids), cdiv(width, BLOCK))](table, ids, out, width, BLOCK=BLOCK)
    return out
