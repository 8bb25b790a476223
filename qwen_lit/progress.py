"""How far work is: a bar on a terminal, a line every ten seconds in a log file, nothing for what is short."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from typing import TypeVar

from qwen_lit.screen import Bar, drawn, on_screen

log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE, EVERY = 2.0, 10.0
"""Seconds of work of which nothing is said, and between two lines of a log file."""


class Progress:
    """Shows how far work is that is done in pieces. Use as a context, and call ``advance`` after each piece."""

    def __init__(self, what: str, total: float | None = None, unit: str = "") -> None:
        """Begins to count time.

        Args:
            what: is done, such as "preparing rows".
            total: of all pieces; None where it is not known.
            unit: of ``total`` and of ``advance``; ``B`` is bytes, none is a share that is not shown as a number.
        """
        self.what, self.total, self.unit = what, total, unit
        self.done, self.counts = 0.0, dict[str, int]()
        self.began = time.monotonic()
        self.next = self.began + PATIENCE
        self.bar = Bar(self._drawn, PATIENCE) if on_screen() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.close()

    def advance(self, done: float, **counts: int) -> None:
        """Count work that is done.

        Args:
            done: in the unit of ``total``.
            counts: what else has been counted with it, such as ``rows=500``.
        """
        self.done += done
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.draw()
        elif now >= self.next:
            self.next = now + EVERY
            log.info("%s: %s", self.what, ", ".join(self.parts(now).values()))

    def parts(self, now: float) -> dict[str, str]:
        """What is done, how fast, and how long it takes still.

        Args:
            now: seconds, as ``time.monotonic`` counts them.
        """
        parts = {"share": f"{self.done / self.total:.0%}"} if self.total else {}
        if self.unit:
            shown = [_size(value) if self.unit == "B" else f"{value:,.0f}" for value in (self.done, self.total or 0)]
            unit = "" if self.unit == "B" else f" {self.unit}"
            parts["amount"] = f"{shown[0]} of {shown[1]}{unit}" if self.total else f"{shown[0]}{unit}"
        seconds = max(now - self.began, 1e-3)
        parts |= {name: f"{count:,} {name} ({count / seconds:,.0f}/s)" for name, count in self.counts.items()}
        if self.total and self.done:
            left = (now - self.began) * max(0.0, self.total / self.done - 1)
            parts["left"] = f"{timedelta(seconds=round(left))} left"
        return parts

    def _drawn(self, width: int) -> str:
        share = self.done / self.total if self.total else None
        return drawn(width, self.what, share, self.parts(time.monotonic()), (*self.counts, "amount"))


def through(items: Collection[T], what: str, unit: str) -> Iterator[T]:
    """The items; how many are done is shown."""
    with Progress(what, len(items), unit) as progress:
        for item in items:
            yield item
            progress.advance(1)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Log now and then how long a piece of work has taken, where it cannot show its own bar: in a log file."""
    if on_screen():
        yield
        return
    began = time.monotonic()
    with meanwhile(
        lambda: log.info("%s: %s so far", what, timedelta(seconds=round(time.monotonic() - began))), PATIENCE, EVERY
    ):
        yield


@contextlib.contextmanager
def meanwhile(work: Callable[[], object], first: float, every: float) -> Iterator[None]:
    """Call a function in a thread while the context lasts.

    Args:
        work: what is called.
        first: seconds until the first call.
        every: seconds between two calls.
    """
    ended = threading.Event()

    def repeat() -> None:
        wait = first
        while not ended.wait(wait):
            work()
            wait = every

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
