"""Whether a device multiplies in 8 bits, asked of the device itself: it may lack the instructions, or a library the
product."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from qwen_lit.kernels.eight import quantize
from qwen_lit.kernels.eight_product import product
from qwen_lit.kernels.kinds import Kind, Passes

TOKENS, INPUTS, OUTPUTS = 4096, 3584, 4608
"""Of the product that is tried: q, k and v of a 7B."""
MOST_ERROR = {Kind.FP8: 0.06, Kind.INT8: 0.03}
"""Relative to the product in bf16: half as much again as each makes of numbers from a normal distribution."""
TIMES = 5
"""Runs of which the fastest counts."""


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
            reason = _tried(kind, device)
        # A library may raise anything for what a device does not have.
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if reason is not None:
            return f"{torch.cuda.get_device_name(device)}: {reason}"
    return None


def _tried(kind: Kind, device: torch.device) -> str | None:
    draw = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device, generator=draw)

    x, w, bias = random(TOKENS, INPUTS), random(OUTPUTS, INPUTS), random(OUTPUTS)
    weight = quantize(w, kind)

    def narrow() -> Tensor:
        return product(quantize(x, kind), weight, x.dtype, bias)

    def wide() -> Tensor:
        return torch.addmm(bias, x, w.t())

    wanted = wide().float()
    error = float((narrow().float() - wanted).norm() / wanted.norm())
    # An error that is no number is too large.
    if not error <= MOST_ERROR[kind]:
        return f"a product in {kind.value} has an error of {error:.3f}"
    seconds, usual = _seconds(narrow, device), _seconds(wide, device)
    return (
        f"a product in {kind.value} takes {seconds / usual:.2f} times as long as in bf16" if seconds > usual else None
    )


def _seconds(function: Callable[[], Tensor], device: torch.device) -> float:
    """Of one call, what it launches included."""
    found = []
    for _ in range(TIMES):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found)
