"""What copies to a device ask of it; a test puts another in its place."""

from typing import Any, Protocol

import torch
from torch import Tensor

READ_ONLY = 8
"""cudaHostRegisterReadOnly: the device only reads the memory, which a mapping of a file without it is refused for."""

MAPPED = 2
"""cudaHostRegisterMapped: kernels read the memory too, as they do an embedding that waits on the host."""


class Link(Protocol):
    """The way from host memory to one device. Copies run one after the other, beside what the device computes.

    Events are what the link makes of them. Any thread may call.
    """

    def register(self, address: int, size: int, mapped: bool) -> str | None:
        """Let the device read host memory by itself.

        Args:
            address: of its first byte; a page begins there.
            size: in bytes.
            mapped: it is a file's, and not written to.

        Returns:
            None where it is pinned; else why the system refuses that, after which the device is usable as before.
        """

    def unregister(self, address: int) -> None:
        """Take back what ``register`` let."""

    def send(self, slot: Tensor, source: Tensor) -> None:
        """Copy after all that was sent before; at once or later.

        Args:
            slot: uint8, on the device.
            source: uint8, on the host, of the same size; it stays as it is until the copy has ended.
        """

    def hold(self, event: Any) -> None:
        """Send nothing more before an event."""

    def record(self) -> Any:
        """The event that all that was sent until now has ended."""

    def wait(self, event: Any) -> None:
        """Return after an event."""

    def follow(self, event: Any) -> None:
        """Let the device compute what this thread gives it from now on after an event."""

    def mark(self) -> Any:
        """The event that the device has computed all that this thread has given it until now."""

    def drain(self) -> None:
        """Return when all that was sent has ended."""


class CudaLink:
    """The link to a CUDA device, by a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def register(self, address: int, size: int, mapped: bool) -> str | None:
        """As of ``Link``, by ``cudaHostRegister``."""
        cudart: Any = torch.cuda.cudart()
        # A thread begins on the first device, where the call would make a context.
        with torch.cuda.device(self.device):
            for flags in (READ_ONLY, 0) if mapped else (MAPPED,):
                error = cudart.cudaHostRegister(address, size, flags)
                if error == cudart.cudaError.success:
                    return None
                self._settle()
        return str(cudart.cudaGetErrorString(error))

    def _settle(self) -> None:
        """CUDA keeps the error of a call that was refused, and the next kernel of the thread would raise it."""
        try:
            torch.empty(1, device=self.device).fill_(0)
        except RuntimeError:
            return

    def unregister(self, address: int) -> None:
        """As of ``Link``."""
        with torch.cuda.device(self.device):
            torch.cuda.cudart().cudaHostUnregister(address)

    def send(self, slot: Tensor, source: Tensor) -> None:
        """As of ``Link``; from memory that is not pinned, it returns when that is copied."""
        with torch.cuda.stream(self.stream):
            slot.copy_(source, non_blocking=True)

    def hold(self, event: Any) -> None:
        """As of ``Link``."""
        self.stream.wait_event(event)

    def record(self) -> Any:
        """As of ``Link``."""
        # A thread that waits for it sleeps: the processor has a model to launch.
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        return event

    def wait(self, event: Any) -> None:
        """As of ``Link``."""
        event.synchronize()

    def follow(self, event: Any) -> None:
        """As of ``Link``."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> Any:
        """As of ``Link``."""
        return torch.cuda.current_stream(self.device).record_event()

    def drain(self) -> None:
        """As of ``Link``."""
        self.stream.synchronize()
