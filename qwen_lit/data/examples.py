"""What is trained at once, whatever kind of row it was made of, and what every row tells of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from qwen_lit.data.faults import RowError

IGNORED = -100
NO_END = -1
CONVERSATION, RAW_TEXT = "conversation", "raw text"
OfOneKind = TypeVar("OfOneKind", contravariant=True)
KINDS = (CONVERSATION, RAW_TEXT)
"""Names of the kinds of rows, in the order of their numbers on disk."""


@dataclass
class Example:
    """Token ids with the ranges that are trained: a row, one turn of it with its history, or a block of a text."""

    input_ids: list[int]
    spans: list[tuple[int, int]]
    """Ranges ``[begin, end)`` of ``input_ids`` that are trained, in order."""
    source: str
    """``path:line``."""
    kind: str
    """One of ``KINDS``."""
    hash: int
    """64 bits of what the row says; rows with the same hash are on the same side of the split."""
    prompt_end: int
    """Tokens at the beginning that stand for a prompt, where the model is asked to go on from this example."""
    end: int = NO_END
    """The token with which each trained turn ends; ``NO_END`` where nothing says that the model is to stop there."""
    note: str = ""
    """What was changed, ``; `` between changes."""
    thought: bool = False
    """Whether a trained turn begins with a thought."""

    @property
    def labels(self) -> list[int]:
        """Labels, as long as ``input_ids`` and not shifted; -100 where nothing is trained."""
        labels = [IGNORED] * len(self.input_ids)
        for begin, end in self.spans:
            labels[begin:end] = self.input_ids[begin:end]
        return labels


class Row(Protocol):
    """A row of a file that has been read, of one kind of those that ``encoding`` lists."""

    source: str
    """``path:line``."""
    kind: str
    """One of ``KINDS``."""
    format: str
    """The layout in which it was written."""
    unread: tuple[str, ...]
    """Columns, and keys of messages, that nothing reads."""
    mapped: tuple[str, ...]
    """Columns of ``data.fields`` that it has."""

    @property
    def hash(self) -> int:
        """64 bits of what it says, wherever it stands; equal for duplicates.

        Raises:
            RowError: it says what no tokenizer takes.
        """
        ...

    def prompt(self, tokenizer: Any, think: bool | None = None) -> list[int]:
        """Token ids of what it asks, without its answer.

        Args:
            tokenizer: transformers'.
            think: the value of the chat template's switch ``enable_thinking``; None leaves it to the template.

        Raises:
            RowError: it asks nothing.
        """
        ...


class RowEncoder(Protocol[OfOneKind]):
    """Turns rows of one kind into examples; one for each process."""

    def encode(self, rows: Sequence[OfOneKind], /) -> list[list[Example | RowError]]:
        """For each row its examples; in the place of one that cannot be used, why.

        Raises:
            DataError: ids differ from the tokenizer's own.
        """
        ...
