"""The blocks of a model on the host, and how they get from there into slots on the device.

Blocks lie in a file that is mapped: its pages are in memory once, however many processes read it. Where the system
lets a device read the mapping itself (pinned memory), a block is copied in one go beside the computation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_lit.frozen.ring import Copies


@dataclass(frozen=True)
class Blocks:
    """The blocks of all layers, in one piece of host memory."""

    memory: Tensor
    """uint8, not written to."""
    starts: tuple[int, ...]
    """First byte of each layer's block."""
    sizes: tuple[int, ...]
    """Bytes of each layer's block."""

    def read(self, number: int) -> Tensor:
        """A layer's block, uint8 ``[its size]``, in the memory of all."""
        return self.memory[self.starts[number] : self.starts[number] + self.sizes[number]]


class ImmediateCopies:
    """Copies that are done when they begin; for a CPU."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def begin(self, number: int, slot: Tensor, free: Any) -> Any:
        """Copy a layer's block."""
        slot.copy_(self.blocks.read(number))
        return number

    def finish(self, copy: Any) -> None:
        """There is nothing to wait for."""

    def mark(self) -> Any:
        """There is nothing to wait for."""
        return None

    def close(self) -> None:
        """There is nothing to give up."""


class PinnedCopies:
    """Copies out of pinned memory, on a stream of their own."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        """Begins nothing.

        Args:
            blocks: pinned.
            device: of the slots, CUDA's.
        """
        self.blocks, self.device = blocks, device
        self.stream = torch.cuda.Stream(device)

    def begin(self, number: int, slot: Tensor, free: Any) -> Any:
        """Copy a layer's block once the slot is free."""
        if free is not None:
            self.stream.wait_event(free)
        with torch.cuda.stream(self.stream):
            slot.copy_(self.blocks.read(number), non_blocking=True)
            return self.stream.record_event()

    def finish(self, copy: Any) -> None:
        """Let the current stream wait for the copy."""
        torch.cuda.current_stream(self.device).wait_event(copy)

    def mark(self) -> Any:
        """An event after all that the current stream has been given."""
        return torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        """Wait for all copies."""
        self.stream.synchronize()


def copies_of(blocks: Blocks, numbers: Sequence[int], device: torch.device) -> Copies:
    """The fastest way that the system allows for copying blocks to a device.

    Args:
        blocks: on the host.
        numbers: of the layers that will be copied again and again.
        device: of the slots.
    """
    if device.type != "cuda":
        return ImmediateCopies(blocks)
    return PinnedCopies(blocks, device)
