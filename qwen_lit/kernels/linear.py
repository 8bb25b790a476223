"""Frozen linears with LoRA (Hu et al., 2021) over NF4 or plain weights, as one autograd function per shared input.

Where the weight is dequantised it lands in a frame that has room for the adapter on its right and below it::

    [ W   sB ]      forward   [x | xAᵀ] · [W | sB]ᵀ
    [ A      ]      backward  [dy | s dy B] · [W ; A]

so that one product computes the linear and its adapter, and no result is read again to add to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.nn.functional import linear

from qwen_lit.kernels.dropout import dropped
from qwen_lit.kernels.nf4 import can_dequantize, dequantize


@dataclass
class Member:
    """One linear of a group, read from transformers' and PEFT's own modules."""

    weight: Tensor
    """``[out, in]``, or bitsandbytes' packed 4-bit weight."""
    bias: Tensor | None
    a: Tensor | None
    """``[r, in]``, trained; None for a linear without an adapter."""
    b: Tensor | None
    """``[out, r]``, trained."""
    scale: float
    dropout: float
    a_low: Tensor | None = None
    """``a`` in the dtype of the products, where a copy is kept."""
    b_low: Tensor | None = None
    resident: Tensor | None = None
    """The weight's frame with the weight in it, where it is held."""

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in the dtype of the products."""
        assert self.a is not None and self.b is not None
        if self.a_low is not None and self.b_low is not None:
            return self.a_low, self.b_low
        return self.a.detach().to(dtype), self.b.detach().to(dtype)

    @property
    def quant_state(self) -> Any:
        """bitsandbytes' quantisation state; None for a plain weight."""
        return getattr(self.weight, "quant_state", None)

    @property
    def rank(self) -> int:
        """0 without an adapter."""
        return 0 if self.a is None else self.a.shape[0]

    @property
    def out(self) -> int:
        """Width of the output."""
        return int((self.weight if self.quant_state is None else self.quant_state).shape[0])


