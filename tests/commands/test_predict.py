"""``predict`` reads as training does: any file, any layout, with answers or without."""

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from peft import PeftModel

from qwen_lit.cli import main
from qwen_lit.commands.predict import questions
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.settings import DataSettings
from qwen_lit.errors import UserError

ASKED = [{"role": "user", "content": "What is 1 plus 2?"}]
ANSWER = {"role": "assistant", "content": "It is 3."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def read(tokenizer, dataset):
    def asked(path, **options):
        return list(questions(path, QwenDataModule(DataSettings(str(dataset), **options), tokenizer)))

    return asked


def prompt(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows, separator):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


ROWS = [{"instruction": f"What is {n} plus 2?", "output": f"It is {n + 2}."} for n in range(3)]
FORMS = {
    "jsonl": ("a.jsonl", lines),
    "bom": ("a.jsonl", lambda rows: b"\xef\xbb\xbf" + lines(rows)),
    "gz": ("a.jsonl.gz", lambda rows: gzip.compress(lines(rows), mtime=0)),
    "zst": ("a.jsonl.zst", lambda rows: pyarrow.Codec("zstd").compress(lines(rows)).to_pybytes()),
    "array": ("a.json", lambda rows: json.dumps(rows, indent=1).encode()),
    "csv": ("a.csv", lambda rows: table(rows, ",")),
    "tsv": ("a.tsv", lambda rows: table(rows, "\t")),
    "parquet": ("a.parquet", None),
}


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file_gives_the_same_prompts_with_answers_or_without(
    form, answered, read, tokenizer, tmp_path
):
    rows = [row if answered else {"instruction": row["instruction"]} for row in ROWS]
    name, written = FORMS[form]
    if written:
        (tmp_path / name).write_bytes(written(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    wanted = [prompt(tokenizer, [{"role": "user", "content": row["instruction"]}]) for row in rows]
    assert read(tmp_path / name) == list(zip(rows, wanted, strict=True))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": [{"from": "human", "value": ASKED[0]["content"]}]}, ASKED),
        ({"conversations": [{"from": "human", "value": ASKED[0]["content"]}, {"from": "gpt", "value": "3"}]}, ASKED),
        ({"conversation": [{"human": ASKED[0]["content"]}]}, ASKED),
        ({"conversation": [{"human": "a", "assistant": "b"}, {"human": "c"}]}, "abc"),
        ({"messages": [*ASKED, {"role": "assistant", "content": ""}]}, ASKED),
        ({"messages": [*ASKED, ANSWER, *ASKED]}, [*ASKED, ANSWER, *ASKED]),
        ({"messages": [*ASKED, ANSWER, *ASKED, ANSWER]}, [*ASKED, ANSWER, *ASKED]),
        ({"messages": [SYSTEM, *ASKED]}, [SYSTEM, *ASKED]),
        ({"system": "Be brief.", "instruction": ASKED[0]["content"]}, [SYSTEM, *ASKED]),
        ({"prompt": ASKED, "completion": [ANSWER]}, ASKED),
        ({"prompt": ASKED}, ASKED),
        ({"question": ASKED[0]["content"], "answer": None}, ASKED),
        ({"query": ASKED[0]["content"], "response": " "}, ASKED),
        ({"problem": ASKED[0]["content"], "solution": "3", "answer": "3"}, ASKED),
        ({"instruction": "a", "history": [["b", "c"]]}, "bca"),
        ({"instruction": "What is", "input": "1 plus 2?"}, [{"role": "user", "content": "What is\n1 plus 2?"}]),
        ({"messages": [{**ASKED[0], "train": False}, {**ANSWER, "train": False}]}, ASKED),
    ],
    ids=lambda one: json.dumps(one)[:60] if isinstance(one, dict) else None,
)
def test_every_layout_asks_its_last_question(row, messages, read, tokenizer, tmp_path):
    if isinstance(messages, str):
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": said} for role, said in zip(roles, messages, strict=True)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([row]))
    ((kept, ids),) = read(path)
    assert kept == row and ids == prompt(tokenizer, messages)


def test_columns_are_mapped_and_turns_merged_as_for_training(read, tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("frage,antwort\nWhat is 1 plus 2?,\n", encoding="utf-8")
    ((row, ids),) = read(path, fields={"instruction": "frage", "output": "antwort"})
    assert row == {"frage": "What is 1 plus 2?"} and ids == prompt(tokenizer, ASKED)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"messages": [*ASKED, *ASKED]}]))
    with pytest.raises(UserError, match=r"a\.jsonl:1: message 1 \(user\) follows user"):
        read(path)
    ((_, ids),) = read(path, odd_turns="merge")
    joined = "\n\n".join([ASKED[0]["content"]] * 2)
    assert ids == prompt(tokenizer, [{"role": "user", "content": joined}])


def test_a_control_token_in_a_question_is_refused_or_escaped_as_in_training(read, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"instruction": "a<|im_end|>b"}]))
    with pytest.raises(UserError, match=r"a\.jsonl:1: has <\|im_end\|> inside a message"):
        read(path)
    ((row, ids),) = read(path, control_tokens="escape")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row == {"instruction": "a<|im_end|>b"} and ids.count(end) == prompt(tokenizer, ASKED).count(end)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"It was late.\n", r'a\.txt:1: is a text without questions; write .* as {"text": …}'),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "b"}]}', r"a\.jsonl:1: message 0 .*comes first"),
        ("a.jsonl", b'{"instruction": ""}', r"a\.jsonl:1: 'instruction' is empty"),
        ("a.jsonl", b'{"body": "a", "id": 1}', r"a\.jsonl:1: .*write data.fields"),
        ("a.jsonl", b'{"instruction": "a"}\nnonsense\n', r"a\.jsonl:2: is not JSON"),
        (
            "a.jsonl.gz",
            gzip.compress(lines(ROWS), mtime=0)[:40],
            r"source: .*a\.jsonl\.gz: cannot be read \(Truncated",
        ),
        ("a.parquet", b"PAR1", r"source: .*a\.parquet: is not Parquet"),
    ],
)
def test_what_asks_nothing_is_refused_with_its_place(name, content, said, read, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read(tmp_path / name)


def test_a_row_of_raw_text_is_continued(read, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": "What is"}]))
    assert read(path) == [({"text": "What is"}, tokenizer("What is")["input_ids"])]


def test_a_row_that_asks_nothing_is_told_before_the_model_is_loaded(arguments, tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\nWhat is 1 plus 1?,\n,b\n")
    assert main([*arguments, "--trainer.max_steps", "1", "--export.merge", "false"]) == 0
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *given: pytest.fail("the model is loaded"))
    asked = ["--source", str(path), "--target", str(tmp_path / "b.jsonl")]
    assert main(["predict", *arguments[1:], *asked]) == 2
    assert f"error: {path}:3: " in capsys.readouterr().err and not (tmp_path / "b.jsonl").exists()
