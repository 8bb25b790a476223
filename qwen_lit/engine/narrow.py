"""The frozen weights of a group of linears in 8 bits, made of their 4 bits each time they are used.

The scales of a weight never change, so they are worked out once, when the weight is first used, and kept. Of e4m3
there is one for all weights of a group: the largest absolute value of any of their blocks, which NF4 holds exactly.
Of integers there is one for each row of what is multiplied: the outputs in forward, the inputs in backward.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from torch import Tensor

from qwen_lit.engine.lora_linear import LoraLinear
from qwen_lit.kernels.eight import BLOCK, DTYPES, LEAST, TOP, Narrow, transformed
from qwen_lit.kernels.footprint import LinearSize
from qwen_lit.kernels.kinds import WIDE, Kind, Passes
from qwen_lit.kernels.launch import launches
from qwen_lit.kernels.nf4 import can_dequantize, dequantize
from qwen_lit.kernels.nf4_turned import narrow, narrow_reference

AT_ONCE = 2**22
"""Numbers of a weight that are transformed at a time to find its scales."""


class WeightScales(NamedTuple):
    """What a group's weights are multiplied by to be in 8 bits, and what undoes that."""

    inverse: Tensor
    """float32 ``[1]``, or one for each row of the product's weight."""
    scale: Tensor
    """float32, one for each row of the product's weight."""


class ScaleStore:
    """The scales of every weight that was used, by the first weight of its group."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, Kind, bool], WeightScales] = {}

    def of(self, linears: list[LoraLinear], kind: Kind, turned: bool) -> WeightScales:
        """The scales of a group's weights, which are at hand.

        Args:
            linears: of one input, with 4-bit weights.
            kind: FP8 or INT8.
            turned: for the product of backward, whose rows are the inputs.
        """
        key = id(linears[0].weight), kind, turned
        if key not in self.known:
            # What is made in validation's inference mode could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                made = _of_fp8 if kind is Kind.FP8 else _of_integers
                self.known[key] = made(linears, turned)
        return self.known[key]


def _of_fp8(linears: list[LoraLinear], turned: bool) -> WeightScales:
    tops = [_scales(linear.quant_state).max() for linear in linears]
    most = torch.stack(tops).max().float().clamp_min(LEAST)
    rows = linears[0].width if turned else sum(linear.out for linear in linears)
    return WeightScales((TOP[Kind.FP8] / most).view(1), (most / TOP[Kind.FP8]).expand(rows).contiguous())


def _scales(state: Any) -> Tensor:
    """absmax of every block, float32."""
    if not state.nested:
        return state.absmax.abs()  # type: ignore[no-any-return]
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).abs()


def _of_integers(linears: list[LoraLinear], turned: bool) -> WeightScales:
    tops = [_row_tops(linear, turned) for linear in linears]
    most = torch.stack(tops).amax(0) if turned else torch.cat(tops)
    most = most.clamp_min(LEAST)
    return WeightScales(TOP[Kind.INT8] / most, most / TOP[Kind.INT8] * BLOCK**-0.5)


def _row_tops(linear: LoraLinear, turned: bool) -> Tensor:
    """The largest absolute value of each row of the transformed weight, float32."""
    weight = dequantize_4bit(linear.weight, linear.quant_state)
    weight = weight.t() if turned else weight
    parts = weight.split(max(1, AT_ONCE // weight.shape[1]))
    return torch.cat([transformed(part).abs().amax(1) for part in parts])


def fitting(passes: Passes, group: Sequence[LinearSize]) -> Passes:
    """The kinds of a group's products: those that are asked for, where its weights are in 4 bits and their sizes are
    such as products in 8 bits have; else WIDE.

    Args:
        passes: that are asked for.
        group: linears of one input.
    """
    unit = BLOCK if Kind.INT8 in (passes.forward, passes.backward) else 16
    sizes = [group[0].inputs, *(linear.outputs for linear in group)]
    fits = all(linear.quantized for linear in group) and all(size % unit == 0 for size in sizes)
    return passes if fits else WIDE


def narrow_weight(linears: list[LoraLinear], kind: Kind, turned: bool) -> Narrow:
    """The weights of a group in 8 bits, in the workspace, which the next call overwrites.

    Args:
        linears: of one input, whose passes ``fitting`` allows.
        kind: FP8 or INT8.
        turned: ``[in, out of all]`` for the product of backward; otherwise ``[out of all, in]``.
    """
    first, outs = linears[0], [linear.out for linear in linears]
    shape = (first.width, sum(outs)) if turned else (sum(outs), first.width)
    whole = first.workspace.get(shape, DTYPES[kind], first.weight.device)
    parts = whole.split(outs, 1) if turned else whole.split(outs)
    # All of a layer's weights come at once.
    if first.arrive is not None:
        first.arrive()
    inverse, scale = first.scales.of(linears, kind, turned)
    inverses = [inverse] * len(outs) if turned or len(inverse) == 1 else inverse.split(outs)
    for linear, out, factor in zip(linears, parts, inverses, strict=True):
        _write(linear, kind, turned, factor, out)
    return Narrow(whole, scale)


def _write(linear: LoraLinear, kind: Kind, turned: bool, inverse: Tensor, out: Tensor) -> None:
    packed, state = linear.weight, linear.quant_state
    fits = can_dequantize(packed, state) and state.blocksize <= BLOCK and state.shape[1] % state.blocksize == 0
    if not fits or not launches(packed):
        out.copy_(narrow_reference(packed, state, kind, turned, inverse))
    elif kind is Kind.FP8 and not turned:
        dequantize(packed, state, out, inverse)
    else:
        narrow(packed, state, kind, turned, inverse, out)
