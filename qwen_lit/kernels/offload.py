"""Inputs of recomputed layers in pinned host memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

BLOCK = 2**26
"""Bytes of a pinned block; torch rounds each up to a power of two."""


class HostInputs(saved_tensors_hooks):
    """Within it, saved tensors of one shape wait in host memory; all others stay where they are."""

    def __init__(self, shape: torch.Size) -> None:
        """Only tensors of ``shape``, ``[tokens, width]``, are moved."""
        self.shape = shape
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.shape != self.shape or not tensor.is_cuda:
            return tensor
        rows = max(1, BLOCK // (tensor.shape[1] * tensor.element_size()))
        blocks = []
        for part in tensor.split(rows):
            block = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=True)
            block.copy_(part, non_blocking=True)
            blocks.append(block)
        return tensor.device, blocks

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, blocks = packed
        tensor = torch.empty(self.shape, dtype=blocks[0].dtype, device=device)
        for part, block in zip(tensor.split(blocks[0].shape[0]), blocks, strict=True):
            part.copy_(block, non_blocking=True)
        return tensor
