"""What becomes of a conversation that is too long: its oldest turns go first, its last answer last, if at all."""

from collections.abc import Callable
from dataclasses import replace

from qwen_lit.data.faults import RowError
from qwen_lit.data.render import Draft, Messages

OLDEST, SHORTENED = "oldest turns dropped", "longest user text shortened"
CUT = "end of the answer cut off"
LEAST_ANSWER = 2
"""Of so many parts of the tokens one is left to an answer that is cut; what precedes it is shortened for that."""

Ids = Callable[[Draft], list[int]]
Offsets = Callable[[str], list[tuple[int, int]]]
TrainedFrom = Callable[[list[int], Draft], int]


def shorten(
    draft: Draft, limit: int, ids_of: Ids, offsets_of: Offsets, trained_from: TrainedFrom | None = None
) -> tuple[Draft, list[int]]:
    """The draft and its ids, whole if it fits and else cut until it does; what was done is added to its notes.

    Args:
        draft: a conversation, most likely of more than ``limit`` tokens.
        limit: most tokens.
        ids_of: renders and tokenises a draft; sets its text.
        offsets_of: ``[begin, end)`` of each token of a plain text, in characters.
        trained_from: where the first trained turn of a rendered draft begins, in tokens; given, an answer that does
            not fit is left for the caller to cut: more ids than ``limit`` come back, with room for some of it.

    Raises:
        RowError: system prompt, last question and whole answer do not fit; or not even the prompt does.
    """
    starts = _starts(draft)
    last = len(starts) - 1
    tried = {last: _from(draft, starts[last])}
    found = {last: ids_of(tried[last])}
    if len(found[last]) > limit:
        try:
            return _shorten_text(tried[last], found[last], limit, ids_of, offsets_of, draft)
        except RowError:
            if trained_from is None:
                raise
            return _make_room(tried[last], found[last], limit, ids_of, offsets_of, trained_from)

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
        return replace(draft, notes=notes)
    head: Messages = messages[:1] if messages[0]["role"] == "system" else []
    turns = [turn - start + len(head) for turn in draft.turns if turn >= start]
    return replace(draft, messages=head + messages[start:], turns=turns, notes=[*notes, OLDEST], text="")


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
        cut = _without_middle(text, pieces, keep)
        messages = [*one.messages[:longest], {**one.messages[longest], "content": cut}, *one.messages[longest + 1 :]]
        one = replace(one, messages=messages, text="")
        ids = ids_of(one)
        if len(ids) <= limit:
            one.notes.append(SHORTENED)
            return one, ids
    length = len(ids_of(_from(whole, 0)))
    raise RowError("overlong", f"has {length} tokens; data.max_length {limit} cannot hold its question and answer.")


def _without_middle(text: str, pieces: list[tuple[int, int]], keep: int) -> str:
    """The first and the last of a text's tokens, so many of them.

    Args:
        text: in characters.
        pieces: ``[begin, end)`` of each token.
        keep: at least 1.
    """
    tail = keep // 2
    return text[: pieces[keep - tail - 1][1]] + (text[pieces[len(pieces) - tail][0] :] if tail else "")


def _make_room(
    one: Draft, ids: list[int], limit: int, ids_of: Ids, offsets_of: Offsets, trained_from: TrainedFrom
) -> tuple[Draft, list[int]]:
    """The last exchange with so much of its prompt left out that part of its answer fits; see ``shorten``."""
    begin = trained_from(ids, one)
    wanted = limit - min(len(ids) - begin, max(1, limit // LEAST_ANSWER))
    while begin > wanted:
        before = one.turns[0]
        sizes = {number: offsets_of(message["content"]) for number, message in enumerate(one.messages[:before])}
        longest = max(sizes, key=lambda number: len(sizes[number]), default=None)
        text = one.messages[longest]["content"] if longest is not None else ""
        if longest is None or len(text) < 2 or len(sizes[longest]) < 2:
            break
        cut = _without_middle(text, sizes[longest], max(1, len(sizes[longest]) - (begin - wanted)))
        if len(cut) >= len(text):
            # A character of several tokens, such as an emoji, is whole as soon as its first token is kept.
            cut = text[: len(text) // 2]
        messages = [*one.messages[:longest], {**one.messages[longest], "content": cut}, *one.messages[longest + 1 :]]
        notes = one.notes if SHORTENED in one.notes else [*one.notes, SHORTENED]
        one = replace(one, messages=messages, notes=notes, text="")
        ids = ids_of(one)
        begin = trained_from(ids, one)
    if begin >= limit:
        raise RowError("overlong", f"has a prompt of {begin} tokens; data.max_length {limit} cannot hold it.")
    return one, ids
