"""Layouts of known datasets are read as they are, marks of other trainers are honoured, and nothing is passed over."""

import json

import pytest

from qwen_lit.cli import main
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.faults import RowError
from qwen_lit.data.records import parse_line, parse_row
from qwen_lit.data.settings import DataSettings

S, U = {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}
A, B = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}
THOUGHT = {**A, "reasoning_content": "T"}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLING = {"role": "assistant", "content": "", "tool_calls": [call("f", x=1)]}
RESULT = {"role": "tool", "content": "1"}
TOOL = {"type": "function", "function": {"name": "f"}}


def sharegpt(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


LAYOUTS = {
    "dolly": (
        {"instruction": "I", "context": "C", "response": "A", "category": "x"},
        [{"role": "user", "content": "I\nC"}, A],
        ["category"],
    ),
    "stanford alpaca": ({"instruction": "Q", "input": "", "output": "A", "text": "Q ### Output: A"}, [U, A], []),
    "python code": (
        {"instruction": "I", "input": "N", "output": "A", "prompt": "Below\nI\nN\n### Output:\nA"},
        [{"role": "user", "content": "I\nN"}, A],
        [],
    ),
    "open orca": ({"id": "1", "system_prompt": "S", "question": "Q", "response": "A"}, [S, U, A], ["id"]),
    "open hermes": (
        {**sharegpt(("human", "Q"), ("gpt", "A")), "system_prompt": "S", "source": "x"},
        [S, U, A],
        ["source"],
    ),
    "firefly": ({"kind": "NLI", "input": "Q", "target": "A"}, [U, A], ["kind"]),
    "swift": ({"query": "Q", "response": "A", "history": [["Q", "B"]], "system": "S"}, [S, U, B, U, A], []),
    "prompt and response": ({"prompt": "Q", "response": "A"}, [U, A], []),
    "questions": ({"question": "Q", "answer": "A"}, [U, A], []),
    "instruction and answer": ({"instruction": "Q", "answer": "A"}, [U, A], []),
    "maths": ({"problem": "Q", "solution": "so 42", "answer": "42"}, [U, {**A, "content": "so 42"}], []),
    "medical": ({"Question": "Q", "Complex_CoT": "T", "Response": "A"}, [U, THOUGHT], []),
    "thought beside the output": ({"instruction": "Q", "output": "A", "reasoning": "T"}, [U, THOUGHT], []),
    "thought beside the completion": ({"prompt": "Q", "completion": "A", "reasoning_content": "T"}, [U, THOUGHT], []),
    "exchanges": (
        {"conversation": [{"human": "Q", "assistant": "A"}, {"human": "Q", "assistant": "B"}]},
        [U, A, U, B],
        [],
    ),
    "xtuner": ({"conversation": [{"system": "S", "input": "Q", "output": "A"}]}, [S, U, A], []),
    "lima": ({"conversations": ["Q", "A", "Q", "B"]}, [U, A, U, B], []),
    "raw ultrachat": ({"id": "1", "data": ["Q", "A"]}, [U, A], ["id"]),
    "ultrachat": ({"prompt": "Q", "prompt_id": "1", "messages": [U, A]}, [U, A], ["prompt_id"]),
    "xlam": (
        {"query": "Q", "answers": '[{"name": "f", "arguments": {"x": 1}}]', "tools": '[{"name": "f"}]'},
        [U, CALLING],
        [],
    ),
    "a tree of one path": (
        {"prompt": {"role": "prompter", "text": "Q", "replies": [{"role": "assistant", "text": "A"}]}},
        [U, A],
        [],
    ),
    "names of roles": (sharegpt(("USER", "Q"), ("bot", "A"), ("Prompter", "Q"), ("Model", "B")), [U, A, U, B], []),
    "swift's agents": (
        {
            "messages": [
                U,
                {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
                {"role": "tool_response", "content": "1"},
                A,
            ]
        },
        [U, CALLING, RESULT, A],
        [],
    ),
    "thought and call": (
        sharegpt(
            ("human", "Q"),
            ("function_call", '<think>\nT\n</think>\n\n{"name": "f", "arguments": {"x": 1}}'),
            ("observation", "1"),
            ("gpt", "A"),
        ),
        [U, {**CALLING, "reasoning_content": "T"}, RESULT, A],
        [],
    ),
    "tagged calls": (
        sharegpt(
            ("human", "Q"),
            ("function_call", 'B<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'),
            ("observation", "1"),
            ("gpt", "A"),
        ),
        [U, {**CALLING, "content": "B"}, RESULT, A],
        [],
    ),
    "thinking": ({"messages": [U, {**A, "thinking": "T"}]}, [U, THOUGHT], []),
    "one thought in two places": (
        {"messages": [U, {"role": "assistant", "content": "<think>\nT\n</think>\n\nA", "reasoning_content": "T"}]},
        [U, THOUGHT],
        [],
    ),
    "equal conversations": ({"messages": [U, A], **sharegpt(("human", "Q"), ("gpt", "A"))}, [U, A], []),
    "columns that are not known": (
        {"instruction": "Q", "output": "A", "remark": "R", "sure": True, "none": ""},
        [U, A],
        ["remark", "sure"],
    ),
    "keys that are not known": (
        {"messages": [{**U, "name": "x"}, {**A, "mood": "good"}]},
        [U, A],
        ["messages.mood", "messages.name"],
    ),
    "a user's thought": ({"messages": [{**U, "reasoning": "T"}, A]}, [U, A], ["messages.reasoning"]),
    "a call's own keys": (
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}, "why": "R"}}],
                },
                RESULT,
                A,
            ]
        },
        [U, CALLING, RESULT, A],
        ["tool_calls.why"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_known_layout_is_read_as_it_is(name):
    row, messages, unread = LAYOUTS[name]
    found = parse_row(json.loads(json.dumps(row)), "a:1")
    assert found.messages == messages
    assert found.train == [message["role"] == "assistant" for message in messages]
    assert list(found.unread) == unread


FOUR = [U, A, U, B]


@pytest.mark.parametrize(
    ("row", "train"),
    [
        ({"messages": [U, {**A, "loss": False}, U, B]}, [0, 1]),
        ({"messages": [U, {**A, "training": False}, U, B]}, [0, 1]),
        ({"messages": [U, {**A, "loss_scale": 0.0}, U, B]}, [0, 1]),
        ({"messages": [U, {**A, "loss_mask": 0}, U, {**B, "trainable": True}]}, [0, 1]),
        ({"messages": FOUR, "loss_mask": [0, 0, 0, 1]}, [0, 1]),
        ({"messages": FOUR, "loss": [True, False]}, [1, 0]),
        ({"messages": FOUR, "train": True, "weight": 1.0}, [1, 1]),
        ({"instruction": "Q", "output": "A", "weight": 1}, [1]),
    ],
)
def test_what_a_row_says_of_its_own_training_is_done(row, train):
    found = parse_row(row, "a:1")
    assert [found.train[at] for at, one in enumerate(found.messages) if one["role"] == "assistant"] == train
    assert not found.unread


def test_ranges_of_characters_are_trained_as_their_trainer_does():
    ranges = ((6, 8, False), (0, 5, True))
    detail = [{"begin_offset": begin, "end_offset": end, "train": train} for begin, end, train in ranges]
    row = {"messages": [U, {**A, "content": "Hello bad end", "train_detail": detail}]}
    parts = parse_row(row, "a:1").messages[1]["parts"]
    assert [(part["text"], part["train"]) for part in parts] == [("Hello ", True), ("bad", False), (" end", False)]


@pytest.mark.parametrize(
    ("row", "tools"),
    [
        ({"messages": [{"role": "system", "content": "", "tools": [{"name": "f"}]}, U, A]}, [TOOL]),
        ({"messages": [{**S, "tools": '[{"name": "f"}]'}, U, A]}, [TOOL]),
        ({"messages": [{**U, "functions": [{"name": "f"}]}, A], "tools": [TOOL]}, [TOOL]),
        ({"messages": [U, A], "tools": ['{"name": "f"}']}, [TOOL]),
        ({"messages": [U, A], "tools": {"name": "f"}}, [TOOL]),
    ],
)
def test_tools_are_found_wherever_they_stand(row, tools):
    found = parse_row(row, "a:1")
    assert found.tools == tools and not found.unread


@pytest.mark.parametrize(
    ("given", "content"), [({"a": "好"}, '{"a": "好"}'), ([1, 2], "[1, 2]"), (3, "3"), (False, "false")]
)
def test_a_tools_result_that_is_no_text_is_written_as_json(given, content):
    found = parse_row({"messages": [U, CALLING, {"role": "tool", "content": given}, A]}, "a:1")
    assert found.messages[2]["content"] == content and found.notes == ("tool results written as JSON text",)


def test_tags_around_results_are_left_to_the_template():
    tagged = {"role": "tool", "content": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"}
    found = parse_row({"messages": [U, CALLING, tagged, A]}, "a:1")
    assert [one["content"] for one in found.messages[2:4]] == ["1", "2"] and "<tool_response>" in found.notes[0]


def test_a_null_argument_is_told():
    calling = {**CALLING, "tool_calls": [call("f", x=None)]}
    found = parse_row({"messages": [U, calling, RESULT, A]}, "a:1")
    assert found.notes == ("null among the arguments of a tool call",)


GREETING = {"role": "assistant", "content": "Hello"}
ODD = {
    "two questions": ([U, U, A], [{"role": "user", "content": "Q\n\nQ"}, A], [False, True]),
    "two answers": ([U, A, B], [U, {"role": "assistant", "content": "A\n\nB"}], [False, True]),
    "a greeting": ([GREETING, U, A], [GREETING, U, A], [False, False, True]),
    "a greeting after a system prompt": ([S, GREETING, U, A], [S, GREETING, U, A], [False, False, False, True]),
    "a system prompt in the middle": ([U, A, S, U, B], [U, A, S, U, B], [False, True, False, False, True]),
    "two system prompts": ([S, S, U, A], [{"role": "system", "content": "S\n\nS"}, U, A], [False, False, True]),
    "calls in two turns": (
        [U, CALLING, CALLING, RESULT, RESULT, A],
        [U, {**CALLING, "tool_calls": [call("f", x=1)] * 2}, RESULT, RESULT, A],
        [False, True, False, False, True],
    ),
    "text, then a call": (
        [U, B, CALLING, RESULT, A],
        [U, {**CALLING, "content": "B"}, RESULT, A],
        [False, True, False, True],
    ),
    "a question after a result": (
        [U, CALLING, RESULT, U, A],
        [U, CALLING, RESULT, U, A],
        [False, True, False, False, True],
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_turns_are_refused_with_the_way_on_or_merged(name):
    given, messages, train = ODD[name]
    row = json.dumps({"messages": given}).encode()
    with pytest.raises(RowError, match="data.odd_turns: merge takes it") as caught:
        parse_row(parse_line(row), "a:1")
    found = parse_row(parse_line(row), "a:1", odd_turns="merge")
    assert found.messages == messages and found.train == train
    assert found.notes and found.notes[0] in str(caught.value)


def test_of_two_answers_the_one_that_is_not_trained_stays_so():
    found = parse_row({"messages": [U, {**A, "train": False}, B]}, "a:1", odd_turns="merge")
    parts = [(part["text"], part["train"]) for part in found.messages[1]["parts"]]
    assert found.messages[1]["content"] == "A\n\nB" and parts == [("A\n\n", False), ("B", True)]


@pytest.mark.parametrize("turns", [[U, CALLING, A], [RESULT, A], [A], [U, A, THOUGHT]])
def test_what_merging_would_move_stays_refused(turns):
    for odd_turns in ("error", "merge"):
        with pytest.raises(RowError) as caught:
            parse_row({"messages": json.loads(json.dumps(turns))}, "a:1", odd_turns=odd_turns)
        assert "odd_turns" not in str(caught.value)


def test_an_empty_system_prompt_is_none():
    found = parse_row({"messages": [{"role": "system", "content": ""}, U, A]}, "a:1")
    assert found.messages == [U, A] and found.notes == ("empty system prompt left out",)


def test_a_column_in_whose_place_another_is_read_is_told():
    row = {"instruction": "be kind", "question": "Q", "answer": "A"}
    found = parse_row(row, "a:1", {"instruction": "question", "output": "answer"})
    assert found.messages == [U, A] and found.unread == ("instruction",)


@pytest.fixture
def inspect(model_folder, tmp_path, capsys):
    def run(name, content, *options):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
        code = main(
            [
                "inspect",
                "--config",
                "configs/qwen7b.yaml",
                "--model.model_name_or_path",
                str(model_folder),
                "--data.dataset_path",
                str(path),
                "--trainer.accelerator",
                "cpu",
                *options,
            ]
        )
        out, error = capsys.readouterr()
        return code, out, error

    return run


def test_inspect_says_that_nothing_is_lost_only_where_nothing_is(inspect):
    dolly = {"instruction": "I", "context": "C", "response": "A", "category": "x"}
    code, out, _ = inspect("a.jsonl", [dolly])
    assert code == 0 and "⟦A<|im_end|>⟧" in out and "I\nC" in out
    assert "not read        category (1 row)" in out and out.count("verdict         nothing is lost\n") == 1
    code, out, _ = inspect("a.jsonl", [{**dolly, "passage": "lost"}, {"messages": [U, A, U]}])
    assert code == 0 and "passage (1 row)" in out and "turns after the last answer left out 1" in out
    assert "verdict         no row is lost, but look at: 1 row: turns after the last answer left out; not read" in out
    code, out, _ = inspect("a.jsonl", [dolly, {"messages": [U, {**A, "loss": False}, U, B]}, {"story": "A novel."}])
    assert code == 1 and "⟦B<|im_end|>⟧" in out and "⟦A<|im_end|>⟧" in out and out.count("⟦") == 2
    assert "1 row faulty: raw text" in out and "write data.fields: {text: story}" in out


def test_odd_turns_are_merged_from_the_command_line_and_counted(inspect):
    rows = [{"messages": [GREETING, U, A]}, {"messages": [U, A, B]}, {"messages": [U, A]}]
    code, out, _ = inspect("a.jsonl", rows)
    assert code == 1 and "wrong order 2" in out and "data.odd_turns: merge takes it" in out
    code, out, _ = inspect("a.jsonl", rows, "--data.odd_turns", "merge")
    assert code == 0 and "⟦A\n\nB<|im_end|>⟧" in out and "⟦Hello" not in out and "assistant\nHello" in out
    assert "greeting before the first question kept, not trained 1, answers in a row joined 1" in out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "instruction;output\na;b\n", "its cells are separated by semicolons, not by commas"),
        ("novel.docx", "PK", "save its text as .txt in UTF-8"),
        ("a.arrow", "ARROW", "load_dataset('arrow'"),
        ("a.xlsx", "PK", "save the sheet as 'CSV UTF-8'"),
        ("dataset_info.json", "{}", "describes a dataset and holds no rows"),
    ],
)
def test_files_that_hold_no_rows_are_refused_with_the_way_to_make_rows(inspect, name, content, said):
    code, _, error = inspect(name, content)
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1


def test_folders_and_names_of_other_tools_are_named(inspect, tmp_path, caplog):
    for name in ("state.json", "dataset_info.json", "data.arrow"):
        (tmp_path / name).write_text("{}")
    code, _, error = inspect("a.jsonl", [], "--data.dataset_path", str(tmp_path))
    assert code == 2 and f"load_from_disk('{tmp_path}')" in error
    (tmp_path / "state.json").unlink()
    code, out, error = inspect("a.jsonl", [{"question": "Q", "answer": "A"}], "--data.dataset_path", str(tmp_path))
    assert code == 0 and "1 read, 1 examples" in out and "not read: data.arrow" in caplog.text
    code, _, error = inspect("a.jsonl", [], "--data.dataset_path", "someone/teas")
    assert code == 2 and "no such dataset: someone/teas; it is no file or folder here" in error
    assert "HF_HUB_OFFLINE is set" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [("{outputs: b}", "did you mean output"), ("{instruction: a, output: a}", "'a' is given for two names")],
)
def test_fields_that_nothing_reads_are_refused(inspect, fields, said):
    code, _, error = inspect("a.jsonl", [{"a": "Q", "b": "A"}], "--data.fields", fields)
    assert code == 2 and said in error


