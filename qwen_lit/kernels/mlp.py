"""The MLP of a decoder layer: gate and up as one function with SwiGLU, and the whole in pieces for very long rows."""

from typing import Any

import torch
from torch import Tensor

from qwen_lit.kernels.linear import Group, as_trained, group_linear, group_reference, trained
from qwen_lit.kernels.member import Member
from qwen_lit.kernels.swiglu import swiglu, swiglu_backward_, swiglu_reference


def gate_up_reference(x: Tensor, gate: Member, up: Member, seed: int) -> Tensor:
    """The plain twin of ``gate_up``."""
    return swiglu_reference(*group_reference(x, [gate, up], seed))


class _GateUp(torch.autograd.Function):
    """Saves gate and up in one matrix, which backward turns into their gradients in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Member, up: Member, seed: int, roomy: bool, *parameters: Tensor) -> Tensor:
        group = ctx.group = Group([gate, up], seed, roomy)
        wide, low = group.image(x)
        width = gate.out
        both = torch.empty(x.shape[0], 2 * width + group.extra, dtype=x.dtype, device=x.device)
        outs = [both[:, :width], both[:, width : 2 * width]]
        if gate.bias is None and up.bias is None:
            group.forward(wide, low, outs)
        else:
            for out, y in zip(outs, group.forward(wide, low), strict=True):
                out.copy_(y)
        ctx.save_for_backward(both, *([] if low is None else [wide, low]))
        ctx.spent = False
        return swiglu(both, width)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.spent:
            raise RuntimeError("gate and up have become their gradients; this graph cannot be run backward twice")
        ctx.spent = True
        both, *image = ctx.saved_tensors
        wide, low = image or (both[:, :0], None)
        (dh,) = grads
        width = dh.shape[1]
        swiglu_backward_(both, dh)
        mine = [both[:, :width], both[:, width : 2 * width]]
        last = both[:, width:] if low is not None else None
        dx, found = ctx.group.backward(wide, low, mine, ctx.needs_input_grad[0], last)
        return dx, None, None, None, None, *as_trained(found, ctx.group.members)


def gate_up(x: Tensor, gate: Member, up: Member, seed: int = 0, roomy: bool = False) -> Tensor:
    """``silu(gate(x)) * up(x)``; backward may run once.

    Args:
        x: ``[tokens, in]``.
        gate: with the same width and dropout rate as ``up``.
        up: the other.
        seed: of the dropout mask.
        roomy: as for ``group_linear``.

    Returns:
        ``[tokens, out]``.
    """
    return _GateUp.apply(x, gate, up, seed, roomy, *trained([gate, up]))  # type: ignore[no-any-return]


def mlp(x: Tensor, members: dict[str, Member], seed: int, roomy: bool = False, dead: bool = False) -> Tensor:
    """``down(silu(gate(x)) * up(x))``.

    Args:
        x: ``[tokens, hidden]``.
        members: ``gate_proj``, ``up_proj`` and ``down_proj``.
        seed: of the dropout masks; the next one is used too.
        roomy: as for ``group_linear``, and ``roomy_grad`` too.
        dead: the result is of no use to anyone, and not computed.
    """
    h = gate_up(x, members["gate_proj"], members["up_proj"], seed, roomy)
    (out,) = group_linear(h, [members["down_proj"]], seed + 1, roomy_grad=roomy, dead=dead)
    return out


class _Pieces(torch.autograd.Function):
    """Saves its input alone; backward computes a piece's forward again just before its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        members: dict[str, Member],
        seed: int,
        size: int,
        roomy: bool,
        dead: bool,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.members, ctx.seed, ctx.size, ctx.roomy = members, seed, size, roomy
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if not dead:
            for piece, one in zip(_slices(x, size), _seeds(seed), strict=False):
                out[piece] = mlp(x[piece], members, one, roomy)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        parameters = trained(list(ctx.members.values()))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = [torch.zeros_like(one) for one in parameters]
        for piece, one in zip(_slices(x, ctx.size), _seeds(ctx.seed), strict=False):
            with torch.enable_grad():
                part = x[piece].detach().requires_grad_()
                out = mlp(part, ctx.members, one, ctx.roomy, dead=True)
            found = torch.autograd.grad(out, [part, *parameters], grads[0][piece])
            dx[piece] = found[0]
            if sums:
                torch._foreach_add_(sums, list(found[1:]))
        return dx, None, None, None, None, None, *sums


def _slices(x: Tensor, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _seeds(seed: int) -> Any:
    """Another one for each piece, far from those of the layers."""
    return ((seed + 1_000_003 * number) % 2**31 for number in range(2**20))


def mlp_in_pieces(
    x: Tensor, members: dict[str, Member], seed: int, size: int, roomy: bool = False, dead: bool = False
) -> Tensor:
    """``mlp`` that holds the inner activations of ``size`` tokens at a time, in both passes.

    Args:
        x: ``[tokens, hidden]``.
        members: as for ``mlp``.
        seed: of the dropout masks, which differ from those of ``mlp``.
        size: tokens of a piece.
        roomy: as for ``mlp``.
        dead: as for ``mlp``: so in a recomputation, which needs the saved input alone.
    """
    mine = {name: members[name] for name in ("gate_proj", "up_proj", "down_proj")}
    return _Pieces.apply(x, mine, seed, size, roomy, dead, *trained(list(mine.values())))  # type: ignore[no-any-return]
