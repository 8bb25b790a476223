"""A list of messages, in whatever words its file has, to messages as the chat template takes them."""

from collections.abc import Mapping
from typing import Any

from qwen_lit.data import marks
from qwen_lit.data.calls import null_arguments, read_calls, read_function_call, results
from qwen_lit.data.columns import Seen, refuse, renamed
from qwen_lit.data.content import read_content
from qwen_lit.data.faults import RowError, snippet
from qwen_lit.data.marks import Message
from qwen_lit.data.strict import parsed

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
}
CALLING = ("function_call", "tool_call")
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value", "text")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think")
TOOLS = ("tools", "functions")
EXCHANGES = (
    ("human", "assistant"),
    ("user", "assistant"),
    ("human", "gpt"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("instruction", "output"),
    ("prompt", "response"),
)
"""Keys of an object that is a question with its answer."""
TAGS_REMOVED = "<tool_response> tags around tool results left to the chat template"
EMPTY_SYSTEM = "empty system prompt left out"
UNCLOSED = "a thought that is never closed"
NULLS = "null among the arguments of a tool call"


def read_messages(turns: Any, fields: Mapping[str, str] | None, seen: Seen) -> list[Message]:
    """Messages of a list of objects with a role and a text, each with ``train``.

    Args:
        turns: the list, or the same as JSON text.
        fields: our name of a key to the file's.
        seen: collects what is reported of the row beside its conversation.

    Raises:
        RowError: a message cannot be used.
    """
    if isinstance(turns, str):
        turns = parsed(turns, "wrong type", "the messages are text,", snippet(turns))
    if not isinstance(turns, list) or not turns:
        raise RowError("empty conversation", "has no messages.")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise RowError("wrong type", f"message {number} is a {type(turn).__name__}, not an object.")
        turn = renamed(turn, fields, seen, "messages.")
        messages += _turn(turn, number, seen)
    return messages


def read_exchanges(turns: list[Any], fields: Mapping[str, str] | None, seen: Seen) -> list[Message]:
    """Messages of a list of texts in turns, or of objects that are each a question with its answer.

    Raises:
        RowError: an element is neither.
    """
    made: list[Message] = []
    for number, turn in enumerate(turns):
        if isinstance(turn, str):
            made.append({"role": "assistant" if number % 2 else "user", "content": turn})
            continue
        pair = exchange(turn)
        if pair is None:
            raise RowError("wrong type", f"exchange {number} is no question with its answer: {snippet(repr(turn))}")
        if number == 0 and turn.get("system"):
            made.append({"role": "system", "content": turn["system"]})
        refuse(turn, f"exchange {number}")
        for key, value in turn.items():
            if key not in pair and value not in (None, "") and (number or key != "system"):
                marks.refuse_unsure(key, f"exchange {number}")
                seen.unread.add(f"exchange.{key}")
        made += [{"role": "user", "content": turn[pair[0]]}, {"role": "assistant", "content": turn[pair[1]]}]
    return read_messages(made, None, seen)


def exchange(turn: Any) -> tuple[str, str] | None:
    """The keys of an object that is a question with its answer."""
    return next((pair for pair in EXCHANGES if isinstance(turn, dict) and turn.keys() >= set(pair)), None)


def _turn(turn: Message, number: int, seen: Seen) -> list[Message]:
    """One message; none for an empty system prompt, several for several results in one."""
    role_key = "from" if "from" in turn and "role" not in turn else "role"
    text_key = _text_key(turn, role_key)
    given = turn.get(role_key)
    name = given.lower() if isinstance(given, str) else None
    if given is None:
        names = speaking(turn)
        hint = ", ".join(f"{ours}: {theirs}" for ours, theirs in names.items()) if names else ""
        write = f"write data.fields: {{{hint}}}" if hint else "data.fields maps other names"
        raise RowError("unknown role", f"message {number} has no role; it has {sorted(map(str, turn))} ({write}).")
    if name not in ROLES:
        raise RowError("unknown role", f"message {number} has the role {given!r}; known are {', '.join(ROLES)}.")
    role, content = ROLES[name], turn.get(text_key)
    message: Message = {"role": role, "content": content}
    thought: Any = None
    calls: list[Message] = []
    if name in CALLING:
        message |= read_function_call(content, seen.unread)
        content, calls = message["content"], message.pop("tool_calls")
        thought = message.pop("reasoning_content", None)
    flag = True
    if len(turn) > 2 or text_key not in turn:
        thought, calls, flag = _extras(turn, {role_key, text_key}, role, number, thought, calls, seen)
    parts: list[Message] = [{"type": "tool_call", "text": "", "train": True} for _ in calls] if calls else []
    if type(content) is not str:
        content, thought, parts, calls = read_content(content, thought, parts, calls, role, text_key, number, seen)
    if thought is not None and not isinstance(thought, str):
        raise RowError(
            "wrong type", f"message {number}: reasoning_content is of type {type(thought).__name__}, not text."
        )
    if not content.strip() and not calls and role != "tool":
        if role == "system":
            seen.notes[EMPTY_SYSTEM] = None
            return []
        raise RowError("empty field", f"message {number} ({role}) is empty.")
    message["content"] = content
    if role == "tool" and "<tool_response>" in content and (found := results(content)):
        seen.notes[TAGS_REMOVED] = None
        return [{"role": role, "content": one, "train": flag} for one in found]
    if calls:
        if role != "assistant":
            raise RowError("bad tool call", f"message {number} ({role}) has a tool call; only assistants call tools.")
        if null_arguments(calls):
            seen.notes[NULLS] = None
        message["tool_calls"] = calls
    if role == "assistant":
        message["content"] = _one_thought(content, thought, number, seen) if "<think>" in content else content
        if thought:
            message["reasoning_content"] = thought
        if details := next((turn[key] for key in marks.DETAILS if key in turn), None):
            parts = marks.detailed(message["content"], details, f"message {number}") + parts
        flag = _marked(message, parts, flag)
    message["train"] = flag
    return [message]


def speaking(turn: Message) -> dict[str, str] | None:
    """Our names to those of a message's role and text, where the names are others and there is no doubt."""
    roles = [key for key, value in turn.items() if isinstance(value, str) and value.lower() in ROLES]
    texts = [key for key, value in turn.items() if isinstance(value, str) and key not in roles]
    if len(roles) != 1 or len(texts) != 1:
        return None
    given = {"role": (roles[0], ROLE_KEYS), "content": (texts[0], TEXT_KEYS)}
    return {ours: theirs for ours, (theirs, known) in given.items() if theirs not in known}


def _text_key(turn: Message, role_key: str) -> str:
    for key in TEXT_KEYS:
        if key in turn:
            return key
    return "content" if role_key == "role" else "value"


def _marked(message: Message, parts: list[Message], flag: bool) -> bool:
    """Whether any of a message is trained; one of which some is not keeps its parts."""
    if all(part["train"] for part in parts):
        return flag
    if not any(part["train"] for part in parts):
        return False
    message["parts"] = parts
    return flag


def _extras(
    turn: Message, used: set[str], role: str, number: int, thought: Any, calls: list[Message], seen: Seen
) -> tuple[Any, list[Message], bool]:
    """What the further keys of a message say: its thought, its calls, and whether it is trained.

    Raises:
        RowError: they contradict each other, or their meaning is not certain.
    """
    what = f"message {number}"
    flag = marks.trained(turn, what)
    refuse(turn, what)
    for key, value in turn.items():
        if key in used or key in marks.NAMES or value in ("", [], {}):
            continue
        if key in THOUGHTS and role == "assistant":
            if thought not in (None, value):
                raise RowError("two thoughts", f"{what} has two thoughts that differ ({key!r} holds one of them).")
            thought = value
        elif key in ("tool_calls", "function_call"):
            if calls:
                raise RowError("bad tool call", f"{what} has tool calls in two places ({key!r} is one of them).")
            calls = read_calls(value, seen.unread)
        elif key in TOOLS and number == 0:
            seen.tools = value
        elif key in TOOLS:
            raise RowError("bad tools", f"{what} brings tools; they stand beside the messages, or in the first one.")
        else:
            marks.refuse_unsure(key, what)
            seen.unread.add(f"messages.{key}")
    return thought, calls, flag


def _one_thought(content: str, thought: Any, number: int, seen: Seen) -> str:
    """The content without a thought that a field has too.

    Raises:
        RowError: the two differ.
    """
    start = content.lstrip()
    if not start.startswith("<think>"):
        return content
    inner, closed, rest = start.removeprefix("<think>").partition("</think>")
    if not closed:
        seen.notes[UNCLOSED] = None
        return content
    if not thought:
        return content
    if inner.strip() not in ("", thought.strip()):
        raise RowError(
            "two thoughts", f"message {number} has a thought in its text and another in a field of its own."
        )
    return rest.lstrip("\n")
