"""Raw text is trained as it is: every token once, in blocks that end where a reader would pause."""

import gzip
import io
import random
import unicodedata

import numpy as np
import pytest

from qwen_lit.data.batches import collate
from qwen_lit.data.blocks import TextEncoder, segments
from qwen_lit.data.faults import DataError, RowError
from qwen_lit.data.passages import Passage, read_passages
from qwen_lit.data.prepare import Task, cache_key, prepare, read_report
from qwen_lit.data.rows import Rows
from qwen_lit.data.sources import Source, expand, read_rows
from qwen_lit.data.text import Document, read_text
from tests.data.test_chatml import template

PARTS = [
    "第一章　雨夜",
    "他走进来。",
    "“你好！”她说……",
    "\n",
    "\n\n",
    "\r\n",
    "\r\n\r\n",
    "\n　　",
    " \n \n",
    "🙂",
    "👨‍👩‍👧",
    "e\u0301",
    "Hello there. ",
    "It rained, and rained; ",
    "don't",
    "12345",
    "\t",
    "   ",
    "龙" * 40,
    "\ufeff",
    "한국어",
    "？！",
    "——",
]


def encoder(tokenizer, most=32, **options):
    return TextEncoder(tokenizer, max_length=most, **options)


def context(block):
    """Tokens at its beginning that the block before it trains."""
    return block.spans[0][0]


def added(blocks):
    """The tokens that each block adds to those before it."""
    return [block.input_ids[context(block) if number else 0 :] for number, block in enumerate(blocks)]


def texts():
    draw = random.Random(7)
    yield from ("好", "a", "\n\n好\n\n", "\ufeff好", "\r\n好\r\n好", "第一段。\n\n\n\n第二段。")
    yield from ("🙂" * 50, "x" * 300, "e\u0301" * 40)
    yield "雨下个不停，他在屋里走来走去。" * 667
    yield "字" * 10_000
    # Tokens that end within the next character, one after the other.
    yield from ("흠" * 200, "햤" * 300, "a흠 " * 50 + "흠" * 100)
    for _ in range(60):
        yield "".join(draw.choices(PARTS, k=draw.randint(1, 120))) or "x"


def test_joined_the_blocks_are_the_text_and_no_token_is_lost_or_trained_twice(qwen_tokenizer):
    for most in (8, 33, 256):
        one = encoder(qwen_tokenizer, most)
        for text in texts():
            blocks = one.blocks(Document(text, "a:1"))
            joined = [token for some in added(blocks) for token in some]
            assert joined == [*qwen_tokenizer(text)["input_ids"], one.end]
            assert qwen_tokenizer.decode(joined[:-1]) == unicodedata.normalize("NFC", text)
            assert max(len(block.input_ids) for block in blocks) <= most
            assert all([end for _, end in block.spans] == [len(block.input_ids)] for block in blocks)
            # All but the first token of the text, each once.
            assert sum(end - begin for block in blocks for begin, end in block.spans) == len(joined) - 1
            for before, block in zip(blocks, blocks[1:], strict=False):
                assert before.input_ids[-context(block) :] == block.input_ids[: context(block)]
                assert len(block.input_ids) - context(block) > 1 or block.input_ids[-1] != one.end


def test_the_file_s_passages_make_the_same_tokens_as_the_whole_text(qwen_tokenizer):
    one = encoder(qwen_tokenizer, 64)
    for text in texts():
        if not text.strip():
            continue
        raw = b"\xef\xbb\xbf" + text.encode()
        for size in (50, 700, 10**6):
            found = list(read_passages("a.txt", io.BytesIO(raw), lambda: 0.0, size))
            passages = [passage for _, passage, _ in found]
            assert "".join(passage.text for passage in passages) == text
            assert [passage.opens for passage in passages] == [True, *[False] * (len(passages) - 1)]
            assert [passage.closes for passage in passages] == [*[False] * (len(passages) - 1), True]
            for place, passage, _ in found:
                assert place == f"a.txt:{passage.line}" and text.split("\n")[passage.line - 1].startswith(
                    passage.text.split("\n")[0].removesuffix("\r")
                )
            joined = []
            for number, passage in enumerate(passages):
                blocks = one.blocks(Document(passage.text, "a.txt:1", passage))
                assert not number or context(blocks[0]) == 1
                joined += [token for block in blocks for token in block.input_ids[context(block) :]]
            assert joined[-1] == one.end
            # The first token of all stands before what is trained.
            whole = qwen_tokenizer(text)["input_ids"]
            assert qwen_tokenizer.decode([whole[0], *joined[:-1]]) == unicodedata.normalize("NFC", text)


