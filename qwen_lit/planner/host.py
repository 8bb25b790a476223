"""What a plan has to know of the machine around the device."""

from dataclasses import dataclass, replace

H100 = 78_000
"""``HostProfile.link`` of an H100: 55 GB/s beside 705 TFLOP/s. On consumer cards copies are easier to hide."""


STEPS = 8
"""The share of the layers is rounded down to a multiple of 1/8, so that two runs on one machine plan alike."""


def rounded(rate: float) -> int:
    """A rate rounded down to one of the eight steps between two powers of two, so that two runs on one machine plan
    alike."""
    step = 2 ** max(0, int(rate).bit_length() - 4)
    return int(rate) // step * step


@dataclass(frozen=True)
class HostProfile:
    """What is measured of a machine before a plan is made; the defaults are safe on any usual one."""

    share: float = 0.0
    """Share of the layers whose saved tensors can be copied to the host while all layers compute."""
    memory: int = 2**62
    """Bytes of the host's memory that this process may pin for what it alone holds: its part of half of all that is
    free."""
    launch: int = 0
    """Tokens that the device computes in the time in which the host launches a micro-batch."""
    link: int = H100
    """Bytes that come to the device out of pinned memory in the time of a billion operations of a large product."""
    blocks: int = H100
    """The same of streamed layers, pinned or not."""
    processes: int = 1
    """On this machine."""
    rate: int = 0
    """Bytes a second over the link, of the slower of its two directions, while all processes of the machine copy; 0
    where it was not measured."""

    def at(self, share: float) -> "HostProfile":
        """The machine with a link that is slower than was measured.

        Args:
            share: of the measured rate that it has.
        """
        part = int(self.share * share * STEPS) / STEPS
        link, blocks = rounded(self.link * share), rounded(self.blocks * share)
        return replace(self, share=part, link=link, blocks=blocks, rate=int(self.rate * share))

    def has_room(self, blocks: int, own: int) -> bool:
        """Whether so much can wait in the host's memory.

        Streamed layers are pinned in up to half of the memory that is free; where they are larger, the rest of them is
        read from their file each time. A quarter of it stays free.

        Args:
            blocks: bytes of streamed layers, which all processes share.
            own: bytes that each process pins beside.
        """
        half = self.processes * self.memory
        return own <= self.memory and 2 * (min(blocks, half) + self.processes * own) <= 3 * half
