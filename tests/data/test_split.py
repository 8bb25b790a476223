"""``qwen-lit data split``: a novel to rows of which each goes on where the one before ends."""

import json
import random
import re

import pytest

from qwen_lit.cli import main
from qwen_lit.data.split import chapters, rows_of


def novel(seed, chinese=True):
    draw = random.Random(seed)
    said = (
        ["雨下了一夜。", "“你是谁？”他问。", "没有人回答……", "街上空无一人，只有风。"]
        if chinese
        else ["It rained. ", "“Who are you?” he asked. ", "No one answered. "]
    )
    text = "书名\n\n"
    for number in range(1, draw.randint(3, 9)):
        text += f"第{number}章　雨夜\n\n" if chinese else f"Chapter {number}: Rain\n\n"
        for _ in range(draw.randint(1, 30)):
            text += "".join(draw.choices(said, k=draw.randint(1, 40))) + draw.choice(["\n", "\n\n", "\r\n"])
    return text


def plain(text):
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("apart", [True, False])
def test_every_passage_is_an_answer_but_the_first_of_a_chapter_and_none_is_lost(seed, apart):
    text = novel(seed, chinese=seed % 2 == 0)
    rows = rows_of(text, 300, 200, None, apart)
    found, left = "", plain(text)
    for row in rows:
        before, after = plain(row["input"]), plain(row["output"])
        if not found.endswith(before):
            # A new chapter: all that has not been an answer yet precedes its first one.
            assert left.startswith(before)
            found, left = found + before, left[len(before) :]
        assert before and left.startswith(after)
        found, left = found + after, left[len(after) :]
    assert not left
    assert max(len(row["input"]) for row in rows) <= 301
    if apart:
        heading = re.compile(r"第\d章|Chapter \d")
        assert not any(heading.search(row["output"]) for row in rows if len(row["output"]) <= 200)


def test_chapters_are_told_by_their_headings_alone():
    text = "题记\n第一章 雨夜\n他说第二章还没写。\n  第十二回　大雪\n雪。\nChapter 3\nx\n# 第四章\ny\n楔子\nz\n"
    assert "".join(chapters(text)) == text
    first = [one.strip().splitlines()[0] for one in chapters(text)]
    assert first == ["题记", "第十二回　大雪", "Chapter 3", "# 第四章", "楔子"]


def test_the_command_writes_rows_and_names_them(tmp_path, capsys):
    path = tmp_path / "novel.txt"
    path.write_text(novel(0), encoding="utf-8")
    assert main(["data", "split", str(path)]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "novel.jsonl").read_text("utf-8").splitlines()]
    assert f"novel.jsonl: {len(rows)} rows of " in out and rows[0]["instruction"] == "续写下面的小说片段。"
    assert max(len(row["input"]) + len(row["output"]) for row in rows) <= 2100
    assert main(["data", "split", str(path)]) == 2
    assert "novel.jsonl is there already; give another --output" in capsys.readouterr().err
    other = ["--output", str(tmp_path / "b.jsonl"), "--instruction", "Go on.", "--passage", "100", "--length", "50"]
    assert main(["data", "split", str(path), *other]) == 0
    assert json.loads((tmp_path / "b.jsonl").read_text("utf-8").splitlines()[0])["instruction"] == "Go on."


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", "雨夜，他说你好。".encode("gb18030"), "likely gb18030"),
        ("a.txt", "雨夜".encode(), "a single sentence, which nothing follows"),
        ("a.txt", b'{"instruction": "a", "output": "b"}\n', "holds rows already"),
        ("a.jsonl", b"{}", "is no text file"),
        ("none.txt", None, "no such file"),
    ],
)
def test_what_cannot_be_split_is_one_line(name, content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["data", "split", str(tmp_path / name), "--output", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("words", [[], ["split"], ["join"], ["split", "a.txt", "--passage", "3"]])
def test_wrong_usage_is_2(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["data", *words])
