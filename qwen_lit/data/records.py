"""Files to conversations: every format told apart by itself, every fault named by path and line."""

import glob
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """The data cannot be used as it is; the message says what to mend."""


class RowError(DataError):
    """One row cannot be used."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Fault:
    """A row that is not trained, and why."""

    source: str
    """``path:line``."""
    kind: str
    message: str


@dataclass
class Conversation:
    """One row, as the chat template takes it."""

    messages: list[dict[str, Any]]
    train: list[bool]
    """One per message; only assistant messages can be True."""
    tools: list[dict[str, Any]] | None
    source: str
    format: str


ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip


def expand_paths(dataset_path: str | list[str]) -> list[Path]:
    """Files named by a path, a glob or a list of them, in order.

    Raises:
        DataError: a name matches no file.
    """
    found: list[Path] = []
    for name in [dataset_path] if isinstance(dataset_path, str) else dataset_path:
        matches = [Path(match) for match in sorted(glob.glob(str(Path(name).expanduser())))]
        if Path(name).expanduser().is_file():
            matches = [Path(name).expanduser()]
        files = [path for path in matches if path.is_file()]
        if not files:
            raise DataError(f"no such dataset: {name}; give the path of a JSONL file.")
        found += files
    return found


def read_file(path: Path) -> Iterator[Conversation | Fault]:
    """Conversations and faults of one JSONL file (also ``.gz``) or JSON array, in the file's order.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    lines: list[tuple[str, bytes]] = []
    if raw.lstrip()[:1] == b"[":
        try:
            lines = [(f"{path}:{n}", json.dumps(row).encode()) for n, row in enumerate(json.loads(raw), 1)]
        except ValueError as error:
            raise DataError(f"{path}: is not a JSON array ({error}).") from error
    else:
        lines = [(f"{path}:{n}", line) for n, line in enumerate(raw.split(b"\n"), 1)]
    for source, line in lines:
        if line.strip():
            try:
                yield parse_row(_parse_line(line.rstrip(b"\r")), source)
            except RowError as error:
                yield Fault(source, error.kind, str(error))


def _parse_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", f"is not UTF-8 at byte {error.start}; save the file as UTF-8.") from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError("bad JSON", f"is not JSON ({error}): {text[:60]!r}") from error


def parse_row(row: Any, source: str) -> Conversation:
    """Tell the row's format and turn it into a conversation.

    Raises:
        RowError: a field is missing or empty, a role unknown, or there is no assistant turn.
    """
    if not isinstance(row, dict):
        raise RowError("not an object", f"is a JSON {type(row).__name__}, not an object with fields.")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise RowError("bad tools", f"tools is not JSON ({error}).") from error
    if "messages" in row:
        name, messages = "messages", _messages(row["messages"], "role", "content")
    elif "conversations" in row:
        name, messages = "sharegpt", _messages(row["conversations"], "from", "value")
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": _text(row, "system")})
    elif "prompt" in row:
        name = "prompt"
        messages = [
            {"role": "user", "content": _text(row, "prompt")},
            {"role": "assistant", "content": _text(row, "completion")},
        ]
    else:
        name, messages = "alpaca", _alpaca(row)
    weights = [message.pop("train", True) for message in messages]
    train = [
        bool(weight) and message["role"] == "assistant" for message, weight in zip(messages, weights, strict=True)
    ]
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn", "has no assistant turn, so nothing could be trained.")
    return Conversation(messages, train, tools or None, source, name)


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        raise RowError("missing field", f"misses {field!r}; it has {sorted(row)}.")
    if not isinstance(value, str):
        raise RowError("wrong type", f"{field!r} is a {type(value).__name__}, not text.")
    if not value.strip():
        raise RowError("empty field", f"{field!r} is empty.")
    return value


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row, "system")})
    for turn in row.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise RowError("bad history", "history must be a list of [question, answer] pairs.")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = _text(row, "instruction")
    if row.get("input"):
        question += "\n" + _text(row, "input")
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]
    return messages


def _messages(turns: Any, role_key: str, text_key: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        raise RowError("empty conversation", "has no messages.")
    messages = []
    for number, turn in enumerate(turns):
        role = turn.get(role_key) if isinstance(turn, dict) else None
        if role not in ROLES:
            raise RowError("unknown role", f"message {number} has the role {role!r}; known are {sorted(ROLES)}.")
        message = _message(turn, ROLES[role], text_key, number)
        if role == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": _calls(message["content"])}
        if message["role"] == "system" and number:
            raise RowError("wrong order", f"message {number} is a system message; it must be the first.")
        message["train"] = turn.get("train", True) and turn.get("weight", turn.get("loss_weight", 1)) != 0
        messages.append(message)
    return messages


def _message(turn: dict[str, Any], role: str, text_key: str, number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role}
    content = turn.get(text_key)
    calls = list(turn.get("tool_calls") or [])
    reasoning = turn.get("reasoning_content")
    if isinstance(content, list):
        parts = {"text": "", "reasoning": ""}
        for part in content:
            kind, value = part.get("type"), part.get("text", part.get("value"))
            if kind == "tool_call":
                calls += _calls(value if value is not None else part.get("tool_call"))
            elif kind in parts and isinstance(value, str):
                parts[kind] += value
            else:
                raise RowError("bad part", f"message {number} has a part of type {kind!r}.")
        content, reasoning = parts["text"], parts["reasoning"] or reasoning
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RowError("missing field", f"message {number} ({role}) has no text in {text_key!r}.")
    if not content.strip() and not calls and role == "assistant":
        raise RowError("empty field", f"message {number} ({role}) is empty.")
    message["content"] = content
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def _calls(value: Any) -> list[dict[str, Any]]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError("bad tool call", f"a tool call is not JSON ({error}).") from error
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not (call.get("name") or call.get("function")):
            raise RowError("bad tool call", "a tool call has no name.")
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]
