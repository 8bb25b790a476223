"""Frozen linears with LoRA (Hu et al., 2021) over NF4 or plain weights, as one autograd function per shared input.

With the adapter beside the weight in its frame::

    forward   [x | xAᵀ] · [W | sB]ᵀ
    backward  [dy | s dy B] · [W ; A]

one product computes the linear and its adapter, and no result is read again to add to it.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qwen_lit.kernels.dropout import dropped
from qwen_lit.kernels.member import Member, frame, full_weight, parts_of, room, width_of


def group_reference(x: Tensor, members: list[Member], seed: int) -> tuple[Tensor, ...]:
    """The plain twin of ``group_linear``."""
    outputs = []
    for member in members:
        y = linear(x, full_weight([member], x.dtype).clone(), member.bias)
        if member.a is not None and member.b is not None:
            inner = dropped(x, member.dropout, seed) if member.dropout else x
            y = y + linear(linear(inner, member.a.to(x.dtype)), member.b.to(x.dtype)) * member.scale
        outputs.append(y)
    return tuple(outputs)


def _bias(part: list[Member]) -> Tensor | None:
    found = [member.bias for member in part]
    if len(part) == 1 or all(bias is None for bias in found):
        return found[0]
    like = next(bias for bias in found if bias is not None)
    return torch.cat([like.new_zeros(m.out) if bias is None else bias for m, bias in zip(part, found, strict=True)])


def _stacked(members: list[Member], dtype: torch.dtype) -> Tensor:
    """The members' A ``[r of all, in]``: one product reads their input once."""
    parts = [member.pair(dtype)[0] for member in members if member.rank]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Group:
    """Linears of one input with their adapters, and the products of both passes."""

    def __init__(self, members: list[Member], seed: int, roomy: bool, merged: bool = False) -> None:
        """Reads nothing of the tensors.

        Args:
            members: as for ``group_linear``.
            seed: the same.
            roomy: the same.
            merged: all members are one product, where ``parts_of`` allows it.
        """
        self.members, self.seed, self.roomy = members, seed, roomy
        self.parts = parts_of(members, merged)
        self.width = width_of(members[0])
        self.rank = sum(member.rank for member in members)
        self.extra = room(members)
        self.dropout = next((member.dropout for member in members if member.rank), 0.0)
        # A plain weight is used where it stands, so there is no frame around it.
        self.framed = self.rank > 0 and all(member.quant_state is not None for member in members)

    def image(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input with the room on its right, where products take it from there, and its image under A.

        Args:
            x: ``[tokens, in]``.

        Returns:
            ``[tokens, in + room]`` or ``x`` itself, and ``[tokens, r of all]``; both are saved for backward.
        """
        if not self.rank:
            return x, None
        inner = dropped(x, self.dropout, self.seed) if self.dropout else x
        stacked = _stacked(self.members, x.dtype)
        width = self.width
        if not self.framed or not (self.roomy or sum(member.out for member in self.members) > width):
            return x, inner @ stacked.t()
        wide = with_room(x.data, self.extra) if self.roomy else None
        if wide is None:
            # Copying the narrow input costs less than reading the wide outputs again.
            wide = torch.empty(x.shape[0], width + self.extra, dtype=x.dtype, device=x.device)
            wide[:, :width] = x
        low = wide[:, width : width + self.rank]
        torch.mm(inner, stacked.t(), out=low)
        wide[:, width + self.rank :] = 0
        return wide, low

    def forward(self, wide: Tensor, low: Tensor | None, outs: list[Tensor] | None = None) -> list[Tensor]:
        """The output of every part, ``[tokens, out of its members]``.

        Args:
            wide: as ``image`` gives it.
            low: the same.
            outs: where the outputs go, if no member has a bias; their rows may lie apart.
        """
        outputs, start = [], 0
        dtype = wide.dtype
        for number, part in enumerate(self.parts):
            out = outs[number] if outs is not None else None
            rows, ranks = _places(part, start)
            start = ranks[-1].stop
            folded = wide.shape[1] > self.width
            if folded:
                weight = frame(part, dtype, self.extra)[: rows[-1].stop]
                weight[:, self.width :] = 0
                for member, mine, place in zip(part, rows, ranks, strict=True):
                    if member.rank:
                        there = slice(self.width + place.start, self.width + place.stop)
                        torch.mul(member.pair(dtype)[1], member.scale, out=weight[mine, there])
            else:
                weight = full_weight(part, dtype)
            y = linear(wide, weight, _bias(part)) if out is None else torch.mm(wide, weight.t(), out=out)
            for member, mine, place in zip(part, rows, ranks, strict=True):
                if member.rank and low is not None and not folded:
                    y[:, mine].addmm_(low[:, place], member.pair(dtype)[1].t(), alpha=member.scale)
            outputs.append(y)
        return outputs

    def backward(
        self, wide: Tensor, low: Tensor | None, grads: list[Tensor], wants_dx: bool, last: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of the input and of every A and B.

        Args:
            wide: as ``image`` gave it.
            low: the same.
            grads: of the output of every part.
            wants_dx: whether the input has a gradient.
            last: ``[tokens, out + room]`` that begins with the last of ``grads``, where there is one; its room is
                written to.

        Returns:
            ``[tokens, in]``, and A's and B's gradient of each member that has them, in the dtype of the products.
        """
        dtype, tokens = wide.dtype, wide.shape[0]
        width, end = self.width, grads[-1].shape[1]
        folded = low is not None and wants_dx and self.framed and not self.dropout
        folded = folded and (last is not None or end < width)
        if folded and last is None:
            # Copying the narrow gradient costs less than reading the wide result again.
            last = torch.empty(tokens, end + self.extra, dtype=dtype, device=wide.device)
            last[:, :end] = grads[-1]
        d_low: Tensor | None = None
        d_b: list[Tensor] = []
        if low is not None:
            d_low = last[:, end : end + self.rank] if folded and last is not None else torch.empty_like(low)
            start = 0
            for part, dy in zip(self.parts, grads, strict=True):
                rows, ranks = _places(part, start)
                start = ranks[-1].stop
                for member, mine, place in zip(part, rows, ranks, strict=True):
                    if member.rank:
                        b = member.pair(dtype)[1]
                        d_low[:, place].addmm_(dy[:, mine], b, beta=0, alpha=member.scale)
                        found = torch.empty_like(b)
                        d_b.append(found.addmm_(dy[:, mine].t(), low[:, place], beta=0, alpha=member.scale))
        dx: Tensor | None = None
        for part, dy in zip(self.parts, grads, strict=True):
            if not wants_dx:
                break
            if folded and part is self.parts[-1] and last is not None:
                last[:, end + self.rank :] = 0
                weight = frame(part, dtype, self.extra)[:, :width]
                weight[end : end + self.rank] = _stacked(self.members, dtype)
                weight[end + self.rank :] = 0
                dy = last
            else:
                weight = full_weight(part, dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        if low is None or d_low is None:
            return dx, []
        x = wide[:, :width]
        d_a = d_low.t() @ (dropped(x, self.dropout, self.seed) if self.dropout else x)
        if dx is not None and self.dropout:
            # One mask for the group: the sum over members is masked once.
            dx = dropped(d_low @ _stacked(self.members, dtype), self.dropout, self.seed, add=dx)
        elif dx is not None and not folded:
            dx.addmm_(d_low, _stacked(self.members, dtype))
        parts = d_a.split([member.rank for member in self.members if member.rank])
        return dx, [one for pair in zip(parts, d_b, strict=True) for one in pair]


def _places(part: list[Member], start: int) -> tuple[list[slice], list[slice]]:
    """Of each member: where its outputs stand in the part's, and its ranks, from ``start`` on, in the group's."""
    ends, ranks = [0], [start]
    for member in part:
        ends.append(ends[-1] + member.out)
        ranks.append(ranks[-1] + member.rank)
    return [slice(*pair) for pair in pairwise(ends)], [slice(*pair) for pair in pairwise(ranks)]


def with_room(x: Tensor, extra: int) -> Tensor | None:
    """The matrix with the columns that were left free after each of its rows; None where there are none.

    Args:
        x: ``[tokens, width]``.
        extra: so many columns are wanted.
    """
    tokens, width = x.shape
    if not extra or not tokens or x.stride() != (width + extra, 1):
        return None
    end = x.storage_offset() + tokens * (width + extra)
    if end * x.element_size() > x.untyped_storage().nbytes():
        return None
    return x.as_strided((tokens, width + extra), x.stride())


def trained(members: list[Member]) -> list[Tensor]:
    """A and B of every member that has them, as autograd takes them."""
    return [one for member in members for one in (member.a, member.b) if one is not None]


class _GroupLinear(torch.autograd.Function):
    """Saves the input and its image under A alone, and neither when no member has an adapter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, members: list[Member], seed: int, roomy: bool, roomy_grad: bool, dead: bool,
        *parameters: Tensor,
    ) -> Any:  # fmt: skip
        group = ctx.group = Group(members, seed, roomy)
        wide, low = group.image(x)
        ctx.save_for_backward(*([] if low is None else [wide, low]))
        ctx.shape, ctx.roomy_grad = x.shape, roomy_grad
        if dead:
            return tuple(x.new_empty(x.shape[0], member.out) for member in members)
        return tuple(group.forward(wide, low))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        group = ctx.group
        wide, low = ctx.saved_tensors or (grads[0].new_empty(ctx.shape[0], 0), None)
        last = with_room(grads[-1], group.extra) if ctx.roomy_grad else None
        dx, found = group.backward(wide, low, list(grads), ctx.needs_input_grad[0], last)
        return dx, None, None, None, None, None, *as_trained(found, group.members)


def as_trained(found: list[Tensor], members: list[Member]) -> list[Tensor]:
    """Gradients in the dtypes of what they belong to, in the order of ``trained``."""
    return [one.to(like.dtype) for one, like in zip(found, trained(members), strict=True)]


def group_linear(
    x: Tensor,
    members: list[Member],
    seed: int = 0,
    roomy: bool = False,
    roomy_grad: bool = False,
    dead: bool = False,
) -> tuple[Tensor, ...]:
    """``x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ`` for each member; they share the dropout mask.

    Args:
        x: ``[tokens, in]``.
        members: linears of the same input, with one dropout rate among those that have an adapter.
        seed: of the dropout mask.
        roomy: after each row of ``x`` there are ``room(members)`` columns to write to.
        roomy_grad: columns that lie after each row of the last output's gradient may be written to.
        dead: the outputs are of no use to anyone, and are not computed.

    Returns:
        ``[tokens, out]`` for each member, in the dtype of ``x``.
    """
    return _GroupLinear.apply(  # type: ignore[no-any-return]
        x, members, seed, roomy, roomy_grad, dead, *trained(members)
    )
