"""How fast bytes go between the host and a device, while all that share the way copy too."""

import time
from collections.abc import Callable
from functools import partial

import torch

COPIED = 2**26
"""Bytes that are copied to time the link."""

WINDOW = 0.1
"""Seconds in which copies of one kind are timed, over and over: the ranks of a machine begin together, so in this time
all of them use what they share of the way to its memory."""

LONG_WINDOW = 0.5
"""The same in a run: neighbours copy now and then, and what counts is how much they do on average."""


class LinkTimer:
    """Copies between a CUDA device and memory that it reads by itself."""

    def __init__(self, device: torch.device) -> None:
        """Takes the memory on both sides.

        Raises:
            RuntimeError: one for which ``is_full`` holds, where one of them has too little.
        """
        self.device = device
        self.there = torch.empty(COPIED, dtype=torch.uint8, device=device)
        self.here = torch.empty(COPIED, dtype=torch.uint8, device="cpu", pin_memory=True)
        for target, source in self._ways:
            self._copy(target, source)

    @property
    def _ways(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (self.here, self.there), (self.there, self.here)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> int:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(self.device)
        return COPIED

    def rates(self, window: float = WINDOW) -> tuple[float, float]:
        """Bytes a second to the host, and then from it.

        Args:
            window: seconds of each.
        """
        out, back = (rate_of(partial(self._copy, *way), window) for way in self._ways)
        return out, back


def rate_of(copy: Callable[[], int], window: float) -> float:
    """Bytes a second of a copy that is made over and over, and at least once.

    Args:
        copy: returns its bytes when it has ended.
        window: seconds.
    """
    done, took, started = 0, 0.0, time.perf_counter()
    while not done or took < window:
        done += copy()
        took = time.perf_counter() - started
    return done / took
