"""The blocks of a model on the host, and how they get from there into slots on the device.

Blocks lie in a file that is mapped: its pages are in memory once, however many processes read it. Where the system
lets a device read the mapping itself (pinned memory, ``pinned.py``), a block is copied in one go beside the
computation; where it does not, threads bring it through a few buffers (``fed.py``).
"""

import logging
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_lit.frozen.fed import Feeder, Reader
from qwen_lit.frozen.link import CudaLink, Link
from qwen_lit.frozen.pinned import Pins, pin_blocks, ring_of_buffers
from qwen_lit.frozen.ring import Copies
from qwen_lit.hardware import host_memory

log = logging.getLogger(__name__)

BUFFERS = 4
"""Buffers that blocks pass through which are not pinned, and threads that fill them: one thread copies slower than a
link does."""
BUFFER_SIZES = (2**25, 2**23, 2**21)
"""Bytes of one, from the wanted size to the least."""
GIB = 2**30


@dataclass(frozen=True)
class Blocks:
    """The blocks of all layers, in one piece of host memory."""

    memory: Tensor
    """uint8, not written to."""
    starts: tuple[int, ...]
    """First byte of each layer's block, at a multiple of 4096 from where a page begins."""
    sizes: tuple[int, ...]
    """Bytes of each layer's block."""
    path: Path | None = None
    """The file that ``memory`` is a mapping of, from the first byte on; None for memory that is of no file, or of one
    without a name."""

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


class LinkCopies:
    """Copies over a link, beside the computation: of pinned blocks in one go, of the others through buffers."""

    def __init__(self, blocks: Blocks, numbers: Sequence[int], link: Link, most: int) -> None:
        """Pins what the system allows; what it refuses is fed.

        Args:
            blocks: on the host.
            numbers: of the layers that will be copied again and again.
            link: to the device of the slots.
            most: bytes of blocks that are pinned at most.

        Raises:
            UserError: the file does not give the blocks.
        """
        self.blocks, self.link = blocks, link
        self.pins, reader = Pins(link), Reader(blocks.memory, blocks.path)
        # The buffers come first: blocks may take all that the system pins.
        buffers = ring_of_buffers(self.pins, BUFFERS, BUFFER_SIZES)
        within = [one for place, one in enumerate(numbers) if sum(map(self._size, numbers[: place + 1])) <= most]
        try:
            self.pinned = pin_blocks(
                self.pins,
                {number: blocks.read(number) for number in within},
                blocks.path is not None,
                lambda number: reader.fetch(blocks.starts[number], blocks.sizes[number]),
            )
        except BaseException:
            self.pins.release()
            reader.close()
            raise
        self.feeder: Feeder | None = None
        if self.pinned.issuperset(numbers):
            for buffer in buffers:
                if buffer.data_ptr() in self.pins.held:
                    self.pins.remove(buffer)
            reader.close()
        else:
            self.feeder = Feeder(link, reader, buffers)
        self.end = weakref.finalize(self, _end, os.getpid(), link, self.feeder, self.pins)

    def _size(self, number: int) -> int:
        return self.blocks.sizes[number]

    def begin(self, number: int, slot: Tensor, free: Any) -> Any:
        """Copy a layer's block once the slot is free; of those that are not pinned, only ``numbers``."""
        source = self.blocks.read(number) if number in self.pinned else None
        if self.feeder is not None:
            return self.feeder.deliver(self.blocks.starts[number], slot, free, source)
        assert source is not None
        if free is not None:
            self.link.hold(free)
        self.link.send(slot, source)
        return self.link.record()

    def finish(self, copy: Any) -> None:
        """Let the current stream wait for the copy; a fed block's is waited for until it is on its way.

        Raises:
            UserError: the file does not give the block.
        """
        if self.feeder is None:
            self.link.follow(copy)
        else:
            self.feeder.finish(copy)

    def mark(self) -> Any:
        """An event after all that the current stream has been given."""
        return self.link.mark()

    def close(self) -> None:
        """End all copies and threads, and give the pinned memory back; the end of the process does so too."""
        self.end()


