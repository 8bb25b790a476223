"""Rows to conversations: every format told apart by itself, every fault named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_lit.data.faults import RowError, snippet


@dataclass
class Conversation:
    """One row, as the chat template takes it."""

    messages: list[dict[str, Any]]
    train: list[bool]
    """One per message; only assistant messages can be True."""
    tools: list[dict[str, Any]] | None
    source: str
    """``path:line``."""
    format: str
    """alpaca, messages, sharegpt or prompt."""


ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool", "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
# What may stand before a message of each role; None is the start.
ORDER: dict[str, set[str | None]] = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
ENCODINGS = ("utf-16", "gb18030", "big5", "cp1252")


def parse_line(line: bytes) -> Any:
    """One line of JSON.

    Raises:
        RowError: the line is not UTF-8 (with its offset and likely encoding) or not JSON.
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
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("bad JSON", f"is not JSON ({error}): {snippet(text)}") from error


def _decodes(line: bytes, name: str) -> bool:
    try:
        text = line.decode(name)
    except UnicodeError:
        return False
    return name != "utf-16" or text.lstrip("\ufeff")[:1] in ("{", "[")


def parse_row(row: Any, source: str, fields: Mapping[str, str] | None = None) -> Conversation:
    """Tell the row's format and turn it into a conversation.

    Args:
        row: the parsed JSON.
        source: ``path:line``, for messages.
        fields: our field name to the file's, for files with other names.

    Raises:
        RowError: a field is missing, empty or of a wrong type, a role unknown, the order wrong, or no assistant turn.
    """
    if not isinstance(row, dict):
        raise RowError("not an object", f"is of type {type(row).__name__}, not an object with fields.")
    row = _renamed(row, fields)
    tools = _tools(row.get("tools", row.get("functions")))
    if "messages" in row:
        name, messages = "messages", _messages(row["messages"], "role", "content", fields)
    elif "conversations" in row:
        name, messages = "sharegpt", _messages(row["conversations"], "from", "value", fields)
    elif "prompt" in row or "completion" in row:
        name, messages = "prompt", _prompt(row, fields)
    else:
        name, messages = "alpaca", _alpaca(row)
    if row.get("system"):
        system = _text(row, "system")
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif messages[0]["content"] != system:
            raise RowError("two system prompts", f"has another system prompt beside its messages: {snippet(system)}")
    _check_order(messages)
    weights = [message.pop("train", True) for message in messages]
    train = [bool(w) and message["role"] == "assistant" for w, message in zip(weights, messages, strict=True)]
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn", f"has no assistant turn: {snippet(messages[-1]['content'])}")
    if not any(train):
        raise RowError("nothing to train", "marks every assistant turn as not to be trained.")
    return Conversation(messages, train, tools, source, name)


def _renamed(row: dict[str, Any], fields: Mapping[str, str] | None) -> dict[str, Any]:
    """A row or message by our names; a field that is null is absent, as many writers mean it."""
    if None in row.values():
        row = {key: value for key, value in row.items() if value is not None}
    if not fields:
        return row
    renamed = {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}
    taken = set(fields.values())
    return {key: value for key, value in row.items() if key not in taken and key not in renamed} | renamed


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        raise RowError(
            "missing field", f"misses {field!r}; it has {sorted(map(str, row))} (data.fields maps other names)."
        )
    if not isinstance(value, str):
        raise RowError("wrong type", f"{field!r} is of type {type(value).__name__}, not text: {snippet(repr(value))}")
    if not value.strip():
        raise RowError("empty field", f"{field!r} is empty.")
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError("bad tools", f"tools is not JSON ({error}): {snippet(value)}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("bad tools", f"tools is not a list of objects: {snippet(repr(value))}")
    # OpenAI's older functions are bare; templates take either, and servers hand over the newer form.
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in value]


def _prompt(row: dict[str, Any], fields: Mapping[str, str] | None) -> list[dict[str, Any]]:
    if isinstance(row.get("prompt"), list):
        answer = row.get("completion")
        if isinstance(answer, dict | list):
            answers = _messages(answer if isinstance(answer, list) else [answer], "role", "content", fields)
        else:
            answers = [{"role": "assistant", "content": _text(row, "completion")}]
        # The completion alone is trained; the turns before it are its prompt.
        return [{**one, "train": False} for one in _messages(row["prompt"], "role", "content", fields)] + answers
    return [
        {"role": "user", "content": _text(row, "prompt")},
        {"role": "assistant", "content": _text(row, "completion")},
    ]


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("bad history", "history must be a list of [question, answer] pairs.")
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) and t.strip() for t in turn)):
            raise RowError("bad history", f"history must be a list of [question, answer] pairs: {snippet(repr(turn))}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = _text(row, "instruction")
    if not isinstance(row.get("input", ""), str) or row.get("input", "").strip():
        question += "\n" + _text(row, "input")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]


