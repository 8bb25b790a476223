"""Triton where it is installed and tensors are on CUDA; the PyTorch references elsewhere."""

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
    triton = tl = None

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

__all__ = ["HAS_TRITON", "INTERPRETED", "TensorDescriptor", "cdiv", "launches", "power_of_2", "tl", "triton"]
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on the CPU, slowly: to test them where there is no CUDA device."""


def launches(*tensors: torch.Tensor | None) -> bool:
    """Whether kernels are launched: Triton is installed, and every tensor that is given is on CUDA."""
    return INTERPRETED or (HAS_TRITON and all(tensor is None or tensor.is_cuda for tensor in tensors))


def cdiv(number: int, size: int) -> int:
    """How many pieces of a size a number has, the last one whole or not; triton.cdiv takes as long as a launch."""
    return -(-number // size)


def power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number, for the same reason."""
    return 1 << max(0, number - 1).bit_length()


def jit(function: Any) -> Any:
    """``triton.jit`` where Triton is installed; elsewhere the function is never launched.

    A module of kernels keeps its annotations as text: ``tl`` may be missing, and the interpreter reads them so.
    """
    return triton.jit(function) if HAS_TRITON else function
