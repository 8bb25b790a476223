"""Raw text to token ids as it stands: no chat template, every token trained, long texts in blocks.

A text is tokenised in segments that end at line ends, where the tokenizer's own words end too, and its ids, with the
end token after the last, are cut into blocks between two of them: at the end of a paragraph where there is one, else
of a sentence, else of any character. So the blocks' ids, joined, are those of the text. A block that continues a text
begins with the last token of the block before, which is not trained there and gives the next one its context; the
first token of a text has nothing before it and is not trained.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_lit.data.columns import Seen, leftover, refuse
from qwen_lit.data.control import CONTROL, escaped
from qwen_lit.data.difference import parting
from qwen_lit.data.fast import FastDiffers, FastEncoder, bytes_of_characters
from qwen_lit.data.faults import DataError, RowError, snippet
from qwen_lit.data.layouts import FIELDS, LISTS
from qwen_lit.data.messages import ROLE_KEYS, TEXT_KEYS, renamed
from qwen_lit.data.passages import Passage

DOCUMENT_END = "<|endoftext|>"
"""What stands between two documents in Qwen's pretraining; ``<|im_end|>`` ends a turn, and a text is none."""
LONG = 20_000
"""Characters of a text above which its blocks are rows of their own: held out, counted and weighted by themselves."""
SEGMENT = 50_000
"""Characters that are tokenised at once."""
LEAST = 4
"""A block ends at a paragraph or a sentence that fills at least one part of so many; else later, at less."""
OPENING = 64
"""Tokens of a block that the model is asked to go on from."""
OTHERS = FIELDS - {*ROLE_KEYS, *TEXT_KEYS}
"""Columns that make a row something else than a text."""
BREAK = re.compile(r"[\r\n](?:\s*[\r\n])?")
SENTENCE = re.compile(r"(?:[。！？!?…]|\.(?=[\s\"'”’)\]]))[”’」』）\"')\]]*")
ENDED = frozenset("。！？!?….:：；;”’」』）\"')]》—～~*")
"""What a line ends with that is a paragraph, and no line of verse or of wrapped text."""


@dataclass
class Document:
    """A text, or a passage of one, to be trained as it is."""

    text: str
    source: str
    """``path:line``, of the first line of a passage."""
    passage: Passage | None = None
    """Where it stands in a text file; None for a row."""
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    format: str = "text"

    @property
    def hash(self) -> int:
        """64 bits of the text, wherever it stands."""
        return text_hash(self.text)


