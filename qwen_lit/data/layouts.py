"""The layouts of rows that are known by their columns, and what to write for others."""

import difflib
from collections.abc import Mapping
from typing import Any

from qwen_lit.data.calls import read_calls
from qwen_lit.data.columns import Seen
from qwen_lit.data.faults import DataError, RowError, snippet
from qwen_lit.data.marks import Message
from qwen_lit.data.messages import ROLE_KEYS, TEXT_KEYS, THOUGHTS, exchange, read_exchanges, read_messages, speaking
from qwen_lit.data.strict import parsed

LISTS = {
    "messages": "messages",
    "conversations": "sharegpt",
    "conversation": "conversation",
    "dialogue": "dialogue",
    "dialog": "dialog",
    "data": "data",
}
"""Columns that hold a whole conversation, and what their layout is called."""
PAIRS = {
    "instruction": ("output", "response", "completion", "answer"),
    "prompt": ("completion", "response", "output", "answer"),
    "question": ("answer", "response", "output"),
    "query": ("response", "answer", "output"),
    "problem": ("solution", "answer"),
    "input": ("output", "target", "response", "answer"),
}
"""Columns of a question, and those that may hold its answer."""
NAMED = {("instruction", "output"): "alpaca", ("prompt", "completion"): "prompt"}
PLAIN = {"instruction", "input", "output"}
"""The commonest layout, which needs no search."""
SYSTEMS = ("system", "system_prompt", "system_message")
PASSAGES = ("input", "context")
"""Columns whose text belongs to the question, after it."""
THOUGHT_COLUMNS = (*THOUGHTS, "cot", "chain_of_thought", "complex_cot")
ALWAYS = {*SYSTEMS, "tools", "functions"}
FIELDS = frozenset(
    {
        *LISTS,
        *PAIRS,
        *(one for answers in PAIRS.values() for one in answers),
        *PASSAGES,
        *THOUGHT_COLUMNS,
        *ALWAYS,
        *ROLE_KEYS,
        *TEXT_KEYS,
        "history",
        "answers",
        "tool_calls",
        "train",
        "weight",
        "loss_weight",
    }
)
"""Names that ``data.fields`` can map others to."""
QUESTION_WORDS = ("question", "query", "instruction", "prompt", "problem", "input", "user", "human", "ask", "source")
ANSWER_WORDS = ("answer", "response", "output", "completion", "solution", "reply", "target", "assistant", "result")
Layout = tuple[str, list[Message], set[str]]


def read_layout(row: dict[str, Any], fields: Mapping[str, str] | None, seen: Seen) -> Layout:
    """Tell a row's layout and read its conversation.

    Returns:
        The layout's name, the messages, each with ``train``, and the columns that were read.

    Raises:
        RowError: no layout fits, more than one does, or what it holds cannot be used.
    """
    if "output" in row and "instruction" in row and row.keys() <= PLAIN:
        return _single(row, "instruction", "output", fields, seen)
    lists = [key for key in LISTS if key in row and (key != "data" or isinstance(row[key], list))]
    if lists:
        return _conversation(row, lists, fields, seen)
    if isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
        return "tree", _tree(row["prompt"], seen), {"prompt", *ALWAYS}
    asked = next((key for key in ("query", "question") if key in row), None)
    if asked and "answers" in row and "tools" in row:
        calls = read_calls(row["answers"], seen.unread)
        messages = [_said("user", _text(row, asked)), _said("assistant", "") | {"tool_calls": calls}]
        return f"{asked}/answers", messages, {asked, "answers", *ALWAYS}
    pairs = [(ask, answer) for ask, answers in PAIRS.items() if ask in row for answer in answers if answer in row]
    if len(pairs) > 1:
        pairs = _readings(row, pairs, fields)
    if not pairs:
        raise _unknown(row)
    return _single(row, *pairs[0], fields, seen)


def check_fields(fields: Mapping[str, str]) -> None:
    """Each key of ``data.fields``, or of a source's columns, is read somewhere, and each column given once.

    Raises:
        DataError: naming the key or the column.
    """
    for ours in fields:
        if ours not in FIELDS:
            near = difflib.get_close_matches(ours, FIELDS, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise DataError(f"nothing reads {ours!r}{hint}; known names are {', '.join(sorted(FIELDS))}.")
    columns = list(fields.values())
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"the column {twice!r} is given for two names; give it for one.")


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content, "train": True}


