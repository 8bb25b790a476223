"""The order of turns: what a chat template expects, and what ``data.odd_turns: merge`` makes of others."""

from typing import Any

from qwen_lit.data.faults import RowError, snippet

Message = dict[str, Any]
# What may stand before a message of each role; None is the start.
ORDER: dict[str, set[str | None]] = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
JOINED = {
    "user": "questions in a row joined",
    "assistant": "answers in a row joined",
    "system": "system prompts in a row joined",
}
GREETING = "greeting before the first question kept, not trained"
MIDDLE = "system prompt in the middle kept"
AFTER_TOOL = "question right after a tool's result kept"


def ordered(messages: list[Message], odd_turns: str, notes: dict[str, None]) -> list[Message]:
    """The messages in an order that a chat template expects.

    Args:
        messages: with ``train``.
        odd_turns: ``error``, or ``merge``: turns of one role in a row become one, a greeting is context, and a system
            prompt in the middle or a question after a tool's result stays where it is.
        notes: gains what was done.

    Raises:
        RowError: naming the turn in a wrong place.
    """
    before: str | None = None
    for number, message in enumerate(messages):
        role = message["role"]
        if before not in ORDER[role]:
            if odd_turns == "merge":
                return _merged(messages, notes)
            raise RowError("wrong order", _where(messages, number) + _remedy(messages))
        before = role
    return messages


def _where(messages: list[Message], number: int) -> str:
    message = messages[number]
    place = f"follows {messages[number - 1]['role']}" if number else "comes first"
    said = snippet(message["content"]) if message["content"] or not message.get("tool_calls") else "a tool call"
    return f"message {number} ({message['role']}) {place}: {said}"


def _remedy(messages: list[Message]) -> str:
    """What ``merge`` would do, where it takes the row."""
    notes: dict[str, None] = {}
    try:
        merged = _merged(messages, notes)
    except RowError:
        return ""
    if not any(message["train"] and message["role"] == "assistant" for message in merged):
        return ""
    return f"; data.odd_turns: merge takes it ({', '.join(notes)})."


def _merged(messages: list[Message], notes: dict[str, None]) -> list[Message]:
    found: list[Message] = []
    asked = False
    for number, message in enumerate(messages):
        role, before = message["role"], found[-1]["role"] if found else None
        if role in JOINED and role == before:
            found[-1] = _joined(found[-1], message, number)
            notes[JOINED[role]] = None
            continue
        if role == "tool" and before not in ORDER["tool"]:
            raise RowError("wrong order", _where(messages, number))
        if role == "assistant" and not asked:
            message = {key: value for key, value in message.items() if key != "parts"} | {"train": False}
            notes[GREETING] = None
        elif role == "system" and before is not None:
            notes[MIDDLE] = None
        elif role == "user" and before == "tool":
            notes[AFTER_TOOL] = None
        asked = asked or role == "user"
        found.append(message)
    return found


def _joined(first: Message, second: Message, number: int) -> Message:
    """Two messages of one role as one: texts with an empty line between, calls side by side.

    Raises:
        RowError: text would move before a call or a thought.
    """
    if first.get("tool_calls") and second["content"].strip():
        raise RowError("wrong order", f"message {number} has text after a tool call: {snippet(second['content'])}")
    role, thinks = second["role"], second.get("reasoning_content") or "</think>" in second["content"]
    if thinks and role == "assistant":
        raise RowError("wrong order", f"message {number} has a thought in the middle of a turn.")
    content = "\n\n".join(text for text in (first["content"], second["content"]) if text.strip())
    calls = first.get("tool_calls", []) + second.get("tool_calls", [])
    made = first | {"content": content, "train": first["train"] or second["train"]}
    if calls:
        made["tool_calls"] = calls
    parts = _parts(first, second["content"]) + _parts(second, "")
    made.pop("parts", None)
    if role == "assistant" and any(part["train"] for part in parts) and not all(part["train"] for part in parts):
        made["parts"] = sorted(parts, key=lambda part: part["type"] == "tool_call")
    return made


def _parts(message: Message, following: str) -> list[Message]:
    """What a message is made of and whether each is trained; ``following`` is the text that is joined to it."""
    if "parts" in message:
        parts = [part | {"train": part["train"] and message["train"]} for part in message["parts"]]
    else:
        parts = [
            {"type": kind, "text": message[key], "train": message["train"]}
            for kind, key in (("reasoning", "reasoning_content"), ("text", "content"))
            if message.get(key)
        ]
        parts += [{"type": "tool_call", "text": "", "train": message["train"]} for _ in message.get("tool_calls", [])]
    texts = [part for part in parts if part["type"] == "text"]
    if texts and following.strip():
        texts[-1]["text"] += "\n\n"
    return parts
