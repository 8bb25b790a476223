"""tiktoken in the place of a byte-level tokenizer: the same ids in a third of the time.

Both join, again and again, the two neighbours of lowest rank. They differ in which neighbours may be joined: the
tokenizer asks its list of merges, tiktoken whether the two make a token. These are one where every token, read as text
of its own, is encoded as itself. Neighbours x and y were made from their own text alone, as they would be were xy all
there is; if xy is a token, that run ends with the merge of x and y, so the merge is in the list. ``FastEncoder.of``
proves this over the whole vocabulary before it is used, once for all for the vocabularies of ``PROVEN``.

Before the merges text is split by one and the same expression, by two engines. Characters that have kept their class
since Unicode 3.2 are told apart alike by both; a text with any other goes to the tokenizer itself.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

try:
    import tiktoken
except ImportError:
    tiktoken = None  # type: ignore[assignment]

LONGEST = 100_000
"""Characters of the longest text; tiktoken's engine gives up on millions of blanks in a row."""
BLOCKS = (
    (0x0000, 0x024F),
    (0x0370, 0x04FF),
    (0x2000, 0x206F),
    (0x20A0, 0x22FF),
    (0x2500, 0x27BF),
    (0x3000, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xFF00, 0xFFEF),
)
"""Latin, Greek, Cyrillic, Chinese, Japanese, and the signs among them."""

PROVEN = frozenset({"4c3340209cdeaea5fed2f9c5b254b4db4af0fa7333b5fad091dba6eb2ea7aa9a"})
"""SHA-256 of models, as the tokenizer writes them, for which the proof has been made: Qwen2, 2.5 and 3."""


COMMON = {"<|im_start|>", "<|im_end|>", "<think>", "</think>"}
MODEL = ',"model":{'


class FastDiffers(Exception):
    """The ids of a row are not the tokenizer's own."""


@functools.cache
def usual_text() -> re.Pattern[str]:
    """Matches text of usual characters alone: those of ``BLOCKS`` that have kept their class since Unicode 3.2."""
    kept = [code for first, last in BLOCKS for code in range(first, last + 1) if _kept(chr(code))]
    ranges: list[list[int]] = []
    for code in kept:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return re.compile("[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) + "]*")


def _kept(character: str) -> bool:
    then = unicodedata.ucd_3_2_0.category(character)
    # Case is folded in an expression for 's, 't and their like; the long s is an s to one engine alone.
    return then != "Cn" and then[0] == unicodedata.category(character)[0] and character != "\u017f"


class FastEncoder:
    """Encodes usual text by tiktoken, and all other by the tokenizer itself."""

    def __init__(self, encoding: Any, backend: Any) -> None:
        self.encoding, self.backend = encoding, backend
        special = encoding.special_tokens_set
        # Each name that is allowed costs time in each call, and few are ever met.
        self.common = frozenset(special & COMMON)
        self.rare = re.compile("|".join(map(re.escape, sorted(special - COMMON))) or "(?!)")

    @staticmethod
    def of(tokenizer: Any) -> "FastEncoder | None":
        """The encoder of a tokenizer for which it is proven; None for any other, and without tiktoken.

        Args:
            tokenizer: transformers', with a ``backend_tokenizer``.
        """
        backend = tokenizer.backend_tokenizer
        text: str = backend.to_str()
        proven = model_digest(text) in PROVEN
        # The model is all but the whole of the text, and takes a while to read.
        parts = json.loads(text[: text.rindex(MODEL)] + "}" if proven else text)
        pattern, added = _pattern(parts), parts["added_tokens"]
        if tiktoken is None or pattern is None or not _found_alike(added):
            return None
        vocabulary = backend.get_vocab(with_added_tokens=False)
        if not proven and not is_proven(backend, parts["model"]):
            return None
        bytes_of = bytes_of_characters()
        try:
            ranks = {name.translate(bytes_of).encode("latin-1"): rank for name, rank in vocabulary.items()}
            special = {one["content"]: one["id"] for one in added}
            return FastEncoder(
                tiktoken.Encoding("qwen_lit", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special), backend
            )
        except ValueError:
            return None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, added tokens recognised, nothing added."""
        usual, rare, encode = usual_text().fullmatch, self.rare.search, self.encoding.encode
        found: list[list[int]] = []
        rest = []
        for number, text in enumerate(texts):
            if len(text) <= LONGEST and usual(text):
                allowed = "all" if rare(text) else self.common
                found.append(
                    encode(unicodedata.normalize("NFC", text), allowed_special=allowed, disallowed_special=())
                )
            else:
                rest.append(number)
                found.append([])
        if rest:
            slow = self.backend.encode_batch_fast([texts[number] for number in rest], add_special_tokens=False)
            for number, one in zip(rest, slow, strict=True):
                found[number] = one.ids
        return found

    def reads_as(self, ids: list[int], text: str) -> bool:
        """Whether the ids are the whole text, as it is or in its normal form."""
        found = self.encoding.decode_bytes(ids)
        return found == text.encode() or found == unicodedata.normalize("NFC", text).encode()


def _pattern(parts: dict[str, Any]) -> str | None:
    """How the tokenizer splits text into words; None when it does more to it than NFC, the split and bytes."""
    steps = (parts["pre_tokenizer"] or {}).get("pretokenizers", [])
    after = parts["post_processor"] or {"type": "ByteLevel"}
    plain = (
        parts["normalizer"] == {"type": "NFC"}
        and after["type"] == "ByteLevel"
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["behavior"] == "Isolated"
        and not steps[0]["invert"]
        and not steps[1]["add_prefix_space"]
        and not steps[1]["use_regex"]
    )
    return steps[0]["pattern"].get("Regex") if plain else None


def _found_alike(added: list[dict[str, Any]]) -> bool:
    """Whether both find the same added tokens: tiktoken takes the first that fits, the tokenizer the longest."""
    names = sorted(one["content"] for one in added)
    plain = not any(one[flag] for one in added for flag in ("lstrip", "rstrip", "single_word", "normalized"))
    return plain and not any(longer.startswith(name) for name, longer in zip(names, names[1:], strict=False))


def model_digest(text: str) -> str:
    """SHA-256 of the model alone, in hex.

    Args:
        text: a tokenizer, as it writes itself.
    """
    return hashlib.sha256(text[text.rindex(MODEL) :].encode()).hexdigest()


def is_proven(backend: Any, model: dict[str, Any]) -> bool:
    """Whether merges by rank and merges by token are the same: see the head of this module.

    Args:
        backend: the tokenizer.
        model: the same tokenizer's, as it writes itself.
    """
    options = (
        "dropout",
        "unk_token",
        "fuse_unk",
        "byte_fallback",
        "ignore_merges",
        "continuing_subword_prefix",
        "end_of_word_suffix",
    )
    if model["type"] != "BPE" or any(model.get(option) for option in options):
        return False
    vocabulary = model["vocab"]
    pairs = (one.split(" ") if isinstance(one, str) else one for one in model["merges"])
    made = [vocabulary.get(left + right, -1) for left, right in pairs]
    if -1 in made or any(first > second for first, second in zip(made, made[1:], strict=False)):
        return False
    names = list(vocabulary)
    encoded = Tokenizer(backend.model).encode_batch_fast(names, add_special_tokens=False)
    return all(one.ids == [vocabulary[name]] for name, one in zip(names, encoded, strict=True))


def bytes_of_characters() -> dict[int, int]:
    """Byte-level vocabularies write every byte as a printable character (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + number: byte for number, byte in enumerate(others)}