def _text(row: dict[str, Any], field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise RowError("wrong type", f"{field!r} is of type {type(value).__name__}, not text: {snippet(repr(value))}")
    if not value.strip():
        raise RowError("empty field", f"{field!r} is empty.")
    return value


def _conversation(row: dict[str, Any], keys: list[str], fields: Mapping[str, str] | None, seen: Seen) -> Layout:
    """A conversation that is one column; another column with one must say the same."""
    filled = [key for key in keys if row[key] not in ([], "")] or keys[:1]
    several = [_turns(row[key], key, fields, seen) for key in filled]
    messages = several[0]
    for key, other in zip(filled, several, strict=True):
        if other != messages:
            raise RowError("two conversations", f"has two conversations that differ: {filled[0]!r} and {key!r}.")
    for ask, answer in NAMED:
        pair = (row.get(ask), row.get(answer))
        if all(isinstance(one, str) and one.strip() for one in pair):
            contents = [message["content"].strip() for message in messages]
            if not all(str(one).strip() in contents for one in pair):
                raise RowError(
                    "two conversations",
                    f"has two conversations that differ: {filled[0]!r}, and {ask!r} with {answer!r}.",
                )
    return LISTS[filled[0]], messages, {*keys, *ALWAYS}


def _turns(turns: Any, key: str, fields: Mapping[str, str] | None, seen: Seen) -> list[Message]:
    if isinstance(turns, str):
        turns = parsed(turns, "wrong type", "the messages are text,", snippet(turns))
    first = turns[0] if isinstance(turns, list) and turns else None
    spoken = isinstance(first, str) and key != "messages"
    paired = isinstance(first, dict) and "role" not in (fields or ()) and not first.keys() & set(ROLE_KEYS)
    if spoken or (paired and exchange(first)):
        return read_exchanges(turns, fields, seen)
    return read_messages(turns, fields, seen)


def _readings(
    row: dict[str, Any], pairs: list[tuple[str, str]], fields: Mapping[str, str] | None
) -> list[tuple[str, str]]:
    """The pair of question and answer of a row with several such columns, where the others merely repeat it.

    Raises:
        RowError: there are two readings of the row.
    """
    mapped = [(ask, answer) for ask, answer in pairs if fields and ask in fields and answer in fields]
    if len(mapped) == 1:
        return mapped
    if any(ask != "input" for ask, _ in pairs):
        pairs = [pair for pair in pairs if pair[0] != "input"]
        if len(pairs) == 1:
            return pairs
    asks, answers = {ask for ask, _ in pairs}, {answer for _, answer in pairs}
    # A column that holds another question within it renders that question; a problem's answer ends its solution.
    asks = {one for one in asks if not any(_holds(row, one, other) for other in asks - {one})} or asks
    if {"solution", "answer"} <= answers and _holds(row, "solution", "answer"):
        answers.discard("answer")
    left = [(ask, answer) for ask, answer in pairs if ask in asks and answer in answers]
    if len({(str(row[ask]), str(row[answer])) for ask, answer in left}) == 1:
        return left[:1]
    lines = " or ".join(f"data.fields: {{instruction: {ask}, output: {answer}}}" for ask, answer in left)
    raise RowError("unclear layout", f"can be read in {len(left)} ways; say which: {lines}.")


def _holds(row: dict[str, Any], whole: str, part: str) -> bool:
    a, b = row[whole], row[part]
    return isinstance(a, str) and isinstance(b, str) and len(b.strip()) < len(a) and b.strip() in a


def _single(row: dict[str, Any], ask: str, answer: str, fields: Mapping[str, str] | None, seen: Seen) -> Layout:
    """A question with its answer, after a history."""
    name, used = NAMED.get((ask, answer), f"{ask}/{answer}"), {ask, answer, "history", *ALWAYS}
    if ask == "prompt" and isinstance(row[ask], list):
        return name, _after_messages(row, ask, answer, fields, seen), used - {"history"}
    messages = _history(row["history"]) if "history" in row else []
    question = _text(row, ask)
    if ask not in ("prompt", "input"):
        for passage in PASSAGES:
            if passage not in row:
                continue
            value = row[passage]
            if passage == "context" and (not isinstance(value, str) or "input" in used):
                continue
            if not isinstance(value, str) or value.strip():
                question += "\n" + _text(row, passage)
            used.add(passage)
    messages.append(_said("user", question))
    thoughts = [key for key in row if key in THOUGHT_COLUMNS and isinstance(row[key], str) and row[key].strip()]
    said = _text(row, answer)
    if answer == "solution" and _holds(row, "solution", "answer"):
        used.add("answer")
    if not thoughts and "<think>" not in said:
        return name, [*messages, _said("assistant", said)], used
    turn = {"role": "assistant", "content": said} | {key: row[key] for key in thoughts if key in THOUGHTS}
    for key in thoughts:
        if key not in THOUGHTS and turn.setdefault("reasoning_content", row[key]) != row[key]:
            raise RowError("two thoughts", f"has two thoughts that differ ({', '.join(sorted(thoughts))}).")
    return name, messages + read_messages([turn], None, seen), used | set(thoughts)


def _after_messages(
    row: dict[str, Any], ask: str, answer: str, fields: Mapping[str, str] | None, seen: Seen
) -> list[Message]:
    """Messages that are a prompt, of which none is trained, and the answer to them."""
    said = row[answer]
    if isinstance(said, dict | list):
        answers = read_messages(said if isinstance(said, list) else [said], fields, seen)
    else:
        answers = read_messages([{"role": "assistant", "content": _text(row, answer)}], None, seen)
    return [{**one, "train": False} for one in read_messages(row[ask], fields, seen)] + answers


def _history(history: Any) -> list[Message]:
    if not isinstance(history, list):
        raise RowError("bad history", "history must be a list of [question, answer] pairs.")
    messages: list[Message] = []
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) and t.strip() for t in turn)):
            raise RowError("bad history", f"history must be a list of [question, answer] pairs: {snippet(repr(turn))}")
        messages += [_said("user", turn[0]), _said("assistant", turn[1])]
    return messages


