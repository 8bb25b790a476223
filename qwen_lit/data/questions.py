"""Rows that ask and may lack an answer: read as those with one, in whose place a stand-in is put."""

from collections.abc import Mapping
from typing import Any

from qwen_lit.data.columns import Seen
from qwen_lit.data.layouts import LISTS, PAIRS, Layout, read_layout
from qwen_lit.data.messages import EXCHANGES, ROLE_KEYS, ROLES, TEXT_KEYS, THOUGHTS

NO_ANSWER = "-"
"""Stands where a question has no answer, and is left out of the prompt as an answer is."""


def read_question(row: dict[str, Any], fields: Mapping[str, str] | None, seen: Seen) -> Layout:
    """The layout and the conversation of a row that may lack the answer to its last question; see ``read_layout``.

    Raises:
        RowError: no layout fits the row, or several do.
    """
    row = {**row, **_unanswered_turn(row)}
    if not any(key in row for key in LISTS) and not (isinstance(row.get("prompt"), dict)):
        # A system prompt or a passage asks nothing, so the first column that asks decides.
        ask = next((key for key in PAIRS if key in row), None)
        if ask is not None and not any(_said_in(row, answer) for answer in PAIRS[ask]):
            row = {key: value for key, value in row.items() if key not in PAIRS[ask]} | {PAIRS[ask][0]: NO_ANSWER}
    return read_layout(row, fields, seen)


def _said_in(row: dict[str, Any], column: str) -> bool:
    value = row.get(column)
    return bool(value.strip() if isinstance(value, str) else value)


def _unanswered_turn(row: dict[str, Any]) -> dict[str, Any]:
    """The list of turns without an empty answer at its end, or with an answer to an exchange that is a question."""
    for key in LISTS:
        turns = row.get(key)
        if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
            continue
        last = turns[-1]
        role = next((last[name] for name in ROLE_KEYS if name in last), None)
        if role is not None:
            empty = not any(last.get(name) for name in (*TEXT_KEYS, *THOUGHTS, "tool_calls", "function_call"))
            if empty and isinstance(role, str) and ROLES.get(role.lower()) == "assistant":
                return {key: turns[:-1]}
        else:
            for ask, answer in EXCHANGES:
                if ask in last and not last.get(answer):
                    return {key: [*turns[:-1], {**last, answer: NO_ANSWER}]}
    return {}
