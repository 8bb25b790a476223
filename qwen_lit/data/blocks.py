"""Raw text to token ids as it stands: no chat template, every token trained, long texts in blocks.

A text is tokenised in segments that end at line ends, where the tokenizer's own words end too, and its ids, with the
end token after the last, are cut into blocks between two of them: at the end of a paragraph where there is one, else
of a sentence, else of any character. So the blocks' ids, joined, are those of the text. A block that continues a text
begins with the last token of the block before, which is not trained there and gives the next one its context; the
first token of a text has nothing before it and is not trained.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen_lit.data.control import CONTROL, control_names, escaped
from qwen_lit.data.examples import RAW_TEXT, Example
from qwen_lit.data.faults import DataError, RowError, snippet
from qwen_lit.data.passages import Passage
from qwen_lit.data.text import Document, text_hash
from qwen_lit.data.token_check import EXACT_EVERY, diff_ids, unlike

DOCUMENT_END = "<|endoftext|>"
"""What stands between two documents in Qwen's pretraining; ``<|im_end|>`` ends a turn, and a text is none."""
LONG = 20_000
"""Characters of a text above which its blocks are rows of their own: held out, counted and weighted by themselves."""
SEGMENT = 50_000
"""Characters of a segment, of which the tokenizer takes several at once."""
AT_ONCE = 32
"""Segments that are tokenised at once, which bounds memory."""
LEAST = 4
"""A block ends at a paragraph or a sentence that fills at least one part of so many; else later, at less."""
OPENING = 64
"""Most tokens of a block that stand for a prompt."""
BREAK = re.compile(r"[\r\n](?:\s*[\r\n])?")
SENTENCE = re.compile(r"(?:[。！？!?…]|\.(?=[\s\"'”’)\]]))[”’」』）\"')\]]*")
ENDED = frozenset("。！？!?….:：；;”’」』）\"')]》—～~*")
"""What a line ends with that is a paragraph, and no line of verse or of wrapped text."""


class TextEncoder:
    """Turns texts into blocks; one per process."""

    def __init__(self, tokenizer: Any, *, max_length: int, control_tokens: str = "error") -> None:
        """Reads the vocabulary.

        Args:
            tokenizer: transformers' byte-level tokenizer.
            max_length: most tokens of a block.
            control_tokens: error or escape.

        Raises:
            DataError: the tokenizer has no token that ends a document, or is not byte-level.
        """
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        self.max_length, self.control_tokens = max_length, control_tokens
        self.control = control_names(tokenizer)
        self.end = document_end(tokenizer)
        self.bytes = _token_bytes(tokenizer)
        self.lengths = np.array([len(one) for one in self.bytes])
        self.segments = 0
        """Segments tokenised so far."""

    def encode(self, documents: Sequence[Document]) -> list[list[Example | RowError]]:
        """For each text its blocks, or why there are none.

        Raises:
            DataError: ids differ from the tokenizer's own.
        """
        found: list[list[Example | RowError]] = []
        for document in documents:
            try:
                found.append([*self.blocks(document)])
            except RowError as error:
                found.append([error])
        return found

    def blocks(self, document: Document) -> list[Example]:
        """The blocks of a text.

        Raises:
            RowError: a control token or half of a surrogate pair stands in it.
            DataError: its ids differ from the tokenizer's own.
        """
        text, note = self._guarded(document)
        normal = self.backend.normalizer.normalize_str(text) if self.backend.normalizer else text
        raw = normal.encode()
        ids = self._ids(text, document.source)
        if b"".join([self.bytes[one] for one in ids]) != raw:
            raise unlike(document.source, ["they do not read back as its text"])
        passage = document.passage or Passage(text)
        places = np.frombuffer(raw, np.uint8)
        starts = np.flatnonzero((places & 0xC0) != 0x80)
        ends = np.concatenate([[0], np.cumsum(self.lengths[ids])])
        at = np.searchsorted(starts, ends)
        ranks = np.where(np.append(starts, len(raw))[at] == ends, borders(normal)[at], -1)
        before = self._ids(passage.before, document.source)[-1:] if passage.before else []
        whole = passage.opens and passage.closes and len(text) <= LONG
        own = document.hash if whole else 0
        stream, blocks = [*ids, self.end] if passage.closes else ids, list[Example]()
        line, counted = passage.line, 0
        for begin, stop in _cuts(ranks, len(stream), len(before), self.max_length):
            context = before if not begin else ids[_character(ranks, begin) : begin]
            # A cut may stand within a character, where no token of a block ends with one.
            said = raw[ends[min(begin, len(ids))] : ends[min(stop, len(ids))]].decode("utf-8", "replace")
            source = document.source
            if document.passage is not None:
                line, counted = line + normal.count("\n", counted, int(at[begin])), int(at[begin])
                source = f"{document.source.rpartition(':')[0]}:{line}"
            block = [*context, *stream[begin:stop]]
            prompt_end = _opening(ranks, begin, len(context), len(block))
            span, key = (max(1, len(context)), len(block)), own if whole else text_hash(said)
            blocks.append(Example(block, [span], source, RAW_TEXT, key, prompt_end, note=note))
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

    def _ids(self, text: str, source: str) -> list[int]:
        """The ids of a text, tokenised segment by segment.

        Raises:
            DataError: those of a segment are not what transformers' own call gives.
        """
        found: list[int] = []
        left = segments(text)
        while some := list(itertools.islice(left, AT_ONCE)):
            for segment, one in zip(some, self.backend.encode_batch_fast(some, add_special_tokens=False), strict=True):
                ids = one.ids
                found += ids
                self.segments += 1
                if self.segments % EXACT_EVERY == 1:
                    own = self.tokenizer(segment, add_special_tokens=False, verbose=False)["input_ids"]
                    if own != ids:
                        raise unlike(source, diff_ids(ids, own, self.backend, "the tokenizer"))
        return found


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


def _token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of each token of a byte-level vocabulary.

    Raises:
        DataError: it is another.
    """
    added = {number: token.content.encode() for number, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    table, found = _bytes_of_characters(), [b""] * (max(vocabulary.values(), default=-1) + 1)
    try:
        for name, number in vocabulary.items():
            found[number] = added[number] if number in added else name.translate(table).encode("latin-1")
    except UnicodeEncodeError as error:
        raise DataError("raw text needs a byte-level tokenizer; use a Qwen2 or Qwen3 tokenizer.") from error
    return found


def _bytes_of_characters() -> dict[int, int]:
    """Byte-level vocabularies write every byte as a printable character (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + number: byte for number, byte in enumerate(others)}


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


def _opening(ranks: np.ndarray, begin: int, context: int, length: int) -> int:
    """Tokens of a block that stand for a prompt, in whole characters: the half of it, ``OPENING`` at most.

    Args:
        ranks: ``[tokens + 1]`` of ``borders``, before each token of the text; -1 within a character.
        begin: the first token of the text that the block adds.
        context: tokens before it.
        length: of the block.
    """
    most = max(1, context, min(length // 2, OPENING))
    for shorter in range(most, max(context, most - 4), -1):
        if ranks[begin + shorter - context] >= 0:
            return shorter
    return max(1, context) if most - 4 <= context else most


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
