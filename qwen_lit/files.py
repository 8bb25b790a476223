"""Files that are whole on disk."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_dir(path: Path) -> None:
    """Make the entries of a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_or_absent(partial: Path, path: Path) -> Iterator[None]:
    """A file that is written as ``partial`` meanwhile stands at ``path``, durable, once all has gone well."""
    try:
        yield
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
