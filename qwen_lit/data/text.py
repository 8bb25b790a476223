"""Rows and files of raw text, told apart from conversations: read as they stand."""

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwen_lit.data.columns import Seen, leftover, refuse, renamed
from qwen_lit.data.examples import RAW_TEXT
from qwen_lit.data.faults import RowError, snippet
from qwen_lit.data.layouts import FIELDS, LISTS
from qwen_lit.data.messages import ROLE_KEYS, TEXT_KEYS
from qwen_lit.data.passages import Passage

OTHERS = FIELDS - {*ROLE_KEYS, *TEXT_KEYS}
"""Columns that make a row something else than a text."""


@dataclass
class Document:
    """A text, or a passage of one, to be trained as it is."""

    text: str
    source: str
    """``path:line``, of the first line of a passage."""
    passage: Passage | None = None
    """Where the passage stands in its text file; None for a row."""
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    format: str = "text"
    kind: str = RAW_TEXT

    @cached_property
    def hash(self) -> int:
        """64 bits of the text, wherever it stands."""
        return text_hash(self.text)

    def prompt(self, tokenizer: Any, think: bool | None = None) -> list[int]:
        """Token ids of the text, which the model is to continue; ``think`` is for conversations.

        Raises:
            RowError: it is a file of text.
        """
        if self.passage is not None:
            raise RowError("raw text", 'is a text without questions; write what is to be continued as {"text": …}.')
        return list(tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"])


def text_hash(text: str) -> int:
    """64 bits; equal for texts that are equal in their normal form.

    Raises:
        RowError: half of a surrogate pair stands in it.
    """
    try:
        raw = unicodedata.normalize("NFC", text).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("lone surrogate", f"has half of a surrogate pair at {text[error.start]!r}.") from error
    return int.from_bytes(hashlib.blake2b(b"text\0" + raw, digest_size=8).digest(), "big")


def read_text(row: Any, source: str, fields: Mapping[str, str] | None = None) -> Document | None:
    """The raw text of a row; None where the row is a conversation, or what it is is for others to say.

    Args:
        row: the parsed JSON, or a passage of a text file.
        source: ``path:line``.
        fields: our field name to the file's.

    Raises:
        RowError: the text is empty or none, or something says of the row what is not done here.
    """
    if isinstance(row, Passage):
        return Document(row.text, source, row)
    if not isinstance(row, dict) or not row.keys() & {"text", "Text", "TEXT", (fields or {}).get("text", "text")}:
        return None
    seen = Seen()
    row = renamed(row, fields, seen)
    if "text" not in row:
        row = {key.lower() if key in ("Text", "TEXT") else key: value for key, value in row.items()}
    if "text" not in row or any(_holds(row, key) for key in row.keys() & OTHERS):
        return None
    refuse(row, "the row")
    text = row["text"]
    if not isinstance(text, str):
        raise RowError("wrong type", f"'text' is of type {type(text).__name__}, not text: {snippet(repr(text))}")
    if not text.strip():
        raise RowError("empty field", "'text' is empty.")
    leftover(row, {"text"}, [{"role": "assistant", "content": text}], seen)
    return Document(text, source, None, tuple(seen.notes), tuple(sorted(seen.unread)), tuple(sorted(seen.mapped)))


def _holds(row: dict[str, Any], key: str) -> bool:
    value = row[key]
    if key in LISTS and key == "data" and not isinstance(value, list):
        return False
    return value not in (None, "", [], {}) and not (isinstance(value, str) and not value.strip())