def test_segments_end_where_words_of_the_tokenizer_end(qwen_tokenizer):
    draw = random.Random(3)
    for _ in range(100):
        text = "".join(draw.choices(PARTS, k=200))
        some = list(segments(text, draw.randint(10, 200)))
        assert "".join(some) == text
        assert [one for part in some for one in qwen_tokenizer(part)["input_ids"]] == qwen_tokenizer(text)["input_ids"]


def test_blocks_end_at_paragraphs_else_at_sentences_else_anywhere(qwen_tokenizer):
    one = encoder(qwen_tokenizer, 64)
    paragraphs = ["天色暗了下来，街上没有人，只有雨声。" * 2 + "\n\n" for _ in range(12)]
    blocks = one.blocks(Document("".join(paragraphs), "a:1"))
    said = [qwen_tokenizer.decode(some) for some in added(blocks)]
    assert len(said) > 2 and all(text.endswith("。\n\n") for text in said[:-1]) and said[-1].endswith("<|endoftext|>")
    blocks = one.blocks(Document("天色暗了下来，街上没有人，只有雨声。" * 30, "a:1"))
    assert all(qwen_tokenizer.decode(some).endswith("雨声。") for some in added(blocks)[:-1])
    # Lines of wrapped English are no paragraphs, but sentences end within them.
    wrapped = "It was late. The rain fell on the\nroofs of the town and nobody was\nout. He walked on, alone.\n" * 9
    for some in added(one.blocks(Document(wrapped, "a:1")))[:-1]:
        assert qwen_tokenizer.decode(some).rstrip().endswith(".")
    blocks = one.blocks(Document("字" * 500, "a:1"))
    assert all(len(block.input_ids) >= 60 for block in blocks[:-1])


def test_a_block_never_begins_or_ends_within_a_character(qwen_tokenizer):
    one = encoder(qwen_tokenizer, 9)
    for text in ("👨‍👩‍👧𠮷野家🀄" * 20, "🙂x" * 40):
        for block in one.blocks(Document(text, "a:1")):
            assert "\ufffd" not in qwen_tokenizer.decode(block.input_ids[: context(block)])
            assert "\ufffd" not in qwen_tokenizer.decode(block.input_ids[context(block) :])


def test_the_end_of_a_document_is_trained_though_it_is_the_padding_token(qwen_tokenizer):
    blocks = encoder(qwen_tokenizer).blocks(Document("好。", "a:1"))
    end = qwen_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert qwen_tokenizer.pad_token_id == blocks[0].input_ids[-1] == end
    ids = [np.array(blocks[0].input_ids), np.arange(9)]
    batch = collate([(one, np.array([[1, len(one)]])) for one in ids], qwen_tokenizer.pad_token_id)
    assert batch["targets"].tolist() == [*blocks[0].input_ids[1:], *range(1, 9)]


def test_of_a_long_text_each_block_is_a_row_and_of_a_short_one_all_are(qwen_tokenizer):
    one = encoder(qwen_tokenizer, 512)
    paragraphs = [f"第{n}天，雨还没有停，他在屋里读书。\n\n" for n in range(2000)]
    short, long = "".join(paragraphs[:200]), "".join(paragraphs)
    assert len({block.hash for block in one.blocks(Document(short, "a:1"))}) == 1
    blocks = one.blocks(Document(long, "a:1"))
    assert len({block.hash for block in blocks}) == len(blocks) > 20
    # What is written after it moves none of them but the last.
    more = one.blocks(Document(long + "终于晴了。", "a:1"))
    assert [block.hash for block in more[: len(blocks) - 1]] == [block.hash for block in blocks[:-1]]


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        ({"text": ""}, "empty field", "'text' is empty"),
        ({"text": 3}, "wrong type", "of type int"),
        ({"text": "a", "images": ["x.png"]}, "media", "pictures"),
        ({"text": "a", "loss_share": 0.5}, "bad weight", "loss_share"),
    ],
)
def test_a_text_that_cannot_be_trained_is_a_fault(row, kind, said):
    with pytest.raises(RowError, match=said) as caught:
        read_text(row, "a:1")
    assert caught.value.kind == kind


def test_a_row_is_raw_text_only_where_it_is_nothing_else():
    assert read_text({"text": "a", "id": 3, "title": "t"}, "a:1").unread == ("id", "title")
    assert read_text({"Text": "a"}, "a:1").text == read_text({"body": "a"}, "a:1", {"text": "body"}).text == "a"
    assert read_text({"text": "a", "output": "", "instruction": None}, "a:1").text == "a"
    for other in ({"output": "b"}, {"messages": [{}]}, {"train": False}, {"system": "s"}):
        assert read_text({"text": "a", **other}, "a:1") is None