def _messages(turns: Any, role_key: str, text_key: str, fields: Mapping[str, str] | None) -> list[dict[str, Any]]:
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise RowError("wrong type", f"the messages are text, not a list: {snippet(turns)}") from error
    if not isinstance(turns, list) or not turns:
        raise RowError("empty conversation", "has no messages.")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise RowError("wrong type", f"message {number} is a {type(turn).__name__}, not an object.")
        turn = _renamed(turn, fields)
        # Either spelling is taken in either list: both are found in the wild.
        role = turn.get(_first(turn, role_key, "from", "role"))
        if not isinstance(role, str) or role not in ROLES:
            raise RowError("unknown role", f"message {number} has the role {role!r}; known are {sorted(ROLES)}.")
        text = _first(turn, text_key, "content", "value")
        if role == "function_call":
            message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": _calls(turn.get(text))}
        else:
            message = _message(turn, ROLES[role], text, number)
        message["train"] = _trained(turn, f"message {number}") and message.get("train", True)
        messages.append(message)
    return messages


def _first(turn: dict[str, Any], *names: str) -> str:
    return next((name for name in names if name in turn), names[0])


def _trained(given: dict[str, Any], what: str) -> bool:
    """Whether a message or a part of one is trained, by whichever of the words it has."""
    for word in ("train", "weight", "loss_weight"):
        value = given.get(word)
        if value is None:
            continue
        if value in (0, "false", "False"):
            return False
        if value not in (1, "true", "True"):
            raise RowError("bad weight", f"{what} has {word} {value!r}; text is trained (1, true) or not (0, false).")
    return True


def _message(turn: dict[str, Any], role: str, text_key: str, number: int) -> dict[str, Any]:
    content, reasoning = turn.get(text_key), turn.get("reasoning_content", turn.get("reasoning"))
    called = turn.get("tool_calls") or turn.get("function_call")
    calls = _calls(called) if called else []
    parts = [{"type": "tool_call", "text": "", "train": True} for _ in calls]
    if isinstance(content, list):
        texts = {"text": "", "reasoning": ""}
        for part in content:
            part = _renamed(part, None) if isinstance(part, dict) else {"type": "text", "text": part}
            kind, value = part.get("type"), part.get("text", part.get("value"))
            trained = _trained(part, f"a part of message {number}")
            if kind == "tool_call":
                made = _calls(value if value is not None else part.get("tool_call"))
                calls += made
                parts += [{"type": kind, "text": "", "train": trained} for _ in made]
            elif kind == "text" and isinstance(value, str) and value.strip() and calls:
                raise RowError("bad part", f"message {number} has text after a tool call: {snippet(value)}")
            elif kind in texts and isinstance(value, str):
                texts[kind] += value
                parts.append({"type": kind, "text": value, "train": trained})
            else:
                raise RowError("bad part", f"message {number} has a part of type {kind!r} without text.")
        content, reasoning = texts["text"], texts["reasoning"] or reasoning
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RowError("missing field", f"message {number} ({role}) has no text in {text_key!r}.")
    if reasoning is not None and not isinstance(reasoning, str):
        raise RowError(
            "wrong type", f"message {number}: reasoning_content is of type {type(reasoning).__name__}, not text."
        )
    if not content.strip() and not calls and role != "tool":
        raise RowError("empty field", f"message {number} ({role}) is empty.")
    message: dict[str, Any] = {"role": role, "content": content}
    if calls:
        if role != "assistant":
            raise RowError("bad tool call", f"message {number} ({role}) has a tool call; only assistants call tools.")
        message["tool_calls"] = calls
    if reasoning and role == "assistant":
        message["reasoning_content"] = reasoning
    if role == "assistant" and not all(part["train"] for part in parts):
        if any(part["train"] for part in parts):
            message["parts"] = parts
        else:
            message["train"] = False
    return message


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as the template takes them, their arguments as objects, as servers hand them to it."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RowError("bad tool call", f"a tool call is not JSON ({error}): {snippet(value)}") from error
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("bad tool call", f"a tool call has no name: {snippet(repr(call))}")
        arguments = function.get("arguments", {})
        try:
            arguments = json.loads(arguments.strip() or "{}") if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError) as error:
            raise RowError(
                "bad tool call", f"the arguments of {function['name']!r} are not JSON: {snippet(arguments)}"
            ) from error
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise RowError("bad tool call", f"the arguments of {function['name']!r} are not an object.")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _check_order(messages: list[dict[str, Any]]) -> None:
    before: str | None = None
    for number, message in enumerate(messages):
        role = message["role"]
        if before not in ORDER[role]:
            where = f"follows {before}" if before else "comes first"
            raise RowError("wrong order", f"message {number} ({role}) {where}: {snippet(message['content'])}")
        before = role
