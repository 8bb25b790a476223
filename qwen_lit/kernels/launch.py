"""Triton where there is a CUDA device and Triton; the plain twins elsewhere."""

from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
    triton = tl = None

__all__ = ["HAS_TRITON", "on_gpu", "tl", "triton"]


def on_gpu(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernels can run: every tensor that is given is on CUDA, and Triton is installed."""
    return HAS_TRITON and all(tensor is None or tensor.is_cuda for tensor in tensors)


def jit(function: Any) -> Any:
    """``triton.jit`` where Triton is installed; elsewhere the function is never launched."""
    return triton.jit(function) if HAS_TRITON else function
