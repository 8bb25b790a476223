"""Host memory that a device reads by itself, as much as the system allows."""

import mmap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen_lit.frozen.link import Link

THREADS = 4
"""Blocks that are pinned at once: where their pages are still on the disk, each thread waits for its own."""
SPARE = 2**27
"""Bytes of what a system lets a process pin that are left to batches and saved tensors, where it refuses more."""


@dataclass
class Pins:
    """Pinned memory of a process. It is unmapped only after it is released, as a device may read it until then."""

    link: Link
    held: dict[int, Tensor] = field(default_factory=dict)
    """By the address."""
    refusal: str | None = None
    """Why the system pinned something not."""

    def add(self, memory: Tensor, mapped: bool) -> bool:
        """Pin memory.

        Args:
            memory: uint8, whole pages.
            mapped: it is a file's, and not written to.

        Returns:
            Whether the system allows it.
        """
        refusal = self.link.register(memory.data_ptr(), memory.numel(), mapped)
        if refusal is None:
            self.held[memory.data_ptr()] = memory
            return True
        self.refusal = refusal
        return False

    def remove(self, memory: Tensor) -> None:
        """Give one piece up; no copy out of it is under way."""
        self.link.unregister(memory.data_ptr())
        del self.held[memory.data_ptr()]

    def release(self) -> None:
        """Give all of it up; no copy out of it is under way."""
        for memory in list(self.held.values()):
            self.remove(memory)


def pin_blocks(
    pins: Pins, blocks: Mapping[int, Tensor], mapped: bool, fetch: Callable[[int], None] = lambda number: None
) -> set[int]:
    """Pin blocks from the first to the last, until the system refuses one.

    Args:
        pins: to which they are added.
        blocks: uint8, whole pages each, by number.
        mapped: they are a file's.
        fetch: called with the number of a block, to have its pages in memory.

    Returns:
        The numbers of those that are pinned.
    """
    pins.refusal = None

    def pinned(number: int) -> bool:
        if pins.refusal is None:
            fetch(number)
        return pins.refusal is None and pins.add(blocks[number], mapped)

    with ThreadPoolExecutor(THREADS) as threads:
        found = [number for number, there in zip(blocks, threads.map(pinned, blocks), strict=True) if there]
    spared = SPARE if pins.refusal is None else 0
    while found and spared < SPARE:
        block = blocks[found.pop()]
        pins.remove(block)
        spared += block.numel()
    return set(found)


def ring_of_buffers(pins: Pins, count: int, sizes: Sequence[int]) -> list[Tensor]:
    """Memory through which blocks pass that are not pinned themselves.

    Args:
        pins: to which it is added where the system pins it.
        count: of buffers.
        sizes: of a buffer in bytes, whole pages, from the wanted one to the least.

    Returns:
        uint8, of the first size that the system pins; where it pins none, of the last and pageable.
    """
    for size in sizes:
        buffers = [torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) for _ in range(count)]
        there = [one for one in buffers if pins.add(one, mapped=False)]
        if len(there) == count:
            break
        for one in there:
            pins.remove(one)
    return buffers