@dataclass
class Block:
    """Consecutive tokens of a text."""

    input_ids: list[int]
    context: int
    """Tokens at its beginning that are not trained here."""
    source: str
    """``path:line``."""
    hash: int
    """Of its text where the text is long, else of the whole text."""
    note: str = ""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Ranges ``[begin, end)`` that are trained."""
        return [(self.context, len(self.input_ids))]


def text_hash(text: str) -> int:
    """64 bits; equal for texts that are equal in their normal form.

    Raises:
        RowError: half of a surrogate pair stands in it.
    """
    try:
        raw = unicodedata.normalize("NFC", text).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("lone surrogate", f"has half of a surrogate pair at {text[error.start]!r}.") from error
    return int.from_bytes(hashlib.blake2b(b"text\0" + raw, digest_size=8).digest(), "big")


def read_text(row: Any, source: str, fields: Mapping[str, str] | None = None) -> Document | None:
    """The raw text of a row; None where the row is a conversation, or what it is is for others to say.

    Args:
        row: the parsed JSON, or a passage of a text file.
        source: ``path:line``.
        fields: our field name to the file's.

    Raises:
        RowError: the text is empty or none, or something says of the row what is not done here.
    """
    if isinstance(row, Passage):
        return Document(row.text, source, row)
    if not isinstance(row, dict) or not row.keys() & {"text", "Text", "TEXT", (fields or {}).get("text", "text")}:
        return None
    seen = Seen()
    row = renamed(row, fields, seen)
    if "text" not in row:
        row = {key.lower() if key in ("Text", "TEXT") else key: value for key, value in row.items()}
    if "text" not in row or any(_holds(row, key) for key in row.keys() & OTHERS):
        return None
    refuse(row, "the row")
    text = row["text"]
    if not isinstance(text, str):
        raise RowError("wrong type", f"'text' is of type {type(text).__name__}, not text: {snippet(repr(text))}")
    if not text.strip():
        raise RowError("empty field", "'text' is empty.")
    leftover(row, {"text"}, [{"role": "assistant", "content": text}], seen)
    return Document(text, source, None, tuple(seen.notes), tuple(sorted(seen.unread)), tuple(sorted(seen.mapped)))


def _holds(row: dict[str, Any], key: str) -> bool:
    value = row[key]
    if key in LISTS and key == "data" and not isinstance(value, list):
        return False
    return value not in (None, "", [], {}) and not (isinstance(value, str) and not value.strip())


class TextEncoder:
    """Turns texts into blocks; one per process."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        control: frozenset[str],
        control_tokens: str = "error",
        exact_every: int = 1,
        fast: FastEncoder | None = None,
    ) -> None:
        """Reads the vocabulary.

        Args:
            tokenizer: transformers' byte-level tokenizer.
            max_length: most tokens of a block.
            control: control tokens, such as ``<|im_start|>``.
            control_tokens: error or escape.
            exact_every: of so many segments one is compared with what the tokenizer gives by itself; all are decoded
                and compared with the text.
            fast: encodes in the place of the tokenizer.

        Raises:
            DataError: the tokenizer has no token that ends a document, or is not byte-level.
        """
        self.tokenizer, self.backend, self.fast = tokenizer, tokenizer.backend_tokenizer, fast
        self.max_length, self.exact_every, self.segments = max_length, exact_every, 0
        self.control, self.control_tokens = control, control_tokens
        self.end = document_end(tokenizer)
        self.bytes = _token_bytes(tokenizer)
        self.lengths = np.array([len(one) for one in self.bytes])

    def encode(self, document: Document) -> list[Block]:
        """The blocks of a text.

        Raises:
            RowError: a control token or half of a surrogate pair stands in it.
            DataError: its ids differ from the tokenizer's own.
            FastDiffers: those of ``fast`` do.
        """
        text, note = self._guarded(document)
        normal = self.backend.normalizer.normalize_str(text) if self.backend.normalizer else text
        raw = normal.encode()
        ids = [one for segment in segments(text) for one in self._ids(segment, document.source)]
        if b"".join([self.bytes[one] for one in ids]) != raw:
            self._differs(document.source, ["they do not read back as its text"])
        passage = document.passage or Passage(text)
        places = np.frombuffer(raw, np.uint8)
        starts = np.flatnonzero((places & 0xC0) != 0x80)
        ends = np.concatenate([[0], np.cumsum(self.lengths[ids])])
        at = np.searchsorted(starts, ends)
        ranks = np.where(np.append(starts, len(raw))[at] == ends, borders(normal)[at], -1)
        before = self._ids(passage.before, document.source)[-1:] if passage.before else []
        whole = passage.opens and passage.closes and len(text) <= LONG
        own = document.hash if whole else 0
        stream, blocks = [*ids, self.end] if passage.closes else ids, []
        line, counted = passage.line, 0
        for begin, stop in _cuts(ranks, len(stream), len(before), self.max_length):
            context = before if not begin else ids[_character(ranks, begin) : begin]
            # A cut may stand within a character, where no token of a block ends with one.
            said = raw[ends[min(begin, len(ids))] : ends[min(stop, len(ids))]].decode("utf-8", "replace")
            source = document.source
            if document.passage is not None:
                line, counted = line + normal.count("\n", counted, int(at[begin])), int(at[begin])
                source = f"{document.source.rpartition(':')[0]}:{line}"
            key = own if whole else text_hash(said)
            blocks.append(Block([*context, *stream[begin:stop]], max(1, len(context)), source, key, note))
        return blocks

    def _guarded(self, document: Document) -> tuple[str, str]:
        """The text without control tokens, and what was done for that."""
        text = document.text
        if "<|" not in text:
            return text, "; ".join(document.notes)
        if self.control_tokens == "error":
            found = next((one for one in CONTROL.finditer(text) if one[0] in self.control), None)
            if found is None:
                return text, "; ".join(document.notes)
            around = snippet(text[max(0, found.start() - 20) :])
            fault = RowError(
                "control token",
                f"has {found[0]} inside its text: {around}; the end of a text is marked by itself; remove it, or set "
                "data.control_tokens: escape.",
            )
            if document.passage is not None:
                line = document.passage.line + text.count("\n", 0, found.start())
                fault.source = f"{document.source.rpartition(':')[0]}:{line}"
            raise fault
        text, changed = escaped(text, self.control)
        return text, "; ".join([*document.notes, *["control tokens escaped"] * changed])

    def _ids(self, segment: str, source: str) -> list[int]:
        if self.fast is not None:
            ids = self.fast.encode([segment])[0]
        else:
            ids = self.backend.encode_batch_fast([segment], add_special_tokens=False)[0].ids
        self.segments += 1
        if (self.segments - 1) % self.exact_every == 0:
            own = self.tokenizer(segment, add_special_tokens=False, verbose=False)["input_ids"]
            if own != ids:
                decode = self.backend.decode
                self._differs(source, parting(ids, own, lambda some: decode(some, False), "the tokenizer"))
        return ids

    def _differs(self, source: str, lines: list[str]) -> None:
        if self.fast is not None:
            raise FastDiffers(source)
        shown = "".join(f"\n  {line}" for line in lines)
        raise DataError(f"{source}: token ids differ from the exported tokenizer's own:{shown}")


