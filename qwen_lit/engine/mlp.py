"""The MLP of a decoder layer: gate and up as one function with SwiGLU, and the whole in pieces for very long rows.

With ``h = silu(gate(x)) · up(x)`` ``[tokens, inner]`` and ``y = down(h)``, backward takes dh from the linear ``down``
(``linear.py``), turns gate and up into their gradients in place (``kernels/swiglu.py``), and ends with the two linears
of one input: ``dx = d_gate W_gate + d_up W_up + d_xa A``. Where gate and up are kept in 8 bits, their gradients get a
matrix of their own (``kernels/packed.py``).
"""

from typing import Any

import torch
from torch import Tensor

from qwen_lit.engine.group import Group
from qwen_lit.engine.linear import (
    as_trained,
    group_linear,
    group_linear_op,
    group_reference,
    input_saves,
    input_scratch,
    trained,
)
from qwen_lit.engine.lora_linear import LoraLinear
from qwen_lit.kernels.dropout import Seed
from qwen_lit.kernels.eight import Narrow, absent
from qwen_lit.kernels.footprint import (
    LayerSize,
    Op,
    Saved,
    backward_columns_of,
    eight_bits,
    forward_columns_of,
    rank_of,
)
from qwen_lit.kernels.kinds import Kind
from qwen_lit.kernels.packed import Packed, packed_bytes
from qwen_lit.kernels.packed_narrow import swiglu_packed_backward_narrow, swiglu_packed_narrow
from qwen_lit.kernels.swiglu import (
    swiglu,
    swiglu_backward_,
    swiglu_backward_narrow_,
    swiglu_narrow,
    swiglu_reference,
)


def gate_up_reference(x: Tensor, gate: LoraLinear, up: LoraLinear, seed: int | Seed) -> Tensor:
    """The reference of ``gate_up``."""
    return swiglu_reference(*group_reference(x, [gate, up], seed))


