"""JSON in which no key stands twice: of two values one would be lost without a word."""

import json
from typing import Any

from qwen_lit.data.faults import RowError


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("key twice", f"has the key {twice!r} twice in one object; keep one of the two.")
    return found


decoder = json.JSONDecoder(object_pairs_hook=_once)
decode = decoder.decode
"""A text to what it holds; raises ``RowError`` for a key that stands twice, ``ValueError`` for what is not JSON."""


def parsed(text: str, kind: str, what: str, shown: str) -> Any:
    """What a field that is JSON as text holds.

    Args:
        text: JSON.
        kind: of the fault.
        what: names the field in the fault, as in ``a tool call is``.
        shown: the start of the text, as a fault shows it.

    Raises:
        RowError: it is not JSON, or has a key twice.
    """
    try:
        return decode(text)
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        raise RowError(kind, f"{what} not JSON ({error}): {shown}") from error
