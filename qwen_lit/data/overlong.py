"""What becomes of a conversation that is too long: its oldest turns go first, its last answer never."""

from collections.abc import Callable, Iterator

from qwen_lit.data.faults import RowError
from qwen_lit.data.render import Draft, Messages

OLDEST, SHORTENED = "oldest turns dropped", "longest user text shortened"

Ids = Callable[[Draft], list[int]]
Offsets = Callable[[str], list[tuple[int, int]]]


def shorten(draft: Draft, limit: int, ids_of: Ids, offsets_of: Offsets) -> tuple[Draft, list[int]]:
    """The draft and its ids, cut until they fit; what was done is added to its notes.

    Args:
        draft: a conversation of more than ``limit`` tokens.
        limit: most tokens.
        ids_of: renders and tokenises a draft; sets its text.
        offsets_of: ``[begin, end)`` of each token of a plain text, in characters.

    Raises:
        RowError: system prompt, last question and whole answer do not fit.
    """
    length = 0
    for one in _without_oldest(draft):
        ids = ids_of(one)
        length = length or len(ids)
        if len(ids) <= limit:
            return one, ids
    users = [number for number, message in enumerate(one.messages) if message["role"] == "user"]
    longest = max(users, key=lambda number: len(one.messages[number]["content"]), default=None)
    text = one.messages[longest]["content"] if longest is not None else ""
    pieces = offsets_of(text)
    keep = len(pieces)
    while longest is not None:
        keep -= len(ids) - limit
        if keep < 1:
            break
        tail = keep // 2
        cut = text[: pieces[keep - tail - 1][1]] + (text[pieces[len(pieces) - tail][0] :] if tail else "")
        messages = [*one.messages[:longest], {**one.messages[longest], "content": cut}, *one.messages[longest + 1 :]]
        one = Draft(messages, one.turns, one.tools, one.source, one.notes)
        ids = ids_of(one)
        if len(ids) <= limit:
            one.notes.append(SHORTENED)
            return one, ids
    raise RowError("overlong", f"has {length} tokens; data.max_length {limit} cannot hold its question and answer.")


def _without_oldest(draft: Draft) -> Iterator[Draft]:
    """The conversation whole, then without its first exchange, its first two, and so on to the last."""
    messages = draft.messages
    yield Draft(messages, draft.turns, draft.tools, draft.source, list(draft.notes), draft.text)
    head: Messages = messages[:1] if messages[0]["role"] == "system" else []
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    for start in starts[1:]:
        turns = [turn - start + len(head) for turn in draft.turns if turn >= start]
        if turns:
            yield Draft(head + messages[start:], turns, draft.tools, draft.source, [*draft.notes, OLDEST])