class _GateUp(torch.autograd.Function):
    """Saves gate and up in one matrix, which backward turns into their gradients in place, or in 8 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: LoraLinear,
        up: LoraLinear,
        seed: int | Seed,
        padded: bool,
        narrow: Narrow | None,
        kind: Kind,
        wide: bool,
        packs: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        group = ctx.group = Group([gate, up], seed, padded)
        augmented, xa = group.down_projection(x)
        width, passes = gate.out, group.passes
        packs = packs and any(ctx.needs_input_grad)
        # Backward has a matrix of its own for what was packed.
        extra = 0 if packs or passes.backward.narrow else group.extra
        if passes.forward.narrow:
            both = group.narrow_forward(augmented, xa, narrow)
        else:
            both = torch.empty(x.shape[0], 2 * width + extra, dtype=x.dtype, device=x.device)
            outs = [both[:, :width], both[:, width : 2 * width]]
            if gate.bias is None and up.bias is None:
                group.forward(augmented, xa, outs)
            else:
                for out, y in zip(outs, group.forward(augmented, xa), strict=True):
                    out.copy_(y)
        kept: tuple[Tensor, ...]
        if packs:
            h, in_eight, kept = swiglu_packed_narrow(both, width, kind, wide)
        elif kind.narrow:
            (h, in_eight), kept = swiglu_narrow(both, width, kind, wide), (both,)
        else:
            h, in_eight, kept = swiglu(both, width), None, (both,)
        ctx.save_for_backward(*kept, *([] if xa is None else [augmented, xa]))
        ctx.packs, ctx.spent = packs, False
        h = absent(x, width) if h is None else h
        if in_eight is None:
            return h, None, None
        ctx.mark_non_differentiable(*in_eight)
        return h, *in_eight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.spent:
            raise RuntimeError("gate and up have become their gradients; this graph cannot be run backward twice")
        ctx.spent = True
        dh, group = grads[0], ctx.group
        width, passes, wants_dx = dh.shape[1], group.passes, ctx.needs_input_grad[0]
        kind = passes.backward if wants_dx else Kind.WIDE
        if ctx.packs:
            codes, scales, *pair = ctx.saved_tensors
            extra = 0 if passes.backward.narrow else group.extra
            both, narrow = swiglu_packed_backward_narrow(Packed(codes, scales), dh, kind, bool(pair), extra)
        else:
            (both, *pair), narrow = ctx.saved_tensors, None
            if kind.narrow:
                narrow = swiglu_backward_narrow_(both, dh, kind, wide=bool(pair))
            else:
                swiglu_backward_(both, dh)
        augmented, xa = pair or (both[:, :0], None)
        mine = [both[:, :width], both[:, width : 2 * width]]
        last = both[:, width:] if xa is not None and both.shape[1] > 2 * width else None
        dx, found = group.backward(augmented, xa, mine, wants_dx, last, narrow)
        return dx, None, None, None, None, None, None, None, None, *as_trained(found, group.linears)


def gate_up(
    x: Tensor,
    gate: LoraLinear,
    up: LoraLinear,
    seed: int | Seed = 0,
    padded: bool = False,
    narrow: Narrow | None = None,
    kind: Kind = Kind.WIDE,
    wide: bool = True,
    packs: bool = False,
) -> tuple[Tensor, Narrow | None]:
    """``silu(gate(x)) * up(x)``; backward may run once.

    Args:
        x: ``[tokens, in]``.
        gate: the linear under silu, with the same width and dropout rate as ``up``.
        up: the linear that it is multiplied with.
        seed: of the dropout mask.
        padded: as for ``group_linear``.
        narrow: as for ``group_linear``.
        kind: in which the result is wanted too.
        wide: whether the result is read in the dtype of ``x``; otherwise it has the memory of one number.
        packs: gate and up are kept for backward in 8 bits; the result does not change by it.

    Returns:
        ``[tokens, out]``; and the same in 8 bits where ``kind`` asks for it.
    """
    h, *pair = _GateUp.apply(x, gate, up, seed, padded, narrow, kind, wide, packs, *trained([gate, up]))
    return h, None if pair[0] is None else Narrow(*pair)


def mlp(
    x: Tensor,
    linears: dict[str, LoraLinear],
    seed: int | Seed,
    padded: bool = False,
    skip_output: bool = False,
    narrow: Narrow | None = None,
    packs: bool = False,
) -> Tensor:
    """``down(silu(gate(x)) * up(x))``.

    Args:
        x: ``[tokens, hidden]``.
        linears: ``gate_proj``, ``up_proj`` and ``down_proj``.
        seed: of the dropout mask of gate and up; ``seed + 1`` is that of down.
        padded: as for ``group_linear``, and ``grad_padded`` too.
        skip_output: as for ``group_linear``, of down.
        narrow: as for ``group_linear``.
        packs: as for ``gate_up``.
    """
    down = linears["down_proj"]
    kind = Kind.WIDE if skip_output else down.passes.forward
    wide = down.rank > 0 or not kind.narrow
    h, in_eight = gate_up(x, linears["gate_proj"], linears["up_proj"], seed, padded, narrow, kind, wide, packs)
    (out,) = group_linear(h, [down], seed + 1, grad_padded=padded, skip_output=skip_output, narrow=in_eight)
    return out


class _Pieces(torch.autograd.Function):
    """Saves its input alone; backward computes a piece's forward again just before its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linears: dict[str, LoraLinear],
        seed: int,
        size: int,
        padded: bool,
        skip_output: bool,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linears, ctx.seed, ctx.size, ctx.padded = linears, seed, size, padded
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if not skip_output:
            for piece, one in zip(_slices(x, size), _seeds(seed), strict=False):
                out[piece] = mlp(x[piece], linears, one, padded)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        parameters = trained(list(ctx.linears.values()))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = [torch.zeros_like(one) for one in parameters]
        for piece, one in zip(_slices(x, ctx.size), _seeds(ctx.seed), strict=False):
            with torch.enable_grad():
                part = x[piece].detach().requires_grad_()
                out = mlp(part, ctx.linears, one, ctx.padded, skip_output=True)
            found = torch.autograd.grad(out, [part, *parameters], grads[0][piece])
            dx[piece] = found[0]
            if sums:
                torch._foreach_add_(sums, list(found[1:]))
        return dx, None, None, None, None, None, *sums