def room(members: list[Member]) -> int:
    """Columns beside a group's input for its image under every A: whole multiples of 16 bytes."""
    return -(-sum(member.rank for member in members) // 8) * 8


def width_of(member: Member) -> int:
    """Width of the input."""
    return int((member.weight if member.quant_state is None else member.quant_state).shape[1])


class _Workspace:
    """One buffer per device and dtype for the weight that is in use; it grows to the largest."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def get(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        key, count = (device, dtype), torch.Size(shape).numel()
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < count:
            # The smaller one goes first.
            self.buffers.pop(key, None)
            buffer = None
            # Training goes on with it where validation came first.
            with torch.inference_mode(False):
                buffer = self.buffers[key] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)


WORKSPACE = _Workspace()


def frame(member: Member, dtype: torch.dtype, extra: int, held: bool = False) -> Tensor:
    """``[out + extra, in + extra]`` with the weight at its top left; the rest is whatever was there.

    Args:
        member: with a 4-bit weight.
        dtype: of the products.
        extra: the group's ``room``.
        held: in memory of its own; otherwise in a buffer that the next call overwrites.
    """
    if member.resident is not None and member.resident.dtype == dtype:
        return member.resident
    state, device = member.quant_state, member.weight.device
    out, width = state.shape
    shape = (out + extra, width + extra)
    whole = torch.empty(shape, dtype=dtype, device=device) if held else WORKSPACE.get(shape, dtype, device)
    corner = whole[:out, :width]
    if can_dequantize(member.weight, state) and state.dtype == dtype and (not extra or width % state.blocksize == 0):
        dequantize(member.weight, state, corner)
    else:
        corner.copy_(dequantize_4bit(member.weight, state))
    return whole


def full_weight(member: Member, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` in ``dtype``; for 4-bit ones a buffer that the next call overwrites."""
    if member.quant_state is None:
        return member.weight if member.weight.dtype == dtype else member.weight.to(dtype)
    return frame(member, dtype, 0)[: member.out, : member.quant_state.shape[1]]


def group_reference(x: Tensor, members: list[Member], seed: int) -> tuple[Tensor, ...]:
    """The plain twin of ``group_linear``."""
    outputs = []
    for member in members:
        y = linear(x, full_weight(member, x.dtype).clone(), member.bias)
        if member.a is not None and member.b is not None:
            inner = dropped(x, member.dropout, seed) if member.dropout else x
            y = y + linear(linear(inner, member.a.to(x.dtype)), member.b.to(x.dtype)) * member.scale
        outputs.append(y)
    return tuple(outputs)


def _stacked(members: list[Member], dtype: torch.dtype) -> Tensor:
    """The members' A ``[r of all, in]``: one product reads their input once."""
    parts = [member.pair(dtype)[0] for member in members if member.rank]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Group:
    """Linears of one input with their adapters, and the products of both passes."""

    def __init__(self, members: list[Member], seed: int, roomy: bool) -> None:
        """Reads nothing of the tensors.

        Args:
            members: as for ``group_linear``.
            seed: the same.
            roomy: the same.
        """
        self.members, self.seed, self.roomy = members, seed, roomy
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
        if self.roomy:
            wide = x.data.as_strided((x.shape[0], width + self.extra), x.stride())
        else:
            # Copying the narrow input costs less than reading the wide outputs again.
            wide = torch.empty(x.shape[0], width + self.extra, dtype=x.dtype, device=x.device)
            wide[:, :width] = x
        low = wide[:, width : width + self.rank]
        torch.mm(inner, stacked.t(), out=low)
        wide[:, width + self.rank :] = 0
        return wide, low

    def forward(self, wide: Tensor, low: Tensor | None, outs: list[Tensor] | None = None) -> list[Tensor]:
        """Every member's output ``[tokens, out]``, in ``outs`` where they are given and no member has a bias.

        Args:
            wide: as ``image`` gives it.
            low: the same.
            outs: one for each member; their rows may lie apart.
        """
        outputs, start = [], 0
        dtype = wide.dtype
        for number, member in enumerate(self.members):
            out = outs[number] if outs is not None else None
            mine = slice(start, start + member.rank)
            start = mine.stop
            if wide.shape[1] > self.width:
                whole = frame(member, dtype, self.extra)[: member.out]
                tail = whole[:, self.width :]
                tail.zero_()
                if member.rank:
                    torch.mul(member.pair(dtype)[1], member.scale, out=tail[:, mine])
                y = linear(wide, whole, member.bias) if out is None else torch.mm(wide, whole.t(), out=out)
            else:
                weight = full_weight(member, dtype)
                y = linear(wide, weight, member.bias) if out is None else torch.mm(wide, weight.t(), out=out)
                if member.rank and low is not None:
                    y.addmm_(low[:, mine], member.pair(dtype)[1].t(), alpha=member.scale)
            outputs.append(y)
        return outputs

    def backward(
        self, wide: Tensor, low: Tensor | None, grads: list[Tensor], wants_dx: bool, last: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of the input and of every A and B.

        Args:
            wide: as ``image`` gave it.
            low: the same.
            grads: of every output.
            wants_dx: whether the input has a gradient.
            last: ``[tokens, out + room]`` that begins with the last of ``grads``, where there is one.

        Returns:
            ``[tokens, in]``, and A's and B's gradient of each member that has them, in the dtype of the products.
        """
        dtype, tokens = wide.dtype, wide.shape[0]
        width, end = self.width, self.members[-1].out
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
            for member, dy in zip(self.members, grads, strict=True):
                if member.rank:
                    mine = slice(start, start + member.rank)
                    start = mine.stop
                    b = member.pair(dtype)[1]
                    d_low[:, mine].addmm_(dy, b, beta=0, alpha=member.scale)
                    d_b.append(torch.empty_like(b).addmm_(dy.t(), low[:, mine], beta=0, alpha=member.scale))
        dx: Tensor | None = None
        for member, dy in zip(self.members, grads, strict=True):
            if not wants_dx:
                break
            if folded and member is self.members[-1] and last is not None:
                last[:, end + self.rank :] = 0
                whole = frame(member, dtype, self.extra)[:, :width]
                whole[end : end + self.rank] = _stacked(self.members, dtype)
                whole[end + self.rank :] = 0
                dy, weight = last, whole
            else:
                weight = full_weight(member, dtype)
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


def trained(members: list[Member]) -> list[Tensor]:
    """A and B of every member that has them, as autograd takes them."""
    return [one for member in members for one in (member.a, member.b) if one is not None]


class _GroupLinear(torch.autograd.Function):
    """Saves the input and its image under A alone, and neither when no member has an adapter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, members: list[Member], seed: int, roomy: bool, dead: bool, *parameters: Tensor
    ) -> Any:
        group = ctx.group = Group(members, seed, roomy)
        wide, low = group.image(x)
        ctx.save_for_backward(*([] if low is None else [wide, low]))
        ctx.shape = x.shape
        if dead:
            return tuple(x.new_empty(x.shape[0], member.out) for member in members)
        return tuple(group.forward(wide, low))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        group = ctx.group
        wide, low = ctx.saved_tensors or (grads[0].new_empty(ctx.shape[0], 0), None)
        dx, found = group.backward(wide, low, list(grads), ctx.needs_input_grad[0])
        return dx, None, None, None, None, *as_trained(found, group.members)


def as_trained(found: list[Tensor], members: list[Member]) -> list[Tensor]:
    """Gradients in the dtypes of what they belong to, in the order of ``trained``."""
    return [one.to(like.dtype) for one, like in zip(found, trained(members), strict=True)]


def group_linear(
    x: Tensor, members: list[Member], seed: int = 0, roomy: bool = False, dead: bool = False
) -> tuple[Tensor, ...]:
    """``x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ`` for each member; they share the dropout mask.

    Args:
        x: ``[tokens, in]``.
        members: linears of the same input, with one dropout rate among those that have an adapter.
        seed: of the dropout mask.
        roomy: after each row of ``x`` there are ``room(members)`` columns to write to.
        dead: the outputs are of no use to anyone, and are not computed.

    Returns:
        ``[tokens, out]`` for each member, in the dtype of ``x``.
    """
    return _GroupLinear.apply(x, members, seed, roomy, dead, *trained(members))  # type: ignore[no-any-return]


def read_member(module: nn.Module, training: bool) -> Member:
    """What a linear computes, from a plain linear, bitsandbytes' ``Linear4bit`` or PEFT's LoRA layer around either.

    Args:
        module: the layer as it stands in the model.
        training: whether dropout is on.
    """
    base: Any = getattr(module, "base_layer", module)
    plain = Member(base.weight, base.bias, None, None, 1.0, 0.0)
    adapters: Any = getattr(module, "active_adapters", None)
    if (
        base is module
        or not adapters
        or getattr(module, "disable_adapters", False)
        or getattr(module, "merged", False)
    ):
        return plain
    layer: Any = module
    name = adapters[0]
    p = getattr(layer.lora_dropout[name], "p", 0.0) if training else 0.0
    return Member(base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], p)
