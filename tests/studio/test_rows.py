"""The audited rows, and one put right."""

import json

import pytest

from qwen_lit.errors import UserError
from qwen_lit.front import main
from qwen_lit.studio.card import Card, read
from qwen_lit.studio.folders import Folders
from qwen_lit.studio.plans import budgets, parts, read_plan
from qwen_lit.studio.rows import Audited, save_edited, source_line

ROWS = [
    {"instruction": "What is <b>1</b> plus 2?", "output": "It is 3."},
    {"instruction": "no answer"},
    {"instruction": "What is 2 plus 2?", "output": "It is 4. " * 9},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    return folder


@pytest.fixture(scope="module")
def audited(place, model_folder):
    options = {
        "model.model_name_or_path": model_folder,
        "data.dataset_path": place / "rows.jsonl",
        "trainer.accelerator": "cpu",
        "rows": 0,
        "json": place / "audit.jsonl",
    }
    # A faulty row is what an audit is for: 1 says that there is one.
    assert main(["inspect", *(f"--{key}={value}" for key, value in options.items())]) == 1
    return Audited.read(place / "audit.jsonl")


def test_inspect_writes_every_row_with_what_is_trained_of_it(audited):
    assert "1 row faulty" in audited.about["verdict"] and audited.about["train"] == 2
    first = audited.chosen("all", "")[0]
    assert first.text.count("<b>1</b>") == 1 and 0 < first.trained < first.tokens
    assert "".join(text for text, trained in first.pieces if trained) == "It is 3.<|im_end|>"


def test_rows_are_filtered_and_searched(audited):
    numbers = {name: [one.place.rpartition(":")[2] for one in audited.chosen(name, "")] for name in ("all", "longest")}
    assert numbers == {"all": ["1", "3"], "longest": ["3", "1"]}
    (faulty,) = audited.chosen("faulty", "")
    assert faulty.place.endswith("rows.jsonl:2") and "output" in faulty.note
    assert [one.place for one in audited.chosen("all", "IT IS 4")] == [audited.chosen("longest", "")[0].place]
    assert audited.chosen("masked", "") == audited.chosen("changed", "") == []


def test_a_row_is_put_right_in_a_new_file(place, audited):
    folders = Folders([str(place)])
    named = audited.chosen("faulty", "")[0].place
    source, number, line = source_line(folders, named)
    assert number == 2 and json.loads(line) == ROWS[1]
    path = save_edited(folders, named, json.dumps({**ROWS[1], "output": "here"}))
    assert path != source and [json.loads(one) for one in source.read_text().splitlines()] == ROWS
    assert json.loads(path.read_text().splitlines()[1])["output"] == "here"
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ("rows.jsonl:1", "{"),
        ("rows.jsonl:1", "[]"),
        ("rows.jsonl:9", "{}"),
        ("/etc/passwd:1", "{}"),
        ("rows.jsonl", "{}"),
    ],
)
def test_what_is_no_row_is_refused(place, named, text):
    with pytest.raises(UserError):
        save_edited(Folders([str(place)]), named, text)


def test_a_half_written_audit_is_none(tmp_path):
    (tmp_path / "x").write_text('{"verdict": "x"}\n{"pla')
    assert Audited.read(tmp_path / "x") is None and Audited.read(tmp_path / "y") is None


def test_the_parts_of_a_plan_fill_its_budget(place, model_folder, capsys):
    options = {
        "model.model_name_or_path": model_folder,
        "data.dataset_path": place / "rows.jsonl",
        "data.on_bad_row": "skip",
        "data.max_bad_share": 1,
        "trainer.accelerator": "cpu",
        "memory_budget": "4GiB",
        "json": "true",
        "explain": "true",
    }
    assert main(["plan", *(f"--{key}={value}" for key, value in options.items())]) == 0
    (of_card,) = budgets(read_plan(capsys.readouterr().out))
    found = parts(of_card)
    assert found["weights"] > 0 and "optimizer states" in found
    assert sum(found.values()) == pytest.approx(4.0)
    assert sum(found.values()) - found[""] == pytest.approx(of_card["estimated_peak_gib"], abs=0.01)


def test_what_is_no_plan_has_no_parts():
    assert read_plan("error") is None and budgets({"steps": 3}) == [] and parts({"budget_gib": 4.0}) == {}


def test_cards_are_what_the_driver_lists():
    assert read("NVIDIA A, 80GB, 81559, 12\nFailed to initialize NVML\n") == [Card("NVIDIA A, 80GB", 81559, 12)]