def _tree(node: Any, seen: Seen) -> list[Message]:
    """The messages of a tree in which each has one reply at most.

    Raises:
        RowError: one has several replies, so which is meant is not certain.
    """
    turns = []
    while isinstance(node, dict):
        turns.append({"role": node.get("role"), "content": node.get("text")})
        replies = node.get("replies") or []
        if len(replies) > 1:
            raise RowError(
                "unclear layout",
                f"is a tree: message {len(turns) - 1} has {len(replies)} replies; write each path "
                "that is to be trained as a row of messages.",
            )
        node = replies[0] if replies else None
    return read_messages(turns, None, seen)


def _unknown(row: dict[str, Any]) -> RowError:
    """Why no layout fits a row, with what to write where it can be told."""
    have = f"it has {sorted(map(str, row))}"
    texts = [key for key, value in row.items() if isinstance(value, str) and value.strip()]
    asked = next((key for key in PAIRS if key in row and key != "input"), None)
    missing = PAIRS[asked][0] if asked else "prompt" if "completion" in row else "instruction"
    if "chat" in row:
        return RowError("unclear layout", "has a whole conversation in 'chat'; write it as a list of messages.")
    beside = sorted(key for key in FIELDS & row.keys() - {"text"} if row[key] not in ("", [], {}))
    if "text" in texts and beside:
        return RowError(
            "unclear layout",
            f"has a text ('text') beside {', '.join(map(repr, beside))}; a row is a text alone, "
            'or a question with its answer, such as {"instruction": …, "output": …}.',
        )
    if line := _mapping(row, texts, asked):
        return RowError("missing field", f"misses {missing!r}; {have}; write data.fields: {line}.")
    if len(texts) == 1 and texts[0] in ("content", "document", "story", "body"):
        return RowError(
            "raw text",
            f"holds a text in {texts[0]!r}; to train it as it stands, write data.fields: {{text: {texts[0]}}}.",
        )
    return RowError("missing field", f"misses {missing!r}; {have} (data.fields maps other names).")


def _mapping(row: dict[str, Any], texts: list[str], asked: str | None) -> str:
    """The value of ``data.fields`` that reads the row, where its columns leave no doubt."""
    for key, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        names = speaking(first) if isinstance(first, dict) else None
        if names is not None:
            return "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in {"messages": key, **names}.items()) + "}"
    asks = [asked] if asked else [key for key in texts if _like(key, QUESTION_WORDS)]
    answers = [key for key in texts if key not in asks and _like(key, ANSWER_WORDS)]
    if len(asks) == 1 and len(answers) == 1:
        return f"{{instruction: {asks[0]}, output: {answers[0]}}}"
    return ""


def _like(key: str, words: tuple[str, ...]) -> bool:
    return any(word in key.lower() for word in words)