def document_end(tokenizer: Any) -> int:
    """The id of the token that ends a document.

    Raises:
        DataError: the vocabulary has none.
    """
    found = tokenizer.backend_tokenizer.token_to_id(DOCUMENT_END)
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        raise DataError(f"the model's tokenizer has no {DOCUMENT_END} token; use a Qwen2 or Qwen3 tokenizer.")
    return int(found)


def opening(ids: list[int], tokenizer: Any) -> int:
    """Tokens of a block that stand for a prompt, in whole characters: the half of it, ``OPENING`` at most."""
    at = max(1, min(len(ids) // 2, OPENING))
    for shorter in range(at, max(0, at - 4), -1):
        if not tokenizer.decode(ids[max(0, shorter - 4) : shorter]).endswith("\ufffd"):
            return shorter
    return at


def _token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of each token of a byte-level vocabulary.

    Raises:
        DataError: it is another.
    """
    added = {number: token.content.encode() for number, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    table, found = bytes_of_characters(), [b""] * (max(vocabulary.values(), default=-1) + 1)
    try:
        for name, number in vocabulary.items():
            found[number] = added[number] if number in added else name.translate(table).encode("latin-1")
    except UnicodeEncodeError as error:
        raise DataError("raw text needs a byte-level tokenizer; use a Qwen2 or Qwen3 tokenizer.") from error
    return found


def segments(text: str, size: int = SEGMENT) -> Iterator[str]:
    """Pieces of a text that end at line ends, where no word of the tokenizer goes on."""
    begin = 0
    while len(text) - begin > size:
        cut = -1
        for found in BREAK.finditer(text, begin, begin + size):
            # Blanks after a line end are of one word with it, if another line end follows them.
            cut = found.end() if text[found.end() : found.end() + 1].strip() else cut
        if cut <= begin:
            following = re.compile(r"[\r\n](?=\S)").search(text, begin + size - 1)
            cut = following.end() if following else len(text)
        yield text[begin:cut]
        begin = cut
    if begin < len(text) or not text:
        yield text[begin:]


def borders(text: str) -> np.ndarray:
    """How well a text can be cut before each character, and at its end, int8 ``[characters + 1]``.

    2 is the end of a paragraph, 1 of a sentence or a line, 0 no end of anything.
    """
    found = np.zeros(len(text) + 1, np.int8)
    for one in SENTENCE.finditer(text):
        found[one.end()] = 1
    for one in BREAK.finditer(text):
        empty = one[0].count("\n") > 1 or one[0].count("\r") > 1
        last = text[max(0, one.start() - 40) : one.start()].rstrip()[-1:]
        found[one.end()] = 2 if empty or last in ENDED else 1
    found[len(text)] = 2
    return found


def _character(ranks: np.ndarray, at: int) -> int:
    """Where the last whole character before a token begins."""
    # A character has four bytes at most; tokens may end within the next one again and again.
    least = max(0, at - 4)
    at -= 1
    while at > least and ranks[at] < 0:
        at -= 1
    return at


def _cuts(ranks: np.ndarray, total: int, before: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges ``[begin, stop)`` of the tokens that each block adds.

    Args:
        ranks: ``[tokens + 1]`` of ``borders``, before each token of the text; -1 within a character.
        total: tokens of the text, and the end token where there is one.
        before: tokens of context of the first block.
        most: tokens of a block.
    """
    begin, tokens = 0, len(ranks) - 1
    while begin < total:
        room = most - (begin - _character(ranks, begin) if begin else before)
        if total - begin <= room:
            yield begin, total
            return
        # The end token is not to stand alone.
        stop = _best(ranks, begin, min(begin + room, tokens - 1 if total > tokens else tokens), room)
        yield begin, stop
        begin = stop


def _best(ranks: np.ndarray, begin: int, last: int, room: int) -> int:
    for rank in (2, 1):
        first = min(begin + max(1, room // LEAST), last)
        good = np.flatnonzero(ranks[first : last + 1] >= rank)
        if len(good):
            return first + int(good[-1])
    good = np.flatnonzero(ranks[begin + 1 : last + 1] >= 0)
    return begin + 1 + int(good[-1]) if len(good) else last