def _end(process: int, link: Link, feeder: Feeder | None, pins: Pins) -> None:
    """What is left to do when copies are not needed any more."""
    if os.getpid() != process:
        # A worker that was forked has neither the threads nor the device.
        return
    if feeder is not None:
        feeder.close()
    link.drain()
    pins.release()


def copies_of(blocks: Blocks, numbers: Sequence[int], device: torch.device, most: int | None = None) -> Copies:
    """The fastest way that the system allows for copying blocks to a device.

    Args:
        blocks: on the host.
        numbers: of the layers that will be copied again and again.
        device: of the slots.
        most: bytes of blocks that are pinned at most; None for half of the host memory that is free.

    Raises:
        UserError: the file does not give the blocks.
    """
    if device.type != "cuda":
        return ImmediateCopies(blocks)
    copies = LinkCopies(blocks, numbers, CudaLink(device), host_memory() // 2 if most is None else most)
    log.info(pinning(copies, numbers))
    return copies


def pinning(copies: LinkCopies, numbers: Sequence[int]) -> str:
    """What is pinned of the streamed layers, and why not more, in words."""
    sizes, refusal = copies.blocks.sizes, copies.pins.refusal
    there = sum(sizes[number] for number in copies.pinned)
    text = f"frozen layers on the host: {there / GIB:.2f} of {sum(sizes[one] for one in numbers) / GIB:.2f} GiB pinned"
    if copies.feeder is None:
        return text
    why = f"the system refuses more ({refusal})" if refusal else "more would leave too little host memory"
    return f"{text}; {why}; the rest passes through {BUFFERS} buffers of {copies.feeder.size // 2**20} MiB"


def measured_rate(blocks: Blocks, numbers: Sequence[int], device: torch.device, most: int | None = None) -> float:
    """Bytes a second in which layers come to a CUDA device, one after the other and all of them in turn.

    Blocks that come from the disk because host memory is too short for them are timed as they come from there.

    Args:
        blocks: on the host.
        numbers: of the layers that would be streamed.
        device: of the slots; it has room for two.
        most: as of ``copies_of``.

    Raises:
        UserError: the file does not give the blocks.
    """
    copies = LinkCopies(blocks, numbers, CudaLink(device), host_memory() // 2 if most is None else most)
    try:
        return rate_of(copies, numbers, device)
    finally:
        copies.close()


def rate_of(copies: LinkCopies, numbers: Sequence[int], device: torch.device) -> float:
    """Bytes a second of these layers, from the time that two of each kind take: pinned ones and fed ones.

    Args:
        copies: of which none is under way.
        numbers: of the layers.
        device: of the slots.
    """
    sizes, seconds = copies.blocks.sizes, 0.0
    fits = sum(sizes[one] for one in numbers) <= host_memory()
    for kind in ([one for one in numbers if (one in copies.pinned) is pinned] for pinned in (True, False)):
        if kind:
            slots = [torch.empty(sizes[one], dtype=torch.uint8, device=device) for one in kind[:2]]
            # What fits comes from memory from the second time on.
            times = [_seconds(copies, kind[:2], slots) for _ in range(2 if fits else 1)]
            seconds += times[-1] * sum(sizes[one] for one in kind) / sum(sizes[one] for one in kind[:2])
    return sum(sizes[one] for one in numbers) / seconds


def _seconds(copies: LinkCopies, numbers: Sequence[int], slots: Sequence[Tensor]) -> float:
    """Seconds until layers are in their slots."""
    free = copies.mark()
    copies.link.wait(free)
    started = time.perf_counter()
    for copy in [copies.begin(number, slot, free) for number, slot in zip(numbers, slots, strict=True)]:
        copies.finish(copy)
    copies.link.drain()
    return time.perf_counter() - started
