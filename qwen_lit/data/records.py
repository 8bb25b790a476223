"""Rows to conversations: every layout told apart by itself, every fault named, nothing passed over without a word."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwen_lit.data.calls import read_tools
from qwen_lit.data.columns import MEDIA, PREFERENCE, Seen, leftover, refuse, renamed
from qwen_lit.data.examples import CONVERSATION
from qwen_lit.data.faults import RowError, snippet
from qwen_lit.data.layouts import SYSTEMS, read_layout
from qwen_lit.data.marks import Message, mark_row
from qwen_lit.data.questions import read_question
from qwen_lit.data.strict import decode
from qwen_lit.data.turns import ordered
from qwen_lit.thinking import asked

ENCODINGS = ("utf-16", "gb18030", "big5", "cp1252")
REFUSED = MEDIA | PREFERENCE | {"label"}
_written = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


@dataclass
class Conversation:
    """One row, as the chat template takes it."""

    messages: list[Message]
    train: list[bool]
    """One per message; only assistant messages can be True."""
    tools: list[dict[str, Any]] | None
    source: str
    """``path:line``."""
    format: str
    """``alpaca``, ``messages``, ``sharegpt``, ``prompt``, or the columns of another layout."""
    notes: tuple[str, ...] = ()
    """What was changed or is odd."""
    unread: tuple[str, ...] = ()
    """Columns, and keys of messages, that nothing reads."""
    mapped: tuple[str, ...] = ()
    """Columns of ``data.fields`` that the row has."""
    kind: str = CONVERSATION

    @cached_property
    def hash(self) -> int:
        """64 bits of what it says as it was read, wherever it stands; equal for duplicates.

        Raises:
            RowError: it holds half of a surrogate pair, which no tokenizer takes, or what is not JSON.
        """
        try:
            content = unicodedata.normalize("NFC", _written([self.messages, self.tools]))
            return int.from_bytes(hashlib.blake2b(content.encode("utf-8"), digest_size=8).digest(), "big")
        except UnicodeEncodeError as error:
            raise RowError("lone surrogate", f"has half of a surrogate pair at {content[error.start]!r}.") from error
        except RecursionError as error:
            raise RowError("bad JSON", "is nested too deep.") from error
        except TypeError as error:
            raise RowError("wrong type", f"holds a value that is not JSON ({error}).") from error

    def prompt(self, tokenizer: Any, think: bool | None = None) -> list[int]:
        """Token ids of its question, as the chat template renders it for an answer; an answer at its end is left out.

        Args:
            tokenizer: transformers', with a chat template.
            think: the value of the template's switch ``enable_thinking``; None leaves it to the template.

        Raises:
            RowError: it asks nothing, or the template refuses it.
        """
        messages = list(self.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise RowError("no question", "has no question: nothing stands before its answer.")
        try:
            return asked(tokenizer, messages, think, self.tools)
        except Exception as error:  # a template may raise anything
            raise RowError("template", f"the chat template refuses it: {error}") from error


def parse_line(line: bytes) -> Any:
    """One line of JSON.

    Raises:
        RowError: the line is not UTF-8 (with its offset and likely encoding), not JSON, or has a key twice.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        likely = next((name for name in ENCODINGS if _decodes(line, name)), "another encoding")
        raise RowError(
            "not UTF-8",
            f"is not UTF-8 at byte {error.start}, likely {likely}: {snippet(line)}; save the file as UTF-8.",
        ) from error
    try:
        return decode(text)
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        raise RowError("bad JSON", f"is not JSON ({error}): {snippet(text)}") from error


def _decodes(line: bytes, name: str) -> bool:
    try:
        text = line.decode(name)
    except UnicodeError:
        return False
    return name != "utf-16" or text.lstrip("\ufeff")[:1] in ("{", "[")


def parse_row(
    row: Any,
    source: str,
    fields: Mapping[str, str] | None = None,
    odd_turns: str = "error",
    answered: bool = True,
) -> Conversation:
    """Tell the row's layout and turn it into a conversation.

    Args:
        row: the parsed JSON.
        source: ``path:line``, for messages.
        fields: our field name to the file's, for files with other names.
        odd_turns: ``error`` or ``merge``; see ``turns``.
        answered: whether it must have an answer; where it need not, nothing of it is marked as trained.

    Raises:
        RowError: a field is missing, empty or of a wrong type, a role unknown, the order wrong, there is no assistant
            turn, or something says of the row what is not done here.
    """
    if not isinstance(row, dict):
        raise RowError("not an object", f"is of type {type(row).__name__}, not an object with fields.")
    seen = Seen()
    row = renamed(row, fields, seen)
    if not REFUSED.isdisjoint(row):
        refuse(row, "the row")
    read = read_layout if answered else read_question
    try:
        name, messages, used = read(row, fields, seen)
    except RowError as error:
        lower = {key.lower(): value for key, value in row.items()}
        if error.kind not in ("missing field", "raw text") or len(lower) < len(row) or lower.keys() == row.keys():
            raise
        row, (name, messages, used) = lower, read(lower, fields, seen)
    if not messages or not row.keys().isdisjoint(SYSTEMS):
        messages = _with_system(row, messages, odd_turns)
    if answered and row.keys() - used:
        used |= mark_row(row, messages)
        leftover(row, used, messages, seen)
    messages = ordered(messages, odd_turns, seen.notes)
    train = [message.pop("train") and message["role"] == "assistant" and answered for message in messages]
    if answered and True not in train:
        if not any(message["role"] == "assistant" for message in messages):
            raise RowError("no assistant turn", f"has no assistant turn: {snippet(messages[-1]['content'])}")
        raise RowError("nothing to train", "marks every assistant turn as not to be trained.")
    tools = _tools(row, seen) if seen.tools or "tools" in row or "functions" in row else None
    found = Conversation(messages, train, tools, source, name, tuple(seen.notes))
    if seen.unread or seen.mapped:
        found.unread, found.mapped = tuple(sorted(seen.unread)), tuple(sorted(seen.mapped))
    return found


def _with_system(row: dict[str, Any], messages: list[Message], odd_turns: str) -> list[Message]:
    """The messages after the row's own system prompt.

    Raises:
        RowError: there is another, or no message at all.
    """
    systems = []
    for key in SYSTEMS:
        value = row.get(key)
        if not value:
            continue
        if not isinstance(value, str):
            raise RowError(
                "wrong type", f"{key!r} is of type {type(value).__name__}, not text: {snippet(repr(value))}"
            )
        if value.strip() and value not in systems:
            systems.append(value)
    if not messages:
        raise RowError("empty conversation", "has no messages.")
    if messages[0]["role"] == "system" and messages[0]["content"] in systems:
        systems.remove(messages[0]["content"])
    if len(systems) + (messages[0]["role"] == "system") > 1 and odd_turns != "merge":
        raise RowError(
            "two system prompts",
            f"has another system prompt beside its messages: {snippet(systems[-1])}; data.odd_turns: merge joins "
            "the two.",
        )
    return [{"role": "system", "content": system, "train": False} for system in systems] + messages


def _tools(row: dict[str, Any], seen: Seen) -> list[dict[str, Any]] | None:
    """The tools of a row, beside its messages or in the first of them.

    Raises:
        RowError: two lists of tools differ.
    """
    found: list[dict[str, Any]] | None = None
    for given in (row.get("tools"), row.get("functions"), seen.tools):
        tools = read_tools(given) if given else None
        if found and tools and tools != found:
            raise RowError("bad tools", "has two lists of tools that differ; keep one.")
        found = found or tools
    return found
