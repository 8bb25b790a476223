"""How long a device stands still for copies to and from the host, found without waiting for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Waits:
    """Pairs of events around the points at which the computation may have to wait for a copy."""

    def __init__(self, device: torch.device) -> None:
        """Notes nothing until ``on`` is set.

        Args:
            device: that computes.
        """
        self.device, self.on = device, False
        self.pairs: list[tuple[Any, Any]] = []
        self.unused: list[Any] = []

    def mark(self) -> Any:
        """An event with a time, after all that the current stream has been given; None where there are no such."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        event = self.unused.pop() if self.unused else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the current stream is made to wait, and given nothing else."""
        before = self.mark() if self.on else None
        yield
        if before is not None:
            self.pairs.append((before, self.mark()))

    def take(self) -> float:
        """Seconds that were waited since the last call, where the device is past both events; the others are left for
        the next one."""
        done, left = list[tuple[Any, Any]](), list[tuple[Any, Any]]()
        for pair in self.pairs:
            (done if pair[1].query() else left).append(pair)
        self.pairs = left
        self.unused += [event for pair in done for event in pair]
        return sum(before.elapsed_time(after) for before, after in done) / 1000
