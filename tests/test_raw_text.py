"""Raw text through a whole run: audited, planned, packed, sampled, exported with its card, continued."""

import json
from types import SimpleNamespace

import pytest

from qwen_lit.cli import main
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.settings import DataSettings
from qwen_lit.errors import UserError
from qwen_lit.model.resume import compare

PARAGRAPH = "It is 3. What is 2 plus 1? 好 It is 4. What is 3 plus 1? "


@pytest.fixture
def novel(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("".join(f"Chapter {n}\n\n" + PARAGRAPH * (1 + n % 3) + f"({n})\n\n" for n in range(200)), "utf-8")
    return path


def test_a_novel_is_trained_sampled_exported_and_continued(arguments, novel, tmp_path, capsys, caplog):
    given = [
        *arguments,
        "--data.dataset_path",
        str(novel),
        "--data.val_size",
        "5",
        "--data.packing",
        "true",
        "--data.max_length",
        "128",
        "--trainer.max_steps",
        "1",
        "--samples.max_new_tokens",
        "8",
    ]
    assert main(given) == 0
    out = tmp_path / "out"
    assert "trained prompts ended" not in caplog.text and "blocks" in caplog.text
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text("utf-8").splitlines()]
    assert samples and all("<|im_start|>" not in one["prompt"] and one["wanted"] for one in samples)
    text = novel.read_text("utf-8")
    assert all(one["prompt"].lstrip() + one["wanted"] in text for one in samples)
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert summary["data"]["blocks_of_raw_text_trained"] == summary["data"]["examples_trained"]
    assert summary["verdict"]["kind"] == "held-out" and summary["verdict"]["rows"] == 5
    card = (out / "final_model" / "README.md").read_text("utf-8")
    assert "trained on raw text" in card and "/v1/completions" in card and "instructions" not in card.split("## ")[0]
    source, target = tmp_path / "openings.jsonl", tmp_path / "continued.jsonl"
    source.write_text('{"text": "Chapter 1"}\n{"instruction": "What is 1 plus 1?"}\n')
    asked = ["--source", str(source), "--target", str(target), "--max_new_tokens", "4"]
    assert main(["predict", *arguments[1:], *asked]) == 0
    assert [set(json.loads(line)) for line in target.read_text("utf-8").splitlines()] == [
        {"text", "prediction"},
        {"instruction", "prediction"},
    ]


def test_inspect_shows_raw_text_as_trained_by_any_of_its_lines(arguments, novel, tmp_path, capsys):
    page = tmp_path / "page.html"
    inspect = ["inspect", *arguments[1:], "--data.dataset_path", str(novel), "--data.max_length", "128"]
    assert main([*inspect, "--row", "novel.txt:12", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "formats         text 1" in out and "raw text" in out and "verdict         nothing is lost" in out
    assert "no <|im_end|>   0" in out and out.count("── ") == 1 and "⟧" in out
    place = int(out.split("novel.txt:")[-1].split(" ")[0])
    assert place <= 12 and "<mark>" in page.read_text("utf-8")
    assert main([*inspect, "--row", "novel.txt:0"]) == 2


@pytest.mark.parametrize(("overlong", "told"), [("shorten", "1 of 26 rows (4%) dropped"), ("truncate", "1 row cut")])
def test_what_is_not_trained_is_told_before_a_run(overlong, told, arguments, dataset, tmp_path, capsys, caplog):
    path = tmp_path / "rows.jsonl"
    long = [{"instruction": "short", "output": "long " * 300}, {"instruction": "long " * 300, "output": "short"}]
    path.write_text(dataset.read_text("utf-8") + json.dumps(long[0]) + "\n", "utf-8")
    keys = ["--data.dataset_path", str(path), "--data.max_length", "128", "--data.overlong", overlong]
    assert main(["plan", *arguments[1:], *keys]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"not trained {told}" in out and "data.max_length 128; raise it" in out
    lines = [one.getMessage() for one in caplog.records if one.levelname == "WARNING" and told in one.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("not all is trained: ")
    path.write_text(json.dumps(long[1]) + "\n" + dataset.read_text("utf-8"), "utf-8")
    assert main(["plan", *arguments[1:], *keys]) == 0
    assert "1 row shortened, longest user text shortened: longer than" in " ".join(capsys.readouterr().out.split())


def test_a_run_of_an_earlier_truncate_is_told_of_its_new_name_and_not_refused(caplog):
    then, now = ({"data": {"overlong": one}} for one in ("truncate", "shorten"))
    compare({"config": then}, now, None)
    assert "data.overlong was truncate until here, and is shorten from here on" in caplog.text


def test_a_resume_is_refused_with_the_way_out_where_an_answer_would_be_cut(tokenizer, dataset, tmp_path):
    path = tmp_path / "rows.jsonl"
    long = json.dumps({"instruction": "a", "output": "long " * 300})
    path.write_text(dataset.read_text("utf-8") + long + "\n", "utf-8")

    def data(overlong):
        cache = str(tmp_path / "cache")
        given = DataSettings(str(path), max_length=128, overlong=overlong, cache_dir=cache)
        one = QwenDataModule(given, tokenizer)
        one.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), micro_batches_per_step=1, world_size=1)
        one.setup()
        return one

    before = data("shorten").state_dict()
    data("shorten").load_state_dict(before)
    with pytest.raises(UserError, match="data.overlong: maybe truncate of an earlier version, which is shorten now"):
        data("truncate").load_state_dict(before)


def test_where_every_row_is_dropped_the_reason_is_told(arguments, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "long " * 300}) + "\n")
    given = ["--data.dataset_path", str(path), "--data.max_length", "128", "--data.val_size", "8"]
    assert main(["plan", *arguments[1:], *given]) == 2
    assert "is left to train on: 1 of 1 row (100%) dropped: question and answer do not fit" in capsys.readouterr().err
