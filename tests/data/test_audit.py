"""``inspect`` tells what would be trained, and fails when something would be lost."""

import json
import re
import shutil

import numpy as np
import pytest

from qwen_lit.cli import main
from tests.data.test_chatml import template
from tests.runs import lengths


@pytest.fixture
def inspect(model_folder, tmp_path, capsys):
    def run(rows, *options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
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
        return code, capsys.readouterr().out

    return run


def test_right_data_is_audited_and_shown(inspect, rows):
    code, out = inspect(rows, "--rows", "2", "--data.packing", "true")
    assert code == 0
    assert "25 read, 25 examples" in out and "alpaca 25" in out and "nothing is lost" in out
    assert out.count("── ") == 2 and "⟦It is 0. 好<|im_end|>⟧" in out
    assert max(len(line) for line in out.splitlines() if line.startswith("  ≤")) <= 80


def test_every_figure_of_the_audit_is_that_of_its_rows(inspect, rows, model_folder):
    tokens, trained = lengths(rows, model_folder)
    code, out = inspect([*rows[:-1], rows[-1] | {"weird": "text"}], "--data.val_size", "5")
    lines = {line[:16].strip(): line[16:] for line in out.split("\n── ")[0].splitlines()}
    assert code == 0 and lines["tokens"] == f"{sum(tokens):,}, {sum(trained) / sum(tokens):.1%} supervised"
    shares = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    told = [f"{name} {int(np.percentile(tokens, share, method='higher'))}" for name, share in shares.items()]
    assert lines["tokens in a row"] == ", ".join(told)
    assert lines["train / val"] == "20 / 5" and lines["fully masked"] == lines["no <|im_end|>"] == "0"
    assert lines["batches"] == "20 in an epoch, 100.0% full, 3 optimizer steps"
    assert lines["verdict"] == "no row is lost, but look at: not read: weird (1 row)"
    bars = [line.split() for line in out.splitlines() if line.startswith("  ≤")]
    assert sum(int(bar[-1]) for bar in bars) == 25
    _, out = inspect(rows, "--data.batch_size", "25", "--trainer.accumulate_grad_batches", "1")
    fill = sum(tokens) / (25 * max(tokens))
    assert f"batches         1 in an epoch, {fill:.1%} full, 1 optimizer steps" in out


def test_faults_drops_and_cuts_make_it_fail(inspect, rows):
    code, out = inspect([*rows, "nonsense"])
    assert code == 1 and "bad JSON 1" in out and "1 row faulty: bad JSON" in out
    code, out = inspect([*rows, {"instruction": "a", "output": "long " * 500}], "--data.max_length", "200")
    assert code == 1 and "1 row dropped: overlong" in out
    code, out = inspect([*rows, {"instruction": "long " * 500, "output": "b"}], "--data.max_length", "200")
    assert code == 1 and "1 row cut: longest user text shortened" in out


def test_how_many_rows_have_reasoning_is_told_with_the_form_in_which_they_will_be_asked(
    inspect, rows, model_folder, tmp_path, caplog
):
    folder = shutil.copytree(model_folder, tmp_path / "qwen3")
    (folder / "chat_template.jinja").write_text(template("qwen3"), encoding="utf-8")
    options = ["--model.model_name_or_path", str(folder)]
    code, out = inspect(rows[:6], *options)
    told = "all without reasoning; trained, and so served, with enable_thinking false"
    assert code == 0 and f"reasoning       {told}" in out.replace("\n  ", " ")
    assert "verdict         nothing is lost" in out
    thought = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "t"}]
    }
    code, out = inspect([*rows[:3], thought], *options)
    mix = "1 of 4 with reasoning (25%)"
    told = (
        "each is asked as it was trained by enable_thinking true or false; served with false by default, as most are"
    )
    assert code == 0 and f"reasoning       {mix}; {told}" in out.replace("\n  ", " ")
    assert (
        f"look at: conversations {mix}: {told}; keep one kind" in out and f"conversations {mix}: {told}" in caplog.text
    )


