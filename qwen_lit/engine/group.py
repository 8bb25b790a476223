"""The products of frozen linears of one input with their LoRA adapters, in both passes.

Each linear computes (Hu et al., 2021, equation 3, with dropout ``D`` on the adapter's input)::

    y = x Wᵀ + bias + s D(x) Aᵀ Bᵀ

for x ``[tokens, in]``, W ``[out, in]``, A ``[r, in]``, B ``[out, r]`` and ``s = alpha / r``. W and bias are frozen.
With ``xa = D(x) Aᵀ`` ``[tokens, r]``, which is saved, and the gradient dy ``[tokens, out]``::

    d_xa = s dy B        [tokens, r]
    dB   = s dyᵀ xa      [out, r]
    dA   = d_xaᵀ D(x)    [r, in]
    dx   = dy W + D'(d_xa A), where D' masks and scales as D does; summed over the linears of the input

Products run in the dtype of x; dA and dB are cast to that of A and B. Without dropout, and with the adapter beside the
weight in one augmented matrix, forward and the gradient of the input are one product each::

    y  = [x | xa] · [W | s B]ᵀ
    dx = [dy | d_xa] · [W ; A]

so that no result is read again to add to it. A product in 8 bits (``kernels/eight.py``) has no such columns: what the
adapter adds is added to it in the dtype of x.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen_lit.engine.lora_linear import LoraLinear, augmented_weight, full_weight, lora_columns, parts_of
from qwen_lit.engine.narrow import narrow_weight
from qwen_lit.kernels.dropout import Seed, dropped
from qwen_lit.kernels.eight import Narrow, quantize
from qwen_lit.kernels.eight_product import product


def _bias(part: list[LoraLinear], dtype: torch.dtype) -> Tensor | None:
    # bitsandbytes' own forward, such as that of samples, casts a bias to the dtype in which it computes.
    found = [None if linear.bias is None else linear.bias.to(dtype) for linear in part]
    if len(part) == 1 or all(bias is None for bias in found):
        return found[0]
    like = next(bias for bias in found if bias is not None)
    return torch.cat([like.new_zeros(m.out) if bias is None else bias for m, bias in zip(part, found, strict=True)])


def _stacked(linears: list[LoraLinear], dtype: torch.dtype) -> Tensor:
    """The linears' A ``[r of all, in]``: one product reads their input once."""
    parts = [linear.pair(dtype)[0] for linear in linears if linear.rank]
    return parts[0] if len(parts) == 1 else below(parts)


