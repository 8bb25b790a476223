"""Files of raw text: read in bounded memory, in passages that end at line ends."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from qwen_lit.data.decoding import not_utf8
from qwen_lit.data.faults import RowError

BOM = b"\xef\xbb\xbf"
PASSAGE_BYTES = 500_000
BEFORE = 64
"""Characters of the passage before, which give the first token of a passage its context."""
JSON = re.compile(rb'\s*(?:\[\s*\{\s*"|\{\s*"[^"\n]{1,100}"\s*:)')
"""How JSON rows begin; a novel that begins with a bracket does not."""


@dataclass(frozen=True)
class Passage:
    """Consecutive lines of a text file; joined, the passages of a file are its text."""

    text: str
    line: int = 1
    """The number of its first line."""
    opens: bool = True
    """Whether the text begins with it."""
    closes: bool = True
    """Whether the text ends with it."""
    before: str = ""
    """The end of the passage before."""


def holds_json(start: bytes) -> bool:
    """Whether a text file holds rows of JSON.

    Args:
        start: of the file.
    """
    return JSON.match(start.removeprefix(BOM)) is not None


def read_passages(
    path: str, file: BinaryIO, done: Callable[[], float], size: int = PASSAGE_BYTES
) -> Iterator[tuple[str, Passage | RowError, float]]:
    """The place of each passage, ``path:line``, the passage, and the share of the file that ends with it.

    Args:
        path: of the file, as messages name it.
        file: its bytes.
        done: tells the share that has been read.
        size: bytes of a passage; it goes on to the end of its line.

    Raises:
        DataError: the file is not UTF-8 text.
    """
    line, at, before, opens = 1, 0, "", True
    block = (file.read(size) + file.readline()).removeprefix(BOM)
    while block or opens:
        share, following = done(), file.read(size)
        following += file.readline()
        if b"\0" in block:
            raise not_utf8(path, block, f"at byte {at + block.index(0)}")
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError as error:
            sample = block[block.rfind(b"\n", 0, error.start) + 1 :]
            raise not_utf8(path, sample, f"at byte {at + error.start}") from error
        if opens and not following and not text.strip():
            yield f"{path}:1", RowError("empty file", "holds no text."), 1.0
            return
        yield f"{path}:{line}", Passage(text, line, opens, not following, before), share
        line, at, before, opens = line + block.count(b"\n"), at + len(block), text[-BEFORE:], False
        block = following
