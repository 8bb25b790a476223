"""What becomes of a conversation that is too long: its oldest turns go first, its last answer never."""

from collections.abc import Callable

from qwen_lit.data.faults import RowError
from qwen_lit.data.render import Draft, Messages

OLDEST, SHORTENED = "oldest turns dropped", "longest user text shortened"

Ids = Callable[[Draft], list[int]]
Offsets = Callable[[str], list[tuple[int, int]]]


def shorten(draft: Draft, limit: int, ids_of: Ids, offsets_of: Offsets) -> tuple[Draft, list[int]]:
    """The draft and its ids, whole if it fits and else cut until it does; what was done is added to its notes.

    Args:
        draft: a conversation, most likely of more than ``limit`` tokens.
        limit: most tokens.
        ids_of: renders and tokenises a draft; sets its text.
        offsets_of: ``[begin, end)`` of each token of a plain text, in characters.

    Raises:
        RowError: system prompt, last question and whole answer do not fit.
    """
    starts = _starts(draft)
    last = len(starts) - 1
    tried = {last: _from(draft, starts[last])}
    found = {last: ids_of(tried[last])}
    if len(found[last]) > limit:
        return _shorten_text(tried[last], found[last], limit, ids_of, offsets_of, draft)

    def fits(number: int) -> bool:
        if number not in found:
            tried[number] = _from(draft, starts[number])
            found[number] = ids_of(tried[number])
        return len(found[number]) <= limit

    first = _first(fits, len(starts), _guess(draft, starts, limit, len(found[last])))
    return tried[first], found[first]


def _starts(draft: Draft) -> list[int]:
    """Where the conversation can begin: at its first message, or at any later question before a trained turn."""
    users = [number for number, message in enumerate(draft.messages) if message["role"] == "user"]
    return [0, *(start for start in users[1:] if start <= draft.turns[-1])]


def _from(draft: Draft, start: int) -> Draft:
    """The conversation whole, or its system prompt and all from ``start`` on."""
    messages, notes = draft.messages, list(draft.notes)
    if not start:
        return Draft(messages, draft.turns, draft.tools, draft.source, notes, draft.text)
    head: Messages = messages[:1] if messages[0]["role"] == "system" else []
    turns = [turn - start + len(head) for turn in draft.turns if turn >= start]
    return Draft(head + messages[start:], turns, draft.tools, draft.source, [*notes, OLDEST])


def _guess(draft: Draft, starts: list[int], limit: int, tokens: int) -> int:
    """The number of the start from which ``limit`` tokens are likely: as many for a character as in the last exchange.

    Args:
        draft: the whole.
        starts: of ``_starts``.
        limit: most tokens.
        tokens: from the last start on.
    """
    sizes = [len(message["content"]) for message in draft.messages]
    last = sum(sizes[starts[-1] :])
    room = limit * last / tokens - last
    for number in range(len(starts) - 1, 0, -1):
        room -= sum(sizes[starts[number - 1] : starts[number]])
        if room < 0:
            return number
    return 0


def _first(fits: Callable[[int], bool], count: int, guess: int) -> int:
    """The first of ``count`` numbers that fits; what follows one that fits does so too, and the last does.

    Each look costs as much as what is looked at is long, so it begins at ``guess`` and goes further in longer steps.
    """
    low, high, step = -1, count - 1, 1
    at = guess
    if fits(at):
        while at >= 0 and fits(at):
            high, at, step = at, at - step, 2 * step
        low = max(at, -1)
    else:
        while not fits(at):
            low, at, step = at, min(at + step, count - 1), 2 * step
        high = at
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _shorten_text(
    one: Draft, ids: list[int], limit: int, ids_of: Ids, offsets_of: Offsets, whole: Draft
) -> tuple[Draft, list[int]]:
    """The last exchange with the middle of its longest question left out; see ``shorten``."""
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
    length = len(ids_of(_from(whole, 0)))
    raise RowError("overlong", f"has {length} tokens; data.max_length {limit} cannot hold its question and answer.")
