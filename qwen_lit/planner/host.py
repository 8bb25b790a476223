"""What a plan has to know of the machine around the device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HostProfile:
    """What is measured of a machine before a plan is made; the defaults are safe on any machine."""

    share: float = 0.0
    """Share of the layers whose saved tensors can be copied to the host while all layers compute."""
    memory: int = 2**62
    """Bytes of the host's memory that this process may pin for what it alone holds."""
    launch: int = 0
    """Tokens that the device computes in the time in which the host launches a micro-batch."""
    link: int = 78_000
    """Bytes that come to the device out of pinned memory in the time of a billion operations of a large product. The
    default is an H100's, 55 GB/s beside 705 TFLOP/s, where a copy is harder to hide than on any card for consumers."""
    unpinned: int = 13_000
    """The same for memory that is not pinned; the default is an H100's, 9.7 GB/s."""
    shared: int = 2**62
    """Bytes of the host's memory that all processes on the machine may pin together, blocks of streamed layers
    included, which they share; 0 where the system pins no blocks."""
    processes: int = 1
    """On this machine."""

    def rate(self, blocks: int, waiting: int) -> int:
        """Bytes of streamed layers that come in the time of a billion operations.

        Args:
            blocks: bytes of all streamed layers.
            waiting: bytes of host memory that each process pins beside.
        """
        return self.link if blocks + self.processes * waiting <= self.shared else self.unpinned
