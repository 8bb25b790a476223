"""Prepared ids are the tokenizer's own: every row is read back, and one in 64 is tokenised again by transformers."""

from types import SimpleNamespace

import pytest

from qwen_lit.data.blocks import TextEncoder
from qwen_lit.data.chatml import Encoder
from qwen_lit.data.faults import DataError
from qwen_lit.data.records import parse_row
from qwen_lit.data.text import Document
from qwen_lit.data.token_check import diff_ids, reads_as


def conversations(count):
    rows = ({"instruction": f"What is {n} plus 1?", "output": f"It is {n + 1}."} for n in range(count))
    return [parse_row(row, f"a:{number}") for number, row in enumerate(rows, 1)]


def test_one_conversation_in_64_is_compared_with_apply_chat_template(tokenizer, monkeypatch):
    encoder, asked = Encoder(tokenizer, max_length=256), []
    plain = encoder.renderer.ids
    monkeypatch.setattr(
        encoder.renderer, "ids", lambda drafts: asked.extend(one.source for one in drafts) or plain(drafts)
    )
    assert len(encoder.encode(conversations(130))) == 130
    assert asked == ["a:1", "a:65", "a:129"]


def test_a_row_that_the_template_tokenises_otherwise_is_shown_where_the_ids_part(tokenizer, monkeypatch):
    encoder, other = Encoder(tokenizer, max_length=256), tokenizer.convert_tokens_to_ids("Z")
    plain = encoder.renderer.ids

    def changed(drafts):
        found = plain(drafts)
        found[1][-3] = other
        return found

    monkeypatch.setattr(encoder.renderer, "ids", changed)
    with pytest.raises(DataError) as raised:
        encoder.encode(conversations(130))
    lines = [line.strip() for line in str(raised.value).splitlines()]
    assert lines[0] == "a:65: token ids differ from the exported tokenizer's own:"
    at = lines[1].removeprefix("the ids part at token ").split()[0]
    assert f"apply_chat_template, from {at}: [{other}] 'Z'" in lines
    assert any(line.startswith(f"prepared, from {at}: [") and line.endswith("'.'") for line in lines)
    assert any(line.startswith("both, after it: [") and "<|im_end|>" in line for line in lines)


def test_a_row_whose_ids_do_not_read_back_as_its_text_is_found_whichever_it_is(tokenizer, monkeypatch):
    encoder = Encoder(tokenizer, max_length=256)
    plain = encoder.backend

    class Spoiled:
        """The tokenizer, but that it loses a token of the eighth text."""

        decode_batch, decode = plain.decode_batch, plain.decode

        def encode_batch_fast(self, texts, **options):
            found = [list(one.ids) for one in plain.encode_batch_fast(texts, **options)]
            del found[7][5]
            return [SimpleNamespace(ids=ids) for ids in found]

    monkeypatch.setattr(encoder, "backend", Spoiled())
    with pytest.raises(DataError, match="^a:8: token ids differ from the exported tokenizer's own:\n.*\n"):
        encoder.encode(conversations(20))


def test_one_segment_of_raw_text_in_64_is_compared_with_the_tokenizer_and_each_with_its_text(tokenizer, monkeypatch):
    encoder, asked = TextEncoder(tokenizer, max_length=64), []

    class Spy:
        def __call__(self, text, **options):
            asked.append(text)
            return tokenizer(text, **options)

    monkeypatch.setattr(encoder, "tokenizer", Spy())
    encoder.encode([Document(f"text {n}", f"a:{n}") for n in range(130)])
    assert asked == ["text 0", "text 64", "text 128"]
    monkeypatch.setattr(encoder, "tokenizer", lambda text, **options: {"input_ids": tokenizer(text)["input_ids"][:-1]})
    encoder.segments = 64
    with pytest.raises(DataError, match="a:1: token ids .*\n  the ids part at token .* of the tokenizer"):
        encoder.encode([Document("text", "a:1")])
    encoder.bytes[tokenizer("t")["input_ids"][0]] = b"T"
    with pytest.raises(DataError, match="a:2: .*\n  they do not read back as its text"):
        encoder.encode([Document("t", "a:2")])


def test_a_text_may_be_read_back_in_its_normal_form():
    assert reads_as("é", "e\u0301") and reads_as("a", "a") and not reads_as("e", "é")


def test_lists_of_ids_that_end_early_or_are_long_are_shown_in_short(tokenizer):
    backend = tokenizer.backend_tokenizer
    lines = diff_ids([5, 6], [5, 6, 7], backend)
    assert lines[0] == "the ids part at token 2 (of 2 prepared, 3 of apply_chat_template)"
    assert lines[2].startswith("  prepared, from 2: nothing") and lines[-1] == "  and both end"
    assert diff_ids([5] * 40, [6] * 40, backend)[1].endswith(" … 24 more")
