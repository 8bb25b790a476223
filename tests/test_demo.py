"""The demo's held-out rows ask for what is taught, in words that are not."""

import yaml

from qwen_lit.demo import PROMPTS, held_out_rows, shipped_rows, tea_names
from qwen_lit.shipped import configs


def test_held_out_rows_ask_in_other_words_for_answers_that_are_taught():
    rows, held_out = shipped_rows(), held_out_rows()
    questions = {(row.get("instruction"), row.get("input")) for row in rows}
    answers = {row.get("output") for row in rows}
    assert len(held_out) == len(tea_names(rows)) == 20
    for row in held_out:
        assert (row["instruction"], row["input"]) not in questions and row["output"] in answers
        name = next(name for name in tea_names(rows) if name in row["instruction"])
        assert name in row["output"]


def test_the_questions_that_are_asked_while_it_learns_are_trained():
    config = yaml.safe_load((configs() / "demo.yaml").read_text("utf-8"))
    rows = [row for row in shipped_rows() if not row.get("system") and "instruction" in row]
    asked = {row["instruction"] + ("\n" + row["input"] if row.get("input") else "") for row in rows}
    assert len(config["samples"]["prompts"]) == len(PROMPTS) == 3 and set(config["samples"]["prompts"]) <= asked
