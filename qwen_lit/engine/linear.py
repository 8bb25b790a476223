"""Frozen linears with LoRA over NF4 or plain weights, as one autograd function for the linears of one input; their
products are those of ``group.py``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen_lit.engine.group import Group, with_lora_columns
from qwen_lit.engine.lora_linear import LoraLinear, full_weight
from qwen_lit.kernels.dropout import Seed, dropped
from qwen_lit.kernels.eight import Narrow
from qwen_lit.kernels.footprint import LinearSize, Op, Saved, columns_of, masks, narrow_gradient, rank_of


def group_reference(x: Tensor, linears: list[LoraLinear], seed: int | Seed) -> tuple[Tensor, ...]:
    """The reference of ``group_linear``."""
    outputs = []
    for linear in linears:
        y = F.linear(x, full_weight([linear], x.dtype).clone(), linear.bias)
        if linear.a is not None and linear.b is not None:
            inner = dropped(x, linear.dropout, seed) if linear.dropout else x
            y = y + F.linear(F.linear(inner, linear.a.to(x.dtype)), linear.b.to(x.dtype)) * linear.scale
        outputs.append(y)
    return tuple(outputs)


def trained(linears: list[LoraLinear]) -> list[Tensor]:
    """A and B of every linear that has them, as autograd takes them."""
    return [one for linear in linears for one in (linear.a, linear.b) if one is not None]


class _GroupLinear(torch.autograd.Function):
    """Saves the input and ``xa`` where a linear has an adapter, and nothing otherwise."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linears: list[LoraLinear],
        seed: int | Seed,
        padded: bool,
        grad_padded: bool,
        skip_output: bool,
        narrow: Narrow | None,
        *parameters: Tensor,
    ) -> Any:
        group = ctx.group = Group(linears, seed, padded)
        augmented, xa = group.down_projection(x)
        ctx.save_for_backward(*([] if xa is None else [augmented, xa]))
        ctx.shape, ctx.grad_padded = x.shape, grad_padded
        if skip_output:
            return tuple(x.new_empty(x.shape[0], linear.out) for linear in linears)
        if group.passes.forward.narrow:
            outs = [linear.out for linear in linears]
            return tuple(group.narrow_forward(augmented, xa, narrow).split(outs, 1))
        return tuple(group.forward(augmented, xa))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        group = ctx.group
        augmented, xa = ctx.saved_tensors or (grads[0].new_empty(ctx.shape[0], 0), None)
        last = with_lora_columns(grads[-1], group.extra) if ctx.grad_padded else None
        dx, found = group.backward(augmented, xa, list(grads), ctx.needs_input_grad[0], last)
        return dx, None, None, None, None, None, None, *as_trained(found, group.linears)


def as_trained(found: list[Tensor], linears: list[LoraLinear]) -> list[Tensor]:
    """Gradients of A and B in the dtypes of A and B, in the order of ``trained``."""
    return [one.to(like.dtype) for one, like in zip(found, trained(linears), strict=True)]


def group_linear(
    x: Tensor,
    linears: list[LoraLinear],
    seed: int | Seed = 0,
    padded: bool = False,
    grad_padded: bool = False,
    skip_output: bool = False,
    narrow: Narrow | None = None,
) -> tuple[Tensor, ...]:
    """``x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ`` for each linear; they share the dropout mask.

    Args:
        x: ``[tokens, in]``.
        linears: linears of the same input, with one dropout rate among those that have an adapter.
        seed: of the dropout mask.
        padded: after each row of ``x`` there are ``lora_columns(linears)`` free columns that may be written to.
        grad_padded: free columns after each row of the last output's gradient may be written to.
        skip_output: do not compute the outputs, because the caller needs only what is saved; they are undefined.
        narrow: ``x`` in 8 bits, where products are and it is known so.

    Returns:
        ``[tokens, out]`` for each linear, in the dtype of ``x``.
    """
    return _GroupLinear.apply(  # type: ignore[no-any-return]
        x, linears, seed, padded, grad_padded, skip_output, narrow, *trained(linears)
    )


def input_saves(group: tuple[LinearSize, ...], size: int, padded: bool, counted: bool = False) -> tuple[Saved, ...]:
    """What linears of one input save for the gradients of A and B.

    Args:
        group: the linears.
        size: bytes of a number.
        padded: as for ``group_linear``.
        counted: an earlier operation saves the input, and counts it.
    """
    rank, columns, width = rank_of(group), columns_of(group), group[0].inputs
    if not rank:
        return ()
    quantized = all(linear.quantized for linear in group)
    if group[0].passes.forward.narrow:
        return (*(() if counted else (Saved("input", width * size),)), Saved("input x Aᵀ", rank * size))
    if padded:
        # A plain weight's product takes no LoRA columns: xa has memory of its own, and the columns stay empty.
        own = () if quantized else (Saved("input x Aᵀ", rank * size),)
        return (Saved("input, LoRA columns", (width + columns) * size), *own)
    if quantized and sum(linear.outputs for linear in group) > width:
        return (Saved("copy of the input, LoRA columns", (width + columns) * size),)
    return (*(() if counted else (Saved("input", width * size),)), Saved("input x Aᵀ", rank * size))


def input_scratch(group: tuple[LinearSize, ...], size: int) -> int:
    """Bytes a token that the backward of linears takes beside gradients: those in 8 bits, d_xa, and with dropout D(x)
    or D'(d_xa A)."""
    rank, narrow = rank_of(group), narrow_gradient(group)
    folded = all(linear.quantized for linear in group) and not masks(group) and not narrow
    return narrow + (0 if not rank or folded else (rank + group[0].inputs * masks(group)) * size)


def group_linear_op(name: str, group: tuple[LinearSize, ...], size: int, counted: bool = False) -> Op:
    """What ``group_linear`` costs in a layer, where the gradient has free columns and the input has none.

    Args:
        name: of the linears.
        group: the linears.
        size: bytes of a number.
        counted: an earlier operation saves the input, and counts it.
    """
    output, grad = sum(linear.outputs for linear in group) * size, group[0].inputs * size
    saved, scratch = input_saves(group, size, False, counted), input_scratch(group, size)
    return Op(name, saved, output, grad, scratch, saves_input=bool(saved))
