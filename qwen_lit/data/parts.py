"""Where the untrained parts of an assistant's message stand in the rendered text."""

from typing import Any

from qwen_lit.data.faults import RowError

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"
OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"


def untrained(turn: str, message: dict[str, Any]) -> list[tuple[int, int]]:
    """Ranges ``[begin, end)`` of characters that are not trained.

    Args:
        turn: what the template renders between the header and ``<|im_end|>``.
        message: with ``parts``, each of a type (``reasoning``, ``text``, ``tool_call``), a text, and whether it is
            trained; in their order within a type.

    Raises:
        RowError: the template renders the message so that its parts cannot be told.
    """
    of = {kind: [part for part in message["parts"] if part["type"] == kind] for kind in ("reasoning", "text")}
    calls = [part for part in message["parts"] if part["type"] == "tool_call"]
    found, end = [], len(turn)
    if calls:
        starts = [at for at in range(len(turn)) if turn.startswith(OPEN_CALL, at)]
        stops = [at + len(CLOSE_CALL) for at in range(len(turn)) if turn.startswith(CLOSE_CALL, at)]
        if len(starts) != len(calls) or len(stops) != len(calls):
            raise _unclear("tool call")
        found += [(a, b) for a, b, part in zip(starts, stops, calls, strict=True) if not part["train"]]
        end = starts[0]
    begin = 0
    if OPEN_THINK in turn and CLOSE_THINK in turn:
        begin = turn.index(CLOSE_THINK) + len(CLOSE_THINK)
        thought = turn.index(OPEN_THINK) + len(OPEN_THINK)
        found += _within(turn, thought, begin - len(CLOSE_THINK), of["reasoning"])
    found += _within(turn, begin, end, of["text"])
    return sorted(found)


def _within(turn: str, begin: int, end: int, parts: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Ranges of the untrained of ``parts``, which end to end are ``turn[begin:end]``, but for space around them."""
    whole = "".join(part["text"] for part in parts)
    if all(part["train"] for part in parts):
        return []
    region = turn[begin:end]
    if region.strip() != whole.strip():
        raise _unclear(parts[0]["type"])
    at = begin + len(region) - len(region.lstrip()) - (len(whole) - len(whole.lstrip()))
    found = []
    for part in parts:
        text, stop = part["text"], at + len(part["text"])
        if not part["train"] and text.strip():
            # Space around it is left to its neighbours: words are tokens with the space before them.
            found.append((at + len(text) - len(text.lstrip()), stop - (len(text) - len(text.rstrip()))))
        at = stop
    return found


def _unclear(kind: str) -> RowError:
    return RowError("template", f"the chat template changes a {kind} part, so what is not trained cannot be told.")
