"""The MLP of a decoder layer: gate and up as one function with SwiGLU, and the whole in pieces for very long rows."""

from typing import Any

import torch
from torch import Tensor

from qwen_lit.engine.linear import Group, as_trained, group_linear, group_reference, trained
from qwen_lit.engine.lora_linear import LoraLinear
from qwen_lit.kernels.swiglu import swiglu, swiglu_backward_, swiglu_reference


def gate_up_reference(x: Tensor, gate: LoraLinear, up: LoraLinear, seed: int) -> Tensor:
    """The plain twin of ``gate_up``."""
    return swiglu_reference(*group_reference(x, [gate, up], seed))


class _GateUp(torch.autograd.Function):
    """Saves gate and up in one matrix, which backward turns into their gradients in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: LoraLinear, up: LoraLinear, seed: int, padded: bool, *parameters: Tensor
    ) -> Tensor:
        group = ctx.group = Group([gate, up], seed, padded)
        augmented, xa = group.down_projection(x)
        width = gate.out
        both = torch.empty(x.shape[0], 2 * width + group.extra, dtype=x.dtype, device=x.device)
        outs = [both[:, :width], both[:, width : 2 * width]]
        if gate.bias is None and up.bias is None:
            group.forward(augmented, xa, outs)
        else:
            for out, y in zip(outs, group.forward(augmented, xa), strict=True):
                out.copy_(y)
        ctx.save_for_backward(both, *([] if xa is None else [augmented, xa]))
        ctx.spent = False
        return swiglu(both, width)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.spent:
            raise RuntimeError("gate and up have become their gradients; this graph cannot be run backward twice")
        ctx.spent = True
        both, *image = ctx.saved_tensors
        augmented, xa = image or (both[:, :0], None)
        (dh,) = grads
        width = dh.shape[1]
        swiglu_backward_(both, dh)
        mine = [both[:, :width], both[:, width : 2 * width]]
        last = both[:, width:] if xa is not None else None
        dx, found = ctx.group.backward(augmented, xa, mine, ctx.needs_input_grad[0], last)
        return dx, None, None, None, None, *as_trained(found, ctx.group.linears)


def gate_up(x: Tensor, gate: LoraLinear, up: LoraLinear, seed: int = 0, padded: bool = False) -> Tensor:
    """``silu(gate(x)) * up(x)``; backward may run once.

    Args:
        x: ``[tokens, in]``.
        gate: with the same width and dropout rate as ``up``.
        up: the other.
        seed: of the dropout mask.
        padded: as for ``group_linear``.

    Returns:
        ``[tokens, out]``.
    """
    return _GateUp.apply(x, gate, up, seed, padded, *trained([gate, up]))  # type: ignore[no-any-return]


def mlp(
    x: Tensor, linears: dict[str, LoraLinear], seed: int, padded: bool = False, skip_output: bool = False
) -> Tensor:
    """``down(silu(gate(x)) * up(x))``.

    Args:
        x: ``[tokens, hidden]``.
        linears: ``gate_proj``, ``up_proj`` and ``down_proj``.
        seed: of the dropout masks; the next one is used too.
        padded: as for ``group_linear``, and ``grad_padded`` too.
        skip_output: the result is of no use to anyone, and not computed.
    """
    h = gate_up(x, linears["gate_proj"], linears["up_proj"], seed, padded)
    (out,) = group_linear(h, [linears["down_proj"]], seed + 1, grad_padded=padded, skip_output=skip_output)
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
    """Another one for each piece, far from those of the layers."""
    return ((seed + 1_000_003 * number) % 2**31 for number in range(2**20))


def mlp_in_pieces(
    x: Tensor, linears: dict[str, LoraLinear], seed: int, size: int, padded: bool = False, skip_output: bool = False
) -> Tensor:
    """``mlp`` that holds the inner activations of ``size`` tokens at a time, in both passes.

    Args:
        x: ``[tokens, hidden]``.
        linears: as for ``mlp``.
        seed: of the dropout masks, which differ from those of ``mlp``.
        size: tokens of a piece.
        padded: as for ``mlp``.
        skip_output: as for ``mlp``: so in a recomputation, which needs the saved input alone.
    """
    mine = {name: linears[name] for name in ("gate_proj", "up_proj", "down_proj")}
    return _Pieces.apply(x, mine, seed, size, padded, skip_output, *trained(list(mine.values())))  # type: ignore[no-any-return]
