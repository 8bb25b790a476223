"""Every format is told apart, and every fault is named."""

from pathlib import Path

import pytest

from qwen_lit.data.faults import RowError
from qwen_lit.data.prepare import Task, prepare, read_report
from qwen_lit.data.records import parse_line, parse_row
from qwen_lit.data.sources import Source

HERE = Path(__file__).parent
ASKED = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Q", "output": "A"}, ASKED),
        ({"instruction": "Q", "input": "", "output": "A", "history": []}, ASKED),
        ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\nI"}, ASKED[1]]),
        (
            {"instruction": "Q", "output": "A", "system": "S", "history": [["q", "a"]]},
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
                *ASKED,
            ],
        ),
        ({"messages": ASKED}, ASKED),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ASKED),
        ({"prompt": "Q", "completion": "A"}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
        (
            {
                "messages": [
                    ASKED[0],
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
                    {"role": "tool", "content": "1"},
                    ASKED[1],
                ]
            },
            [
                ASKED[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                ASKED[1],
            ],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "A"},
                ]
            },
            [
                ASKED[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                ASKED[1],
            ],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "reasoning", "value": "R"},
                            {"type": "text", "value": "A"},
                            {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                        ],
                    },
                ]
            },
            [ASKED[0], {"role": "assistant", "content": "A", "tool_calls": [CALL], "reasoning_content": "R"}],
        ),
    ],
)
def test_each_format_becomes_the_same_conversation(row, messages):
    assert parse_row(row, "a:1").messages == messages


def test_turns_marked_as_not_trained_are_not(rows):
    turns = [*ASKED, ASKED[0], {**ASKED[1], "train": False}, ASKED[0], {**ASKED[1], "weight": 0}]
    assert parse_row({"messages": turns}, "a:1").train == [False, True, False, False, False, False]
    assert parse_row({"messages": [*turns, ASKED[0], {**ASKED[1], "loss_weight": 1.0}]}, "a:1").train[-1]


def test_fields_of_other_names_are_mapped():
    fields = {"instruction": "question", "output": "answer"}
    assert parse_row({"question": "Q", "answer": "A"}, "a:1", fields).messages == ASKED
    fields = {"messages": "dialog", "role": "who", "content": "says"}
    row = {"dialog": [{"who": "user", "says": "Q"}, {"who": "assistant", "says": "A"}]}
    assert parse_row(row, "a:1", fields).messages == ASKED


def test_an_encoding_is_guessed():
    with pytest.raises(RowError, match="byte 17, likely gb18030"):
        parse_line('{"instruction": "你好", "output": "您好"}'.encode("gb18030"))


def test_every_row_of_the_hostile_corpus_gets_its_own_message(qwen_tokenizer, tmp_path):
    qwen_tokenizer.chat_template = (HERE.parent / "data" / "chatml.jinja").read_text()
    path = HERE / "hostile.jsonl"
    folder = prepare(Task([Source(str(path))], {"max_length": 512}, {}), qwen_tokenizer, tmp_path)
    report = read_report(folder)
    assert report.rows == sum(report.faults.values()) >= 60
    assert report.examples == 0
    found = (folder / "rows.log").read_text(encoding="utf-8").split("\n")[:-1]
    wanted = (HERE / "hostile.expected.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(found) == len(wanted) == report.rows
    for line, expected in zip(found, wanted, strict=True):
        number, kind, message = expected.split("\t")
        assert line == f"{path}:{number}: {kind}: {message}"


@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ({}, True),
        ({"train": True}, True),
        ({"train": "false"}, False),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"loss_weight": 0.0}, False),
        ({"weight": None}, True),
        ({"train": 1, "weight": 0}, False),
    ],
)
def test_a_message_is_trained_or_not_by_any_of_its_words(given, trained):
    row = {"messages": [*ASKED, ASKED[0], {**ASKED[1], **given}]}
    assert parse_row(row, "a:1").train == [False, True, False, trained]


@pytest.mark.parametrize("given", [{"weight": 0.5}, {"train": "no"}, {"loss_weight": 2}, {"weight": "high"}])
def test_a_weight_that_is_neither_0_nor_1_is_refused(given):
    for row in (
        {"messages": [ASKED[0], {**ASKED[1], **given}]},
        {"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "text", "text": "A", **given}]}]},
    ):
        with pytest.raises(RowError, match="is trained .1, true. or not .0, false.") as caught:
            parse_row(row, "a:1")
        assert caught.value.kind == "bad weight"


def test_a_message_of_only_untrained_parts_is_untrained():
    parts = [{"type": "text", "text": "A", "loss_weight": 0}, {"type": "text", "text": "B", "loss_weight": 0}]
    row = {"messages": [*ASKED, ASKED[0], {"role": "assistant", "content": parts}]}
    assert parse_row(row, "a:1").train == [False, True, False, False]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Q", "output": "A", "prompt": None, "messages": None}, ASKED),
        ({"instruction": "Q", "input": " ", "output": "A"}, ASKED),
        ({"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, ASKED),
        ({"messages": [{"from": None, "role": "user", "content": None, "value": "Q"}, ASKED[1]]}, ASKED),
        ({"prompt": ASKED[:1], "completion": "A"}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1]}, ASKED),
        ({"messages": [ASKED[0], {**ASKED[1], "reasoning": "R"}]}, [ASKED[0], {**ASKED[1], "reasoning_content": "R"}]),
        (
            {"messages": [ASKED[0], {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}]},
            [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": CALL["function"]}]},
            [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
    ],
)
def test_spellings_found_in_the_wild_are_taken(row, messages):
    assert parse_row(row, "a:1").messages == messages


@pytest.mark.parametrize("arguments", ["null", " ", None])
def test_a_call_without_arguments_has_none(arguments):
    call = {"name": "f", "arguments": arguments}
    found = parse_row({"messages": [ASKED[0], {"role": "assistant", "tool_calls": [call]}]}, "a:1")
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_of_a_prompt_of_several_turns_the_completion_alone_is_trained():
    found = parse_row({"prompt": [*ASKED, ASKED[0]], "completion": "B"}, "a:1")
    assert found.train == [False, False, False, True] and found.messages[-1]["content"] == "B"


def test_older_functions_are_tools():
    row = {"messages": ASKED, "functions": [{"name": "f", "parameters": {}}]}
    assert parse_row(row, "a:1").tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"system": "S", "messages": [{"role": "system", "content": "T"}, *ASKED]}, "two system prompts"),
        ({"prompt": ASKED[:1], "completion": 3}, "wrong type"),
        ({"messages": ASKED, "tools": "[" * 100_000}, "bad tools"),
        ({"messages": "[" * 100_000}, "wrong type"),
        ({"messages": [ASKED[0], {"role": "assistant", "tool_calls": "[" * 100_000}]}, "bad tool call"),
        (
            {
                "messages": [
                    ASKED[0],
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_call", "value": CALL}, {"type": "text", "text": "after"}],
                    },
                ]
            },
            "bad part",
        ),
    ],
)
def test_what_would_be_lost_or_moved_is_refused(row, kind):
    with pytest.raises(RowError) as caught:
        parse_row(row, "a:1")
    assert caught.value.kind == kind