def test_a_column_of_fields_that_no_row_has_is_told(inspect):
    rows = [{"question": "Q", "answer": "A"}, {"question": "Q", "answer": "B", "rule": "S"}]
    code, out, _ = inspect("a.jsonl", rows, "--data.fields", "{system: rule}")
    assert code == 0 and "nothing is lost" in out
    code, out, _ = inspect("a.jsonl", rows[:1], "--data.fields", "{system: rul}")
    assert code == 0 and "look at: no row has what data.fields names: rul" in out


def test_a_large_share_of_dropped_rows_is_told(tokenizer, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    rows = [{"question": "Q", "answer": "A" * (1 if n % 5 == 0 else 900)} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = QwenDataModule(DataSettings([str(path)], max_length=64, cache_dir=str(tmp_path / "cache")), tokenizer)
    data.setup()
    assert "not all is trained: 8 of 10 rows (80%) dropped: question and answer do not fit into" in caplog.text


def test_the_fields_that_an_error_names_can_be_written_as_they_stand(inspect):
    rows = [{"user_question": "Q", "bot_answer": "A"}]
    code, out, _ = inspect("a.jsonl", rows)
    fields = out.split("write data.fields: ")[1].split("}")[0] + "}"
    assert code == 1 and fields == "{instruction: user_question, output: bot_answer}"
    assert inspect("a.jsonl", rows, "--data.fields", fields)[0] == 0


def test_a_key_that_stands_twice_in_an_array_is_named_by_its_line(inspect):
    good, bad = '{"question": "Q", "answer": "A"}', '{"question": "Q", "answer": "A", "answer": "B"}'
    code, out, _ = inspect("a.json", f"[{good},\n{bad}]")
    assert code == 1 and "a.json:2: has the key 'answer' twice" in out and "2 read, 1 examples" in out


def test_more_held_out_than_there_are_rows_says_what_to_write(inspect):
    code, out, _ = inspect("a.jsonl", [{"question": "Q", "answer": "A"}], "--data.val_size", "5")
    assert code == 1 and "there are 1 distinct rows; give a smaller count, or a share such as 0.1" in out
