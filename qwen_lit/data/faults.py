"""What can be wrong with data, and how it is shown."""

from dataclasses import dataclass


class DataError(ValueError):
    """The data cannot be used as it is; the message says what to fix."""


class RowError(DataError):
    """One row cannot be used; ``kind`` groups equal faults."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.source: str | None = None
        """``path:line``, where it is not that of the row."""


@dataclass(frozen=True)
class Fault:
    """A row that is not trained, and why."""

    source: str
    """``path:line``."""
    kind: str
    message: str
    """With a snippet of the row."""


def snippet(line: bytes | str) -> str:
    """The start of a row, on one line and short enough to print."""
    text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
    return repr(text[:80] + ("…" if len(text) > 80 else ""))