def _slices(x: Tensor, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _seeds(seed: int) -> Any:
    """A seed for each piece, far from the seeds of all layers."""
    return ((seed + 1_000_003 * number) % 2**31 for number in range(2**20))


def mlp_in_pieces(
    x: Tensor, linears: dict[str, LoraLinear], seed: int, size: int, padded: bool = False, skip_output: bool = False
) -> Tensor:
    """``mlp`` that holds the inner activations of ``size`` tokens at a time, in forward and backward.

    Args:
        x: ``[tokens, hidden]``.
        linears: as for ``mlp``.
        seed: of the dropout masks, which differ from those of ``mlp``.
        size: tokens of a piece.
        padded: as for ``mlp``.
        skip_output: as for ``mlp``; set when a recomputed layer runs again, as backward needs the saved input alone.
    """
    mine = {name: linears[name] for name in ("gate_proj", "up_proj", "down_proj")}
    return _Pieces.apply(x, mine, seed, size, padded, skip_output, *trained(list(mine.values())))  # type: ignore[no-any-return]


def mlp_ops(layer: LayerSize, size: int, packs: bool = False) -> tuple[Op, ...]:
    """What ``mlp`` costs, operation by operation.

    Args:
        layer: its third group is gate and up, its fourth down.
        size: bytes of a number.
        packs: as for ``gate_up``.
    """
    gate_up_group, down = layer.groups[2:]
    inner, hidden = down[0].inputs * size, layer.hidden * size
    scratch, trains = input_scratch(gate_up_group, size), rank_of(gate_up_group) > 0
    both = 2 * inner + backward_columns_of(gate_up_group) * size
    kept = Saved("gate and up, LoRA columns", both)
    if packs:
        kept = Saved("gate and up in 8 bits", packed_bytes(down[0].inputs))
        # Their gradients get a matrix of their own, or, if that is all that is read, are e4m3 at once.
        scratch += both * (trains or gate_up_group[0].passes.backward is not Kind.FP8)
    saved = (kept, *input_saves(gate_up_group, size, padded=True))
    narrow = down[0].passes.forward.narrow
    # Without an adapter down reads its input in 8 bits alone.
    output, beside = inner * (not narrow or rank_of(down) > 0), eight_bits(down[0].inputs) * narrow
    first = Op("gate_up", saved, output, hidden, scratch, saves_input=trains, beside=beside)
    return first, group_linear_op("down", down, size)


def mlp_in_pieces_op(layer: LayerSize, size: int, piece: int) -> Op:
    """What ``mlp_in_pieces`` costs: its input, and for one piece at a time all that ``mlp`` does.

    Args:
        layer: as for ``mlp_ops``.
        size: bytes of a number.
        piece: tokens of one.
    """
    hidden, columns = layer.hidden * size, forward_columns_of(layer.groups[2]) * size
    gate_up_op, down = mlp_ops(layer, size)
    of_all = gate_up_op.saved_bytes + down.saved_bytes
    # The largest of: forward of down, whose result is not computed but has memory; backward of down, and of gate and
    # up.
    most = max(
        gate_up_op.output * (not down.saved) + hidden,
        down.grad + down.scratch + hidden,
        down.grad + gate_up_op.grad + gate_up_op.scratch - down.saved_bytes + hidden,
    )
    saved = (Saved("input", hidden + columns),)
    return Op("mlp_in_pieces", saved, hidden, hidden, fixed=piece * (of_all + most), saves_input=True)