def test_rows_of_which_each_answer_is_an_example_are_told_with_the_way_out(
    inspect, rows, model_folder, tmp_path, caplog
):
    folder = shutil.copytree(model_folder, tmp_path / "qwen3")
    (folder / "chat_template.jinja").write_text(template("qwen3"), encoding="utf-8")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 4
    chats, page = [{"messages": turns}, {"messages": turns[:4]}, *rows[:2]], tmp_path / "page.html"
    options = ["--model.model_name_or_path", str(folder), "--html", str(page)]
    code, out = inspect(chats, *options)
    told = "4 rows became 8 examples (2 each): each answer is trained with the history that the server shows; "
    told += "data.expand_turns: off trains a row once"
    assert code == 0 and told in caplog.text
    assert told in " ".join(out.split())
    assert "<tr><th>expanded<td>4 rows became 8 examples" in page.read_text(encoding="utf-8")
    code, out = inspect(chats, *options, "--data.expand_turns", "off")
    assert "4 read, 4 examples" in out and "became" not in out + page.read_text(encoding="utf-8")


def test_duplicates_are_named(inspect, rows):
    code, out = inspect([*rows, rows[3], rows[3]])
    assert code == 0 and "duplicates      2" in out and "rows.jsonl:26" in out and "rows.jsonl:27" in out


def test_one_row_is_found_by_its_place(inspect, rows):
    code, out = inspect(rows, "--row", "rows.jsonl:4")
    assert out.count("── ") == 1 and "What is 0 plus 3?" in out
    assert inspect(rows, "--row", "rows.jsonl:400")[0] == 2


def test_the_page_holds_the_audit_and_escaped_rows(inspect, model_folder, tmp_path):
    page = tmp_path / "report.html"
    code, _ = inspect([{"instruction": "<script>", "output": "a & b"}], "--html", str(page))
    text = page.read_text(encoding="utf-8")
    assert code == 0 and "<mark>a &amp; b&lt;|im_end|&gt;</mark>" in text and "<script>" not in text
    assert "http" not in text
    assert "<title>rows.jsonl: dataset audit, 20" in text and "at most 2,048 tokens a row" in text
    assert "width=device-width" in text and f"{model_folder} · at most" in text
    assert "<b>1</b><span>rows to train on</span>" in text
    assert "<th>formats<td>alpaca 1" in text and "<th>verdict" not in text


def test_a_file_s_name_and_a_fault_cannot_become_markup(inspect, tmp_path):
    path, page = tmp_path / "<b>&'.jsonl", tmp_path / "page.html"
    path.write_text(json.dumps({"instruction": "a", "output": "b"}) + '\n{"<i>": "<u>"}\n')
    code, _ = inspect([], "--data.dataset_path", str(path), "--html", str(page))
    text = page.read_text(encoding="utf-8")
    assert code == 1 and not re.search("<b>&|<i>&?|<u>", text.replace("<i style", ""))
    assert "&lt;b&gt;&amp;&#39;.jsonl: dataset audit" in text and "&lt;i&gt;" in text.partition("First faults")[2]


def test_a_row_that_is_not_trained_is_found_with_what_became_of_it(inspect, rows):
    code, out = inspect(
        [*rows, "nonsense", {"instruction": "long " * 500, "output": "b"}],
        "--row",
        "rows.jsonl:26",
        "--data.max_length",
        "200",
    )
    assert code == 1 and "rows.jsonl:26: bad JSON: is not JSON" in out and "── " not in out
    code, out = inspect(
        [{"instruction": "long " * 500, "output": "b"}], "--row", "./rows.jsonl:1", "--data.max_length", "200"
    )
    assert "rows.jsonl:1: changed: longest user text shortened" in out and out.count("── ") == 1


def test_rows_that_are_all_faulty_are_audited_too(inspect):
    code, out = inspect(["nonsense", '{"instruction": "a"}'])
    assert code == 1 and "2 read, 0 examples" in out and "bad JSON 1, missing field 1" in out
    assert "rows.jsonl:2: misses 'output'" in out and "is left to train on" in out


def test_validation_files_are_audited_as_well(inspect, rows, tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text('nonsense\n{"instruction": "v", "output": "w"}\n')
    code, out = inspect(rows, "--data.val_dataset_path", str(path))
    assert code == 1 and "validation: 1 row faulty: bad JSON" in out and f"{path}:1: is not JSON" in out
    code, out = inspect(rows, "--data.val_dataset_path", str(path), "--row", "val.jsonl:2")
    assert "⟦w<|im_end|>⟧" in out


def test_a_page_that_cannot_be_written_is_named(inspect, rows, capsys):
    assert inspect(rows, "--html", "/proc/nowhere/report.html")[0] == 2
