"""Products of rows with the matrices of the experts that they pass, one after another or in one call of the GPU's.

Rows are sorted by expert: those of an expert stand together, ``counts`` of them.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qwen_lit.experts.stacked import Stacked4bit

GROUP_BYTES = 2**29
"""Matrices that are in 16 bits at a time have at most so many bytes, or are one. Each group costs a dozen launches,
for which small steps wait."""


class Rows:
    """How many rows each expert has."""

    def __init__(self, counts: Tensor) -> None:
        """Waits for the device once.

        Args:
            counts: ``[experts]``, int64, on the device of the rows.
        """
        self.ends = counts.cumsum(0, dtype=torch.int32)
        self.counts: list[int] = counts.tolist()
        self.starts = [0, *accumulate(self.counts)]
        self.hit = [expert for expert, rows in enumerate(self.counts) if rows]

    def groups(self, size: int) -> Iterator[list[int]]:
        """The experts that have rows, at most ``size`` at a time, in order."""
        for at in range(0, len(self.hit), size):
            yield self.hit[at : at + size]

    def where(self, experts: Sequence[int]) -> slice:
        """The rows of consecutive groups of experts, of which those left out have none."""
        return slice(self.starts[experts[0]], self.starts[experts[-1] + 1])


def chosen(weight: Tensor, experts: Sequence[int]) -> Tensor:
    """The rows of a tensor that some experts have; a view where they stand together."""
    first, last = experts[0], experts[-1]
    if last - first + 1 == len(experts):
        return weight[first : last + 1]
    return weight.index_select(0, torch.tensor(experts, device=weight.device))


def grouped(rows: Tensor, matrices: Tensor, shape: Rows, experts: Sequence[int]) -> Tensor:
    """Each row times its expert's matrix.

    Args:
        rows: ``[n, in]``, those of ``experts`` alone.
        matrices: ``[len(experts), in, out]``, of the rows' dtype.
        shape: of all rows.
        experts: whose matrices these are, in order.

    Returns:
        ``[n, out]``, with a gradient where one is wanted.
    """
    if at_once(rows, matrices):
        offsets = chosen(shape.ends, experts) - shape.starts[experts[0]]
        return torch.nn.functional.grouped_mm(rows, matrices, offs=offsets)
    parts = rows.split([shape.counts[expert] for expert in experts])
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices.unbind(), strict=True)])


def at_once(rows: Tensor, matrices: Tensor) -> bool:
    """Whether the GPU has one call for all matrices: in bfloat16, with strides of 16 bytes, from Ampere on."""
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
        and not any(size % 8 for size in matrices.shape[1:])
    )


class _Frozen(torch.autograd.Function):
    """Products with frozen matrices, which are dequantised again in backward; nothing but the bytes is kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, form: Stacked4bit | None, shape: Rows) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.form, ctx.shape, ctx.dtype = form, shape, rows.dtype
        return _product(rows, weight, form, shape, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return _product(gradient, weight, ctx.form, ctx.shape, back=True).to(ctx.dtype), None, None, None


def _product(rows: Tensor, weight: Tensor, form: Stacked4bit | None, shape: Rows, back: bool) -> Tensor:
    dtype = form.compute if form is not None else weight.dtype
    count, out, columns = (form.count, form.rows, form.columns) if form is not None else weight.shape
    size = max(1, GROUP_BYTES // (out * columns * dtype.itemsize)) if form is not None else count
    made = []
    for experts in shape.groups(size):
        matrices = chosen(weight, experts)
        if form is not None:
            matrices = form.dequantize(matrices).to(dtype)
        made.append(grouped(rows[shape.where(experts)].to(dtype), matrices if back else matrices.mT, shape, experts))
        # The next group's matrices stand in the same memory.
        del matrices
    if not made:
        return rows.new_empty(0, columns if back else out, dtype=dtype)
    return made[0] if len(made) == 1 else torch.cat(made)


def frozen_product(rows: Tensor, weight: Tensor, form: Stacked4bit | None, shape: Rows) -> Tensor:
    """Each row times its expert's frozen matrix, transposed, as a linear does.

    Args:
        rows: ``[n, in]``, sorted by expert.
        weight: ``[experts, out, in]``, or the bytes that hold it.
        form: how these do; None for a weight that is not quantised.
        shape: how many rows each expert has.

    Returns:
        ``[n, out]`` in the dtype of products.
    """
    found: Tensor = _Frozen.apply(rows, weight, form, shape)
    return found


class _Taken(torch.autograd.Function):
    """Rows in another order, each of them ``fan`` times; backward takes them back, without adding by address."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, take: Tensor, back: Tensor, fan: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.fan = fan
        return rows[take // fan] if fan > 1 else rows[take]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        found = gradient[back]
        return (found.view(-1, ctx.fan, found.shape[-1]).sum(1) if ctx.fan > 1 else found), None, None, None


def taken(rows: Tensor, take: Tensor, back: Tensor, fan: int = 1) -> Tensor:
    """Rows in another order.

    Args:
        rows: ``[n, width]``.
        take: ``[n · fan]``, of each row to be, its place among rows that stand ``fan`` times each.
        back: the other way round.
        fan: copies of a row.
    """
    found: Tensor = _Taken.apply(rows, take, back, fan)
    return found
