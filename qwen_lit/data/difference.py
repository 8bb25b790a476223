"""Where one row's token ids part from the tokenizer's own, in ids and in text."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwen_lit.data.faults import snippet

AROUND = 6
"""Tokens shown on either side of those that differ."""
MOST = 16
"""Tokens shown of those that differ."""

Decode = Callable[[list[int]], str]


def parting(found: Sequence[int], own: Sequence[int], decode: Decode, owner: str = "apply_chat_template") -> list[str]:
    """Lines that show where two lists of token ids part and meet again.

    Args:
        found: ids of the row as it would be trained.
        own: ids of the same row by the tokenizer alone.
        decode: ids to text, special tokens and all.
        owner: of the tokenizer's own ids, by name.
    """
    least = min(len(found), len(own))
    begin = next((at for at in range(least) if found[at] != own[at]), least)
    alike = next((n for n in range(least - begin) if found[-1 - n] != own[-1 - n]), least - begin)
    first = max(0, begin - AROUND)
    lines = [f"the ids part at token {begin} (of {len(found)} prepared, {len(own)} of {owner})"]
    lines += [f"  both, from {first}: {_shown(own[first:begin], decode)}"] if begin else []
    lines.append(f"  prepared, from {begin}: {_shown(found[begin : len(found) - alike], decode)}")
    lines.append(f"  {owner}, from {begin}: {_shown(own[begin : len(own) - alike], decode)}")
    after = own[len(own) - alike :][:AROUND]
    return [*lines, f"  both, after it: {_shown(after, decode)}" if after else "  and both end"]


def difference(found: dict[str, Any], own: dict[str, Any], decode: Decode) -> list[str]:
    """Lines that show what differs between two forms of one row.

    Args:
        found: the row as it would be trained, by the names of ``rows.SCHEMA``.
        own: the row by ``apply_chat_template``.
        decode: ids to text, special tokens and all.
    """
    lines = []
    if found["input_ids"] != own["input_ids"]:
        lines += parting(found["input_ids"], own["input_ids"], decode)
    if found["spans"] != own["spans"]:
        lines.append("the trained ranges [begin, end) of the tokens differ")
        for name, row, other in (("prepared", found, own), ("apply_chat_template", own, found)):
            there = list(_pairs(other))
            for begin, end in [pair for pair in _pairs(row) if pair not in there][:3]:
                lines.append(f"  {name}, [{begin}, {end}): {_shown(row['input_ids'][begin:end], decode)}")
    for name in found:
        if name not in ("input_ids", "spans") and found[name] != own[name]:
            lines.append(f"{name}: {found[name]!r} prepared, {own[name]!r} by apply_chat_template")
    return lines


def _pairs(row: dict[str, Any]) -> Iterator[tuple[int, int]]:
    return zip(row["spans"][::2], row["spans"][1::2], strict=False)


def _shown(ids: Sequence[int], decode: Decode) -> str:
    if not ids:
        return "nothing"
    shown = list(ids[:MOST])
    # What stands in a damaged file need not be an id.
    text = snippet(decode([one for one in shown if one >= 0]))
    more = f" … {len(ids) - MOST} more" if len(ids) > MOST else ""
    return f"{shown} {text}{more}"
