"""The last line of a terminal: a bar that stays below whatever is printed."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tqdm import tqdm
from tqdm.utils import ObjectWrapper, disp_len, disp_trim

# tqdm's own lock is one of all processes: a worker that is killed with it in hand would stop the others.
tqdm.set_lock(threading.RLock())
ERASE = "\r\x1b[K"
"""Clears the line, with what the user has typed into it, such as ^C."""
SHORTEST, LONGEST = 10, 40
"""Columns of the bar itself."""
EDGE = 3
"""Columns that stay free at the right, so that a ^C does not break the line."""


def on_screen() -> bool:
    """Whether a bar can be drawn: on a terminal, or in a notebook."""
    return _is_terminal(sys.stderr) or "ipykernel" in sys.modules


def _is_terminal(file: Any) -> bool:
    return bool(file.isatty()) and os.environ.get("TERM") != "dumb" and not _is_of_rich(file)


def _is_of_rich(file: Any) -> bool:
    """Whether a bar of rich, such as Lightning's RichProgressBar, prints above itself what is written here."""
    return hasattr(file, "rich_proxied_file")


def columns(file: Any) -> int:
    """The width of a terminal as it is now; 100 of what is none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(file.fileno()).columns or 100
    return 100


def drawn(width: int, head: str, share: float | None, parts: Mapping[str, str], spare: tuple[str, ...]) -> str:
    """A line of a bar.

    Args:
        width: columns it may take; wide characters, such as Chinese ones, take two.
        head: what stands before the bar.
        share: of it that is filled; None draws no bar.
        parts: name to what stands after the bar.
        spare: names of the parts that are left out where there is no room, the first of them first.
    """
    shown = dict(parts)
    for name in (None, *spare):
        shown.pop(name, None)  # type: ignore[arg-type]
        details = "  ".join(shown.values())
        room = width - disp_len(head) - disp_len(details) - (5 if share is not None else 2)
        if room >= (SHORTEST if share is not None else 0):
            break
    if share is None or room < 3:
        return disp_trim(f"{head}  {details}", width)
    room = min(room, LONGEST)
    filled = round(room * min(max(share, 0.0), 1.0))
    return f"{head} |{'█' * filled}{' ' * (room - filled)}|  {details}"


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar whose line is made by a function; what is printed through ``above`` stands above it."""

    monitor_interval = 0
    """Without tqdm's thread: processes are forked beside it."""

    def __init__(self, line: Callable[[int], str], delay: float = 0.0) -> None:
        """Draws it at once, or after a while.

        Args:
            line: gives the line for a width in columns.
            delay: seconds in which nothing is drawn.
        """
        self.line, self.next = line, 0.0
        self.shown_from = time.monotonic() + delay
        super().__init__(file=sys.stderr, leave=False)

    def draw(self) -> None:
        """Draw it again, at most ten times a second."""
        if time.monotonic() >= self.next:
            self.refresh()

    def refresh(self, *options: Any, **named: Any) -> bool | None:  # type: ignore[override]
        """Draw it at once, unless its delay is not over; tqdm does so when a line has been printed above."""
        now = time.monotonic()
        self.next = now + 0.1
        return super().refresh(*options, **named) if now >= self.shown_from else None

    def __str__(self) -> str:
        return self.line(columns(self.fp) - EDGE)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What draws a text in the place of the last one."""
        if not _is_terminal(file):
            return tqdm.status_printer(file)
        length, width = 0, columns(file)

        def draw(text: str) -> None:
            nonlocal length, width
            now = columns(file)
            # A terminal that has become narrower has wrapped the line.
            rows = (length - 1) // now if now < width and length else 0
            file.write((f"\x1b[{rows}A\r\x1b[J" if rows else ERASE) + text)
            file.flush()
            length, width = disp_len(text), now

        return draw


def above(text: str, file: Any) -> None:
    """Print lines to a terminal or a notebook, above the bars of this process."""
    tqdm.write((ERASE if _is_terminal(file) else "") + text, file=file)
    file.flush()


class Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints the lines of a log, above a bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        if not on_screen() and not _is_of_rich(sys.stderr):
            super().emit(record)
            return
        try:
            if _is_of_rich(sys.stderr):
                print(self.format(record), file=sys.stderr)
            else:
                above(self.format(record), self.stream)
        except Exception:
            self.handleError(record)


class _Above(ObjectWrapper):  # type: ignore[misc]
    """Standard output whose lines stand above the bar."""

    rest = ""
    """What is no whole line yet."""

    def write(self, text: str) -> int:
        whole, newline, rest = (self.rest + text).rpartition("\n")
        self.wrapper_setattr("rest", rest)
        if newline:
            above(whole, sys.stderr)
        return len(text)


@contextlib.contextmanager
def printing_above() -> Iterator[None]:
    """What is printed meanwhile, by whatever callback, stands above the bar."""
    before = sys.stdout
    if not (_is_terminal(before) and _is_terminal(sys.stderr)):
        yield
        return
    stream = _Above(before)
    sys.stdout = stream
    try:
        yield
    finally:
        if sys.stdout is stream:
            sys.stdout = before
        before.write(stream.rest)