class Group:
    """Linears of one input with their adapters, and the products of both passes."""

    def __init__(self, linears: list[LoraLinear], seed: int | Seed, padded: bool, merged: bool = False) -> None:
        """Reads nothing of the tensors.

        Args:
            linears: as for ``group_linear``.
            seed: of the dropout mask, as for ``group_linear``.
            padded: as for ``group_linear``.
            merged: all linears are one product, where ``parts_of`` allows it.
        """
        self.linears, self.seed, self.padded = linears, seed, padded
        self.parts = parts_of(linears, merged)
        self.width = linears[0].width
        self.rank = sum(linear.rank for linear in linears)
        self.extra = lora_columns(linears)
        self.dropout = next((linear.dropout for linear in linears if linear.rank), 0.0)
        self.passes = linears[0].passes
        # A plain weight is used where it stands, so there is no augmented copy of it.
        self.is_augmented = self.rank > 0 and all(linear.quantized for linear in linears)

    def down_projection(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input with the LoRA columns on its right, where products take them from there, and ``xa = D(x) Aᵀ``.

        Args:
            x: ``[tokens, in]``.

        Returns:
            ``[tokens, in + LoRA columns]`` or ``x`` itself, and ``[tokens, r of all]``; both are saved for backward.
        """
        if not self.rank:
            return x, None
        inner = dropped(x, self.dropout, self.seed) if self.dropout else x
        stacked = _stacked(self.linears, x.dtype)
        width = self.width
        if self.passes.forward.narrow:
            return x, inner @ stacked.t()
        if not self.is_augmented or not (self.padded or sum(linear.out for linear in self.linears) > width):
            return x, inner @ stacked.t()
        augmented = with_lora_columns(x.data, self.extra) if self.padded else None
        if augmented is None:
            # Copying the narrow input costs less than reading the augmented outputs again.
            augmented = torch.empty(x.shape[0], width + self.extra, dtype=x.dtype, device=x.device)
            augmented[:, :width] = x
        xa = augmented[:, width : width + self.rank]
        torch.mm(inner, stacked.t(), out=xa)
        augmented[:, width + self.rank :] = 0
        return augmented, xa

    def forward(self, augmented: Tensor, xa: Tensor | None, outs: list[Tensor] | None = None) -> list[Tensor]:
        """The output of every part, ``[tokens, out of its linears]``.

        Args:
            augmented: ``[tokens, in + LoRA columns]`` as ``down_projection`` gives it.
            xa: ``[tokens, r of all]`` as ``down_projection`` gives it.
            outs: where the outputs go, if no linear has a bias; their rows may lie apart.
        """
        outputs, start = [], 0
        dtype = augmented.dtype
        for number, part in enumerate(self.parts):
            out = outs[number] if outs is not None else None
            rows, ranks = _places(part, start)
            start = ranks[-1].stop
            folded = augmented.shape[1] > self.width
            if folded:
                weight = augmented_weight(part, dtype, self.extra)[: rows[-1].stop]
                weight[:, self.width :] = 0
                for linear, mine, place in zip(part, rows, ranks, strict=True):
                    if linear.rank:
                        there = slice(self.width + place.start, self.width + place.stop)
                        torch.mul(linear.pair(dtype)[1], linear.scale, out=weight[mine, there])
            else:
                weight = full_weight(part, dtype)
            y = (
                F.linear(augmented, weight, _bias(part, dtype))
                if out is None
                else torch.mm(augmented, weight.t(), out=out)
            )
            for linear, mine, place in zip(part, rows, ranks, strict=True):
                if linear.rank and xa is not None and not folded:
                    y[:, mine].addmm_(xa[:, place], linear.pair(dtype)[1].t(), alpha=linear.scale)
            outputs.append(y)
        return outputs

    def narrow_forward(self, x: Tensor, xa: Tensor | None, narrow: Narrow | None) -> Tensor:
        """The outputs of all linears side by side, ``[tokens, out of all]``, by one product in 8 bits.

        Args:
            x: ``[tokens, in]``; of it only the dtype is read where ``narrow`` is given and no linear has an adapter.
            xa: as ``down_projection`` gives it.
            narrow: x in 8 bits, where it is known.
        """
        kind = self.passes.forward
        narrow = quantize(x, kind) if narrow is None else narrow
        weight = narrow_weight(self.linears, kind, turned=False)
        return product(narrow, weight, x.dtype, _bias(self.linears, x.dtype), *self._lift(xa, x.dtype))

    def _lift(self, xa: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """``xa``, and the matrix ``[out of all, r of all]`` that has every s B in its linear's rows and ranks."""
        if xa is None:
            return None, None
        found = xa.new_zeros(sum(linear.out for linear in self.linears), self.rank)
        for linear, mine, place in zip(self.linears, *_places(self.linears, 0), strict=True):
            if linear.rank:
                torch.mul(linear.pair(dtype)[1], linear.scale, out=found[mine, place])
        return xa, found

    def _narrow_backward(self, grads: list[Tensor], d_xa: Tensor | None, narrow: Narrow | None) -> Tensor:
        """``dy W + d_xa A`` by one product in 8 bits, for the outputs of all linears side by side.

        Args:
            grads: as of ``backward``.
            d_xa: ``[tokens, r of all]``; None leaves it out.
            narrow: as of ``backward``.
        """
        kind, dtype = self.passes.backward, grads[0].dtype
        narrow = quantize(beside(grads), kind) if narrow is None else narrow
        lift = None if d_xa is None else _stacked(self.linears, dtype).t().contiguous()
        return product(narrow, narrow_weight(self.linears, kind, turned=True), dtype, None, d_xa, lift)

    def backward(
        self,
        augmented: Tensor,
        xa: Tensor | None,
        grads: list[Tensor],
        wants_dx: bool,
        last: Tensor | None = None,
        narrow: Narrow | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx, dA and dB by the formulas of the module.

        Args:
            augmented: as ``down_projection`` gave it.
            xa: as ``down_projection`` gave it.
            grads: dy of every part, ``[tokens, out of its linears]``.
            wants_dx: whether the input has a gradient.
            last: ``[tokens, out + LoRA columns]`` that begins with the last of ``grads``, where there is one; d_xa is
                written to its columns.
            narrow: ``grads`` side by side in 8 bits, where they are known so.

        Returns:
            ``[tokens, in]``, and A's and B's gradient of each linear that has them, in the dtype of the products.
        """
        dtype, tokens = augmented.dtype, augmented.shape[0]
        width, end = self.width, grads[-1].shape[1]
        folded = xa is not None and wants_dx and self.is_augmented and not self.dropout
        folded = folded and (last is not None or end < width) and not self.passes.backward.narrow
        if folded and last is None:
            # Copying the narrow gradient costs less than reading the augmented result again.
            last = torch.empty(tokens, end + self.extra, dtype=dtype, device=augmented.device)
            last[:, :end] = grads[-1]
        d_xa: Tensor | None = None
        d_b: list[Tensor] = []
        if xa is not None:
            d_xa = last[:, end : end + self.rank] if folded and last is not None else torch.empty_like(xa)
            start = 0
            for part, dy in zip(self.parts, grads, strict=True):
                rows, ranks = _places(part, start)
                start = ranks[-1].stop
                for linear, mine, place in zip(part, rows, ranks, strict=True):
                    if linear.rank:
                        b = linear.pair(dtype)[1]
                        d_xa[:, place].addmm_(dy[:, mine], b, beta=0, alpha=linear.scale)
                        found = torch.empty_like(b)
                        d_b.append(found.addmm_(dy[:, mine].t(), xa[:, place], beta=0, alpha=linear.scale))
        dx: Tensor | None = None
        if wants_dx and self.passes.backward.narrow:
            folded = not self.dropout
            dx, wants_dx = self._narrow_backward(grads, d_xa if folded else None, narrow), False
        for part, dy in zip(self.parts, grads, strict=True):
            if not wants_dx:
                break
            if folded and part is self.parts[-1] and last is not None:
                last[:, end + self.rank :] = 0
                weight = augmented_weight(part, dtype, self.extra)[:, :width]
                weight[end : end + self.rank] = _stacked(self.linears, dtype)
                weight[end + self.rank :] = 0
                dy = last
            else:
                weight = full_weight(part, dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        if xa is None or d_xa is None:
            return dx, []
        x = augmented[:, :width]
        d_a = d_xa.t() @ (dropped(x, self.dropout, self.seed) if self.dropout else x)
        if dx is not None and self.dropout:
            # One mask for the group: the sum over linears is masked once.
            dx = dropped(d_xa @ _stacked(self.linears, dtype), self.dropout, self.seed, add=dx)
        elif dx is not None and not folded:
            dx.addmm_(d_xa, _stacked(self.linears, dtype))
        parts = d_a.split([linear.rank for linear in self.linears if linear.rank])
        return dx, [one for pair in zip(parts, d_b, strict=True) for one in pair]


def _places(part: list[LoraLinear], start: int) -> tuple[list[slice], list[slice]]:
    """For each linear: the columns of its output in the part's output, and of its ranks, from ``start`` on, in the
    group's ``xa``."""
    ends, ranks = [0], [start]
    for linear in part:
        ends.append(ends[-1] + linear.out)
        ranks.append(ranks[-1] + linear.rank)
    return [slice(*pair) for pair in pairwise(ends)], [slice(*pair) for pair in pairwise(ranks)]


def beside(parts: list[Tensor]) -> Tensor:
    """Matrices of one height side by side; where they lie so in memory, nothing is copied.

    Args:
        parts: ``[rows, columns of each]``.
    """
    first, columns = parts[0], sum(part.shape[1] for part in parts)
    ends = [first.storage_offset()]
    for part in parts:
        ends.append(ends[-1] + part.shape[1])
    if all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.stride() == (first.stride(0), 1)
        and part.storage_offset() == end
        for part, end in zip(parts, ends, strict=False)
    ):
        return first.as_strided((len(first), columns), (first.stride(0), 1))
    return torch.cat(parts, 1)


def below(parts: list[Tensor]) -> Tensor:
    """Contiguous matrices of one width one below the other; where they lie so in memory, nothing is copied.

    Args:
        parts: ``[rows of each, columns]``.
    """
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end:
            return torch.cat(parts)
        end += part.numel() * part.element_size()
    if first.untyped_storage().data_ptr() != parts[-1].untyped_storage().data_ptr():
        return torch.cat(parts)
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())


def with_lora_columns(x: Tensor, extra: int) -> Tensor | None:
    """The matrix together with the free columns after each of its rows; None where it has none.

    Args:
        x: ``[tokens, width]``.
        extra: how many columns are wanted.
    """
    tokens, width = x.shape
    if not extra or not tokens or x.stride() != (width + extra, 1):
        return None
    end = x.storage_offset() + tokens * (width + extra)
    if end * x.element_size() > x.untyped_storage().nbytes():
        return None
    return x.as_strided((tokens, width + extra), x.stride())
