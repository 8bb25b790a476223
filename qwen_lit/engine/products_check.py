"""Whether a device multiplies in 8 bits, asked of the device itself: it may lack the instructions, or a library the
product."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from qwen_lit.kernels.eight import quantize
from qwen_lit.kernels.eight_product import product
from qwen_lit.kernels.kinds import Kind, Passes

TOKENS, INPUTS, OUTPUTS = 4096, 3584, 18944
"""Of the product that is timed: gate of a 7B, which takes much longer than the host to launch it."""
WIDTHS = (896, 3584, 18944, 37888)
"""Inputs of products that are compared: rows of each are made by another tile or number of them."""
FEW, COLUMNS = 67, 256
"""Tokens and outputs of those."""
MOST_ERROR = {Kind.FP8: 0.06, Kind.INT8: 0.03}
"""Relative to the product in bf16: half as much again as each makes of numbers from a normal distribution."""
TOGETHER = 8
"""Products that are timed as one, so that the device works while the host launches."""
TIMES = 8
"""Runs of which the fastest counts; one of them is hardly disturbed where another process uses the device too."""


def refusal(passes: Passes, device: torch.device) -> str | None:
    """Why a device does not compute products as it is asked to, in words; None where it does.

    The CPU computes the references, which is no faster and has the same numbers.

    Args:
        passes: the kinds of both passes.
        device: where it is tried.
    """
    kinds = {passes.forward, passes.backward} - {Kind.WIDE} if device.type == "cuda" else set()
    for kind in sorted(kinds, key=str):
        try:
            reason = _wrong(kind, device) or _slow(kind, device)
        # A library may raise anything for what a device does not have.
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if reason is not None:
            return f"{torch.cuda.get_device_name(device)}: {reason}"
    return None


class _Pair:
    """One product in 8 bits and in bf16, of random numbers."""

    def __init__(self, kind: Kind, tokens: int, inputs: int, outputs: int, device: torch.device) -> None:
        draw = torch.Generator(device).manual_seed(0)
        shapes = ((tokens, inputs), (outputs, inputs), (outputs,))
        self.x, self.w, self.bias = (
            torch.randn(shape, dtype=torch.bfloat16, device=device, generator=draw) for shape in shapes
        )
        self.kind, self.weight = kind, quantize(self.w, kind)

    def narrow(self) -> Tensor:
        """In 8 bits."""
        return product(quantize(self.x, self.kind), self.weight, self.x.dtype, self.bias)

    def wide(self) -> Tensor:
        """In bf16."""
        return torch.addmm(self.bias, self.x, self.w.t())


def _wrong(kind: Kind, device: torch.device) -> str | None:
    for width in WIDTHS:
        pair = _Pair(kind, FEW, width, COLUMNS, device)
        wanted = pair.wide().float()
        error = float((pair.narrow().float() - wanted).norm() / wanted.norm())
        # An error that is no number is too large.
        if not error <= MOST_ERROR[kind]:
            return f"a product in {kind.value} of {width} numbers has an error of {error:.3f}"
    return None


def _slow(kind: Kind, device: torch.device) -> str | None:
    pair = _Pair(kind, TOKENS, INPUTS, OUTPUTS, device)
    # In turn, so that what else the device does slows both.
    times = [[_seconds(one, device) for one in (pair.narrow, pair.wide)] for _ in range(TIMES)]
    seconds, usual = (min(one) for one in zip(*times, strict=True))
    if seconds <= usual:
        return None
    return f"a product in {kind.value} takes {seconds / usual:.2f} times as long as in bf16"


def _seconds(function: Callable[[], Tensor], device: torch.device) -> float:
    """Of ``TOGETHER`` calls."""
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(TOGETHER):
        function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began
