"""Frozen linears with LoRA (Hu et al., 2021) over NF4 or plain weights, as one autograd function per shared input."""

from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.nn.functional import linear

from qwen_lit.kernels.launch import jit, on_gpu, tl, triton
from qwen_lit.kernels.nf4 import can_dequantize, dequantize

BLOCK = 4096


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


class _Workspace:
    """One buffer per device and dtype for the weight that is in use; it grows to the largest."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def get(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        key, count = (device, dtype), shape.numel()
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < count:
            self.buffers.pop(key, None)
            buffer = self.buffers[key] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)


WORKSPACE = _Workspace()


def full_weight(member: Member, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` in ``dtype``; for 4-bit ones a buffer that the next call overwrites."""
    state = member.quant_state
    if state is None:
        return member.weight if member.weight.dtype == dtype else member.weight.to(dtype)
    if state.dtype != dtype or not member.weight.is_cuda:
        return dequantize_4bit(member.weight, state).to(dtype)
    out = WORKSPACE.get(state.shape, dtype, member.weight.device)
    if can_dequantize(member.weight, state):
        return dequantize(member.weight, state, out)
    return dequantize_4bit(member.weight, state, out=out)


def dropped_reference(x: Tensor, p: float, seed: int) -> Tensor:
    """The plain twin of ``dropped``; it draws other numbers than the kernel, from the same seed always the same."""
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * keep.to(x.dtype) / (1 - p)


@jit
def _dropout(x, out, add, count, p, seed, HAS_ADD: "tl.constexpr", BLOCK: "tl.constexpr"):
    # One draw gives four numbers, one for each quarter of the block.
    lanes = tl.arange(0, BLOCK // 4)
    draws = tl.rand4x(seed, (tl.program_id(0) * (BLOCK // 4) + lanes).to(tl.int32))
    start = tl.program_id(0).to(tl.int64) * BLOCK
    scale = 1.0 / (1.0 - p)
    for quarter in tl.static_range(4):
        at = start + quarter * (BLOCK // 4) + lanes
        inside = at < count
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        value = tl.where(draws[quarter] >= p, value * scale, 0.0)
        if HAS_ADD:
            value += tl.load(add + at, inside, 0.0).to(tl.float32)
        tl.store(out + at, value, inside)


def dropped(x: Tensor, p: float, seed: int, add: Tensor | None = None) -> Tensor:
    """``dropout(x) + add`` by a mask that is a function of the seed and the position alone.

    Args:
        x: any shape, contiguous.
        p: share of zeros; the rest is divided by ``1 - p``.
        seed: below 2**31.
        add: of the same shape; overwritten with the result where the kernel runs.
    """
    if not on_gpu(x):
        masked = dropped_reference(x, p, seed)
        return masked if add is None else masked + add
    out = torch.empty_like(x) if add is None else add
    _dropout[(triton.cdiv(x.numel(), BLOCK),)](
        x, out, add, x.numel(), p, seed, HAS_ADD=add is not None, BLOCK=BLOCK, num_warps=8
    )
    return out


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


def _stacked(adapted: list[Member], dtype: torch.dtype) -> Tensor:
    """The members' A ``[r of all, in]``: one product reads their input once."""
    parts = [member.pair(dtype)[0] for member in adapted]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _GroupLinear(torch.autograd.Function):
    """Saves the input and its image under A alone, and neither when no member has an adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, members: list[Member], seed: int, *trained: Tensor) -> Any:
        adapted = [member for member in members if member.a is not None]
        dropout = adapted[0].dropout if adapted else 0.0
        low: Tensor | None = None
        if adapted:
            low = (dropped(x, dropout, seed) if dropout else x) @ _stacked(adapted, x.dtype).t()
        outputs, start = [], 0
        for member in members:
            y = linear(x, full_weight(member, x.dtype), member.bias)
            if member.b is not None and low is not None:
                rank = member.b.shape[1]
                y.addmm_(low[:, start : start + rank], member.pair(x.dtype)[1].t(), alpha=member.scale)
                start += rank
            outputs.append(y)
        ctx.save_for_backward(*([x, low] if adapted else []), *trained)
        ctx.members, ctx.seed, ctx.dropout, ctx.adapted = members, seed, dropout, adapted
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        x, low = saved[:2] if ctx.adapted else (None, None)
        wants_dx = ctx.needs_input_grad[0]
        d_low = None if low is None else torch.empty_like(low)
        dx: Any = None
        d_b: list[Tensor] = []
        start = 0
        for member, dy in zip(ctx.members, grads, strict=True):
            if wants_dx:
                weight = full_weight(member, dy.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if member.b is not None and low is not None and d_low is not None:
                mine = slice(start, start + member.b.shape[1])
                start = mine.stop
                b = member.pair(dy.dtype)[1]
                d_low[:, mine].addmm_(dy, b, beta=0, alpha=member.scale)
                d_b.append(torch.empty_like(b).addmm_(dy.t(), low[:, mine], beta=0, alpha=member.scale))
        if x is None or d_low is None:
            return dx, None, None
        inner = dropped(x, ctx.dropout, ctx.seed) if ctx.dropout else x
        d_a = (d_low.t() @ inner).split([member.a.shape[0] for member in ctx.adapted])
        if wants_dx:
            stacked = _stacked(ctx.adapted, d_low.dtype)
            if ctx.dropout:
                # One mask for the group: the sum over members is masked once.
                dx = dropped(d_low @ stacked, ctx.dropout, ctx.seed, add=dx)
            else:
                dx.addmm_(d_low, stacked)
        pairs = zip(ctx.adapted, d_a, d_b, strict=True)
        return dx, None, None, *(one for member, a, b in pairs for one in (a.to(member.a.dtype), b.to(member.b.dtype)))


def group_linear(x: Tensor, members: list[Member], seed: int = 0) -> tuple[Tensor, ...]:
    """``x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ`` for each member; they share the dropout mask.

    Args:
        x: ``[tokens, in]``, contiguous.
        members: linears of the same input, with one dropout rate among those that have an adapter.
        seed: of the dropout mask.

    Returns:
        ``[tokens, out]`` for each member, in the dtype of ``x``.
    """
    trained = [one for member in members for one in (member.a, member.b) if one is not None]
    return _GroupLinear.apply(x, members, seed, *trained)  # type: ignore[no-any-return]


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
