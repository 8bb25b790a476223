"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: between two optimizer steps while training, at once elsewhere."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

log = logging.getLogger(__name__)
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Interrupted(BaseException):
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
            # A stop under way clears up; another signal must not cut that short.
            if _stopping():
                return
            raise Interrupted(signum)
        if first:
            second = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
            log.warning("%s: finishing the optimizer step, then saving%s", signal.Signals(signum).name, second)

    def defer(self) -> None:
        """Let signals wait for ``check``; takes the handlers back from whoever has set them."""
        self.deferred = True
        _set(self.handle)

    def release(self) -> None:
        """Let signals stop the process at once again."""
        self.deferred = False

    def note(self, signum: int) -> None:
        """Let a signal that another process was sent count as this one's, unless this one has had its own."""
        if self.received is None:
            self.received = signum

    def reset(self) -> None:
        """Begin anew: no signal has come, and the next one stops at once."""
        self.deferred, self.received = False, None

    def check(self) -> None:
        """Obey a noted signal.

        Raises:
            Interrupted: there is one.
        """
        if self.received is not None:
            raise Interrupted(self.received)


INTERRUPTS = Interrupts()


def _stopping() -> bool:
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error is not None


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Signals wait meanwhile, so that a process begun here takes none before it says how."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(*_: object) -> None:
    """In a process that works for another: whoever began it ends it, and signals of anyone else are for that one.

    A signal to the whole process group would else end the worker while its parent still finishes a step with it.
    """
    for signum in WATCHED:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGTERM])
    threading.Thread(target=_obey, args=(os.getppid(),), name="sigterm-of-parent", daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(143)


def end_with(parent: int) -> None:
    """End this process soon after the one that began it, however that ends."""
    threading.Thread(target=_end_with, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Signals stop the command with its exit code; the former handlers come back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in WATCHED}
    INTERRUPTS.reset()
    _set(INTERRUPTS.handle)
    try:
        yield
    finally:
        INTERRUPTS.release()
        for signum, handler in before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)


def _set(handler: object) -> None:
    if threading.current_thread() is threading.main_thread():
        for signum in WATCHED:
            # nohup ignores SIGHUP, and means it.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, handler)  # type: ignore[arg-type]
