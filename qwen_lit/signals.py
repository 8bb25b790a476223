"""SIGTERM, SIGUSR1 and Ctrl-C: between two optimizer steps while training, at once elsewhere."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

log = logging.getLogger(__name__)
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
    """The run was asked to stop; ``exit_code`` is what the command ends with."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 130 if signum == signal.SIGINT else 143


class Interrupts:
    """What signals have come. While ``deferred``, they are noted for the trainer to obey; else they stop at once."""

    def __init__(self) -> None:
        self.deferred = False
        self.received: int | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C ends the process on the spot."""
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(130)
        first = self.received is None
        self.received = signum
        if not self.deferred:
            raise Stopped(signum)
        if first:
            again = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
            log.warning("%s: finishing the optimizer step, then saving%s", signal.Signals(signum).name, again)

    def defer(self) -> None:
        """From here on signals wait for ``check``; takes the handlers back from whoever has set them."""
        self.deferred = True
        _set(self.handle)

    def check(self) -> None:
        """Obey a noted signal.

        Raises:
            Stopped: there is one.
        """
        if self.received is not None:
            raise Stopped(self.received)


INTERRUPTS = Interrupts()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Signals stop the command with its exit code; the former handlers come back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in WATCHED}
    INTERRUPTS.deferred, INTERRUPTS.received = False, None
    _set(INTERRUPTS.handle)
    try:
        yield
    finally:
        INTERRUPTS.deferred = False
        for signum, handler in before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)


def _set(handler: object) -> None:
    if threading.current_thread() is threading.main_thread():
        for signum in WATCHED:
            signal.signal(signum, handler)  # type: ignore[arg-type]
