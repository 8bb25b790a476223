"""Prepared token ids beside their text, and beside the tokenizer's own ids: where two lists of ids part."""

import difflib
import unicodedata
from collections.abc import Sequence
from typing import Any

from qwen_lit.data.faults import DataError, snippet

AROUND = 6
"""Tokens shown on either side of those that differ."""
MOST = 16
"""Tokens shown of those that differ."""
EXACT_EVERY = 64
"""Of so many examples one is tokenised a second time by transformers' own call; all are read back as text."""


def reads_as(found: str, text: str) -> bool:
    """Whether decoded ids are a text, as it is or in its normal form."""
    return found == text or found == unicodedata.normalize("NFC", text)


def unlike(source: str, lines: Sequence[str]) -> DataError:
    """The error for a row whose ids are not those of its text.

    Args:
        source: ``path:line``.
        lines: what differs.
    """
    shown = "".join(f"\n  {line}" for line in lines)
    return DataError(f"{source}: token ids differ from the exported tokenizer's own:{shown}")


def diff_text(text: str, found: str) -> list[str]:
    """Lines that show where a text and what its ids read back as differ."""
    diff = difflib.ndiff(text.splitlines()[:50], found.splitlines()[:50])
    return "\n".join(diff)[:2000].splitlines()


def diff_ids(found: Sequence[int], own: Sequence[int], backend: Any, owner: str = "apply_chat_template") -> list[str]:
    """Lines that show where two lists of token ids part and meet again.

    Args:
        found: ids of the row as it would be trained.
        own: ids of the same row by the tokenizer alone.
        backend: the ``tokenizers`` tokenizer.
        owner: of the tokenizer's own ids, by name.
    """

    def shown(ids: Sequence[int]) -> str:
        if not ids:
            return "nothing"
        text = snippet(backend.decode(list(ids[:MOST]), skip_special_tokens=False))
        more = f" … {len(ids) - MOST} more" if len(ids) > MOST else ""
        return f"{list(ids[:MOST])} {text}{more}"

    least = min(len(found), len(own))
    begin = next((at for at in range(least) if found[at] != own[at]), least)
    alike = next((n for n in range(least - begin) if found[-1 - n] != own[-1 - n]), least - begin)
    first = max(0, begin - AROUND)
    lines = [f"the ids part at token {begin} (of {len(found)} prepared, {len(own)} of {owner})"]
    lines += [f"  both, from {first}: {shown(own[first:begin])}"] if begin else []
    lines.append(f"  prepared, from {begin}: {shown(found[begin : len(found) - alike])}")
    lines.append(f"  {owner}, from {begin}: {shown(own[begin : len(own) - alike])}")
    after = own[len(own) - alike :][:AROUND]
    return [*lines, f"  both, after it: {shown(after)}" if after else "  and both end"]
