"""Text in a message never becomes a control token."""

import re
from typing import Any

from qwen_lit.data.faults import RowError, snippet
from qwen_lit.data.records import Conversation

ENDS = ("<|endoftext|>", "<|im_end|>")
CONTROL = re.compile(r"<\|[^<>|]{1,40}\|>")


def _refused(text: str, token: str) -> str:
    """Why a text with a control token is not taken; escaped at its end, the token would be taught as text."""
    where = f"has {token} inside a message: {snippet(text[max(0, text.index(token) - 20) :])}"
    if token in ENDS and text.rstrip().endswith(token) and text.count(token) == 1:
        return f"{where}; remove it: the chat template ends each turn by itself."
    return f"{where}; fix it, or set data.control_tokens: escape."


def guard(conversation: Conversation, control: frozenset[str], policy: str) -> bool:
    """Keep text from becoming a control token: refuse it, or part it with a zero-width space, in place.

    Args:
        conversation: its messages and tools are searched, names of fields included.
        control: the tokenizer's control tokens, such as ``<|im_start|>``.
        policy: ``error`` or ``escape``.

    Returns:
        Whether anything was escaped.

    Raises:
        RowError: a control token stands in a message and ``policy`` is ``error``.
    """
    changed = False

    def walk(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, str):
            if "<|" not in value:
                return value
            if policy == "error":
                for token in set(CONTROL.findall(value)) & control:
                    raise RowError("control token", _refused(value, token))
            value, found = escaped(value, control)
            changed = changed or found
            return value
        if isinstance(value, list):
            return [walk(item) for item in value]
        return {walk(key): walk(item) for key, item in value.items()} if isinstance(value, dict) else value

    conversation.messages = walk(conversation.messages)
    conversation.tools = walk(conversation.tools)
    return changed


def control_names(tokenizer: Any) -> frozenset[str]:
    """The tokenizer's control tokens, such as ``<|im_start|>``."""
    added = tokenizer.added_tokens_encoder
    return frozenset(token for token in added if token.startswith("<|") and token.endswith("|>"))


def escaped(text: str, control: frozenset[str]) -> tuple[str, bool]:
    """The text with each control token parted by a zero-width space, and whether there was one."""
    found = set(CONTROL.findall(text)) & control
    for token in found:
        text = text.replace(token, "<\u200b" + token[1:])
    return text, bool(found)
