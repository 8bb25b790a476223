"""The content of a message where it is no text: nothing beside calls, typed parts, or a tool's result as an object."""

import json
from typing import Any

from qwen_lit.data import marks
from qwen_lit.data.calls import read_calls
from qwen_lit.data.columns import Seen, renamed
from qwen_lit.data.faults import RowError, snippet
from qwen_lit.data.marks import Message

PART_TYPES = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "tool_call": "tool_call",
}
MEDIA_TYPES = ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url")
RESULT_AS_TEXT = "tool results written as JSON text"


def read_content(
    content: Any,
    thought: Any,
    parts: list[Message],
    calls: list[Message],
    role: str,
    key: str,
    number: int,
    seen: Seen,
) -> tuple[str, Any, list[Message], list[Message]]:
    """Content that is no text: nothing beside calls, typed parts, or a tool's result as an object.

    Returns:
        Its text, thought, parts and calls.

    Raises:
        RowError: it is something else.
    """
    if content is None and (calls or (role == "system" and seen.tools)):
        return "", thought, parts, calls
    typed = isinstance(content, list) and all(
        isinstance(one, str) or (isinstance(one, dict) and "type" in one) for one in content
    )
    if isinstance(content, dict) and content.get("type") in PART_TYPES:
        content, typed = [content], True
    if role == "tool" and content is not None and not typed:
        seen.notes[RESULT_AS_TEXT] = None
        return json.dumps(content, ensure_ascii=False), thought, parts, calls
    if content is None:
        raise RowError("missing field", f"message {number} ({role}) has no text in {key!r}.")
    if not isinstance(content, list):
        raise RowError(
            "wrong type",
            f"message {number} ({role}): {key!r} is of type {type(content).__name__}, not text: "
            f"{snippet(repr(content))}",
        )
    texts = {"text": "", "reasoning": ""}
    for part in content:
        _part(part, number, texts, parts, calls, seen)
    if texts["reasoning"] and thought not in (None, texts["reasoning"]):
        raise RowError("two thoughts", f"message {number} has two thoughts that differ.")
    return texts["text"], texts["reasoning"] or thought, parts, calls


def _part(
    part: Any, number: int, texts: dict[str, str], parts: list[Message], calls: list[Message], seen: Seen
) -> None:
    """Add one typed part to a message's texts, parts and calls."""
    part = renamed(part, None, seen) if isinstance(part, dict) else {"type": "text", "text": part}
    given, what = part.get("type"), f"a part of message {number}"
    if given in MEDIA_TYPES:
        raise RowError("media", f"message {number} has a part of type {given!r}; only text is trained here.")
    kind = PART_TYPES.get(given) if isinstance(given, str) else None
    keys = ("text", "value", "tool_call") if kind == "tool_call" else ("text", "value", str(given))
    key = next((key for key in keys if key in part), "text")
    value, flag = part.get(key), marks.trained(part, what)
    for extra in part:
        if extra in ("type", key) or extra in marks.NAMES:
            continue
        marks.refuse_unsure(extra, what)
        if part[extra] not in ("", [], {}):
            seen.unread.add(f"parts.{extra}")
    if kind == "tool_call":
        made = read_calls(value, seen.unread)
        calls += made
        parts += [{"type": kind, "text": "", "train": flag} for _ in made]
    elif kind == "text" and isinstance(value, str) and value.strip() and calls:
        raise RowError("bad part", f"message {number} has text after a tool call: {snippet(value)}")
    elif kind is not None and isinstance(value, str):
        texts[kind] += value
        parts.append({"type": kind, "text": value, "train": flag})
    else:
        raise RowError("bad part", f"message {number} has a part of type {given!r} without text.")
