"""Queries, keys and values of attention's heads: one product, and the rotation of the first two in place.

Backward is that of ``kernels/rope.py`` for q and k, then that of ``linear.py`` for the three linears of one input:
with ``dy = [dq', dk', dv]`` ``[tokens, q + 2 kv]``, where ``'`` is the inverse rotation (and the norm's backward),
``dx = dy W + d_xa A``.
"""

from typing import Any

import torch
from torch import Tensor

from qwen_lit.engine.group import Group
from qwen_lit.engine.linear import as_trained, group_reference, input_saves, input_scratch, trained
from qwen_lit.engine.lora_linear import LoraLinear
from qwen_lit.kernels.dropout import Seed
from qwen_lit.kernels.eight import Narrow
from qwen_lit.kernels.footprint import LayerSize, Op, Saved, backward_columns_of, rank_of
from qwen_lit.kernels.rope import rope, rope_backward, rope_reference

Norm = tuple[Tensor | None, float]
"""Weight ``[size]`` and epsilon of the RMSNorm of each head; no weight for models without it."""


def qkv_rope_reference(
    x: Tensor, linears: list[LoraLinear], size: int, cos: Tensor, sin: Tensor, norms: list[Norm], seed: int | Seed
) -> tuple[Tensor, ...]:
    """The reference of ``qkv_rope``."""
    q, k, v = (one.view(x.shape[0], -1, size) for one in group_reference(x, linears, seed))
    turned = [rope_reference(one, cos, sin, *norm) for one, norm in zip((q, k), norms, strict=True)]
    return *turned, v


class _QkvRope(torch.autograd.Function):
    """Saves the input and ``xa``, and where heads have a norm, q and k as they were before it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linears: list[LoraLinear],
        size: int,
        cos: Tensor,
        sin: Tensor,
        norms: list[Norm],
        seed: int | Seed,
        padded: bool,
        narrow: Narrow | None,
        *parameters: Tensor,
    ) -> Any:
        group = ctx.group = Group(linears, seed, padded, merged=True)
        augmented, xa = group.down_projection(x)
        if group.passes.forward.narrow:
            outs = [group.narrow_forward(augmented, xa, narrow)]
        else:
            outs = group.forward(augmented, xa)
        if len(outs) == 1:
            outs = list(outs[0].split([linear.out for linear in linears], 1))
        *raw, v = (one.view(x.shape[0], -1, size) for one in outs)
        turned = [torch.empty_like(one) if norm[0] is not None else one for one, norm in zip(raw, norms, strict=True)]
        for one, (weight, eps), out in zip(raw, norms, turned, strict=True):
            rope(one, cos, sin, weight, eps, out)
        kept = [None if weight is None else one for one, (weight, _) in zip(raw, norms, strict=True)]
        ctx.save_for_backward(cos, sin, *kept, *([] if xa is None else [augmented, xa]))
        ctx.norms, ctx.shape = norms, x.shape
        return *turned, v

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        group = ctx.group
        cos, sin, q, k, *pair = ctx.saved_tensors
        augmented, xa = pair or (grads[0].new_empty(ctx.shape[0], 0), None)
        widths = [linear.out for linear in group.linears]
        # Free columns after each row take d_xa, so that one product computes the whole gradient of the input.
        extra = 0 if group.passes.backward.narrow else group.extra
        whole = augmented.new_empty(ctx.shape[0], sum(widths) + extra)
        mine = [one.view(grad.shape) for one, grad in zip(whole.split([*widths, extra], 1), grads, strict=False)]
        for out, grad, raw, (weight, eps) in zip(mine, grads, (q, k), ctx.norms, strict=False):
            rope_backward(grad, cos, sin, raw, weight, eps, out)
        mine[2].copy_(grads[2])
        outs, merged = [one.flatten(1) for one in mine], len(group.parts) == 1
        last = whole if merged else whole[:, sum(widths[:2]) :]
        outs = [whole[:, : sum(widths)]] if merged else outs
        dx, found = group.backward(augmented, xa, outs, ctx.needs_input_grad[0], last if xa is not None else None)
        return dx, None, None, None, None, None, None, None, None, *as_trained(found, group.linears)


def qkv_rope(
    x: Tensor,
    linears: list[LoraLinear],
    size: int,
    cos: Tensor,
    sin: Tensor,
    norms: list[Norm],
    seed: int | Seed = 0,
    padded: bool = False,
    narrow: Narrow | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values that attention takes.

    Args:
        x: ``[tokens, in]``.
        linears: of q, k and v, as for ``group_linear``.
        size: of a head, a power of two.
        cos: float ``[tokens, size / 2]``, of each token's position.
        sin: float ``[tokens, size / 2]``, of each token's position.
        norms: weight and epsilon of the norms of q and of k.
        seed: of the dropout mask.
        padded: as for ``group_linear``.
        narrow: as for ``group_linear``.

    Returns:
        q, k and v, ``[tokens, heads of each, size]``; the rows of tokens may lie apart.
    """
    return _QkvRope.apply(x, linears, size, cos, sin, norms, seed, padded, narrow, *trained(linears))  # type: ignore[no-any-return]


def qkv_rope_op(layer: LayerSize, size: int) -> Op:
    """What ``qkv_rope`` costs; attention saves its results.

    Args:
        layer: its first group is q, k and v.
        size: bytes of a number.
    """
    group = layer.groups[0]
    query, key, value = (linear.outputs for linear in group)
    saved = input_saves(group, size, padded=True)
    if layer.head_norm:
        # One product makes all three where they are in 4 bits, so that v, which attention saves, is in the same
        # memory.
        one = all(linear.quantized for linear in group)
        name = "q, k and v before the norm" if one else "q and k before the norm"
        saved += (Saved(name, (query + key + value * one) * size),)
    # The gradients of the three outputs are put side by side.
    beside = (query + key + value + backward_columns_of(group)) * size
    scratch = beside + input_scratch(group, size)
    return Op("qkv_rope", saved, 0, layer.hidden * size, scratch, saves_input=rank_of(group) > 0)