def test_control_tokens_in_a_text_are_refused_by_their_line_or_escaped(qwen_tokenizer):
    text = "一。\n二<|endoftext|>。\n"
    with pytest.raises(RowError, match="end of a text is marked by itself") as caught:
        encoder(qwen_tokenizer).blocks(Document(text, "n.txt:10", Passage(text, 10)))
    assert caught.value.source == "n.txt:11"
    (block,) = encoder(qwen_tokenizer, control_tokens="escape").blocks(Document(text, "a:1"))
    assert block.note == "control tokens escaped" and block.input_ids.count(block.input_ids[-1]) == 1


def test_half_of_a_surrogate_pair_is_a_fault_of_the_row(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d"}\n{"text": "ok"}\n')
    report = read_report(prepare(task(path), tokenizer, tmp_path / "cache"))
    assert report.faults == {"lone surrogate": 1} and report.examples_of == {"raw text": 1}


def task(*paths, **options):
    return Task([Source(str(path)) for path in paths], {"max_length": 64, **options}, {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("第一章　雨夜，他说：你好。".encode("gb18030"), "not UTF-8 at byte 0, likely gb18030; .* iconv -f gb18030"),
        ("第一章　他說：你們好，這是我的。".encode("big5"), "likely big5; .* iconv -f big5 -t utf-8"),
        ("第一章\n他说。\n".encode("utf-16"), "likely utf-16"),
        ("好。\n".encode() * 9 + "你好，他在这里。".encode("gb18030"), "not UTF-8 at byte 6[3-9], likely gb18030"),
        (b"\x7fELF\x02\x01\x00\x00" + bytes(range(256)) * 8, "is not text"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(range(1, 256)) * 8, "is not text"),
    ],
)
def test_a_file_that_is_not_utf_8_text_is_one_line_with_the_remedy(content, said, tmp_path):
    path = tmp_path / "novel.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \n\r\n\t"])
def test_an_empty_text_is_named(content, tokenizer, tmp_path):
    path = tmp_path / "novel.txt"
    path.write_bytes(content)
    report = read_report(prepare(task(path), tokenizer, tmp_path / "cache"))
    told = [(one.source, one.kind, one.message) for one in report.first]
    assert told == [(f"{path}:1", "empty file", "holds no text.")]


def test_folders_and_globs_of_texts_are_taken_but_not_what_is_about_them(tmp_path):
    for name in ("1.txt", "2.TXT", "notes.md", "README.txt", "LICENSE.txt", "a.pdf"):
        (tmp_path / name).write_text("text")
    (tmp_path / "3.txt.gz").write_bytes(gzip.compress("好".encode()))
    names = [path.name for path in expand(Source(str(tmp_path)))]
    assert names == ["1.txt", "2.TXT", "3.txt.gz"]
    assert [path.name for path in expand(Source(str(tmp_path / "*.md")))] == ["notes.md"]
    found = [row.content.text for path in expand(Source(str(tmp_path))) for row in read_rows(path)]
    assert found == ["text", "text", "好"]
    with pytest.raises(DataError, match=r"a\.pdf: \.pdf is not read; save its text as \.txt"):
        expand(Source(str(tmp_path / "a.pdf")))


@pytest.mark.parametrize(
    ("text", "count"), [('{"instruction": "a", "output": "b"}\n', 1), ("[第一章]\n雨。\n", 0), ("{他}\n", 0)]
)
def test_a_txt_that_holds_rows_is_read_as_rows(text, count, tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    report = read_report(prepare(task(path), tokenizer, tmp_path / "cache"))
    assert report.formats == ({"alpaca": 1} if count else {"text": 1})


def test_texts_and_instructions_stand_in_one_file(rows, qwen_tokenizer, tmp_path):
    import json

    qwen_tokenizer.chat_template = template("qwen2_5")
    mixed = [rows[0], {"text": "很久以前，有一座山。" * 40}, rows[1], {"text": "短。"}]
    path, novel = tmp_path / "a.jsonl", tmp_path / "novel.txt"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mixed), encoding="utf-8")
    novel.write_text("第一行。\n\n" * 400, encoding="utf-8")
    both = task(path, novel)
    folder = prepare(both, qwen_tokenizer, tmp_path / "cache")
    report, found = read_report(folder), Rows(folder)
    assert report.formats == {"alpaca": 2, "text": 3} and report.rows == 5 and not report.expanded()
    blocks = found.of_kind("raw text")
    assert report.taken_of == {"conversation": 2, "raw text": 3} and report.examples_of["raw text"] == blocks.sum()
    assert report.examples_of["conversation"] == 2 and len(found.that_end()) == 2 == len(found) - blocks.sum()
    assert found.place(0)[0].endswith("a.jsonl:1") and found.place(len(found) - 1)[0].partition("novel.txt:")[2] != "1"
    before = cache_key(both, qwen_tokenizer)
    novel.write_text("第一行。\n\n" * 401, encoding="utf-8")
    assert cache_key(both, qwen_tokenizer) != before
