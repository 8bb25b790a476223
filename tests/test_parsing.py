"""What is given on the command line or in YAML is what arrives; no value is read as a file."""

import json
import os
import re
from pathlib import Path

import pytest

from qwen_lit.cli import QwenCLI, main
from qwen_lit.data.faults import DataError
from qwen_lit.data.sources import Source, as_sources, expand
from qwen_lit.errors import UserError

QWEN7B = str(Path("configs/qwen7b.yaml").absolute())
ROWS = '[{"path": "/etc/hostname", "weight": 3}, "/etc/hostname", {"instruction": "a", "output": "b"}]'


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The working directory, with files of every kind in it."""
    monkeypatch.chdir(tmp_path)
    files = {
        "array.json": ROWS,
        "rows.jsonl": '{"instruction": "a", "output": "b"}\n',
        "table.csv": "a,b\n1,2\n",
        "novel.txt": "Once upon a time\n",
        "empty.txt": "",
        "config.yaml": "dataset_path: other.jsonl\nr: 3\n",
        "object.json": '{"dataset_path": "other.jsonl", "r": 3}',
        "last": "[1]",
    }
    for name, text in files.items():
        Path(name).write_text(text)
    Path("gbk.jsonl").write_bytes("好".encode("gbk"))
    Path("folder").mkdir()
    os.mkfifo("pipe")


@pytest.fixture
def given(folder, monkeypatch):
    """Parses a command; returns what its keys arrive as, or None where it cannot be parsed."""
    values = {}

    def stop(self):
        values["all"] = self.config
        raise UserError("parsed")

    monkeypatch.setattr(QwenCLI, "instantiate_classes", stop)
    # Nothing of these commands is there to be checked.
    monkeypatch.setattr(QwenCLI, "before_instantiate_classes", lambda self: None)

    def parse(*args, command="fit"):
        values.clear()
        assert main([command, "--config", QWEN7B, *args]) == 2
        return values.get("all")

    return parse


VALUES = ["array.json", "table.csv", "empty.txt", "gbk.jsonl", "pipe", "folder", "123", "a: b", "#1"]
PATHS = (
    "data.dataset_path",
    "data.val_dataset_path",
    "data.cache_dir",
    "output_dir",
    "model.model_name_or_path",
    "model.memory_budget",
    "ckpt_path",
)


@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_names_a_file_stays_its_name(given, value):
    parsed = given(*[part for key in PATHS for part in (f"--{key}", value)])
    assert {key: parsed[key] for key in PATHS} == dict.fromkeys(PATHS, value)
    data = {"dataset_path": value, "val_dataset_path": value, "cache_dir": value}
    model = {"model_name_or_path": value, "memory_budget": value}
    over = {"data": data, "model": model, "output_dir": value, "ckpt_path": value}
    Path("over.yaml").write_text(json.dumps(over))
    parsed = given("--config", "over.yaml")
    assert {key: parsed[key] for key in PATHS} == dict.fromkeys(PATHS, value)


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("inspect", ["row", "html"]),
        ("predict", ["source", "target"]),
        ("export", ["push_to_hub"]),
        ("plan", ["memory_budget"]),
    ],
)
def test_so_does_one_of_a_command_and_its_absolute_path(given, command, keys):
    for value in ("array.json", str(Path("pipe").absolute())):
        parsed = given(*[f"--{key}={value}" for key in keys], f"--data.dataset_path={value}", command=command)
        assert {parsed[key] for key in (*keys, "data.dataset_path")} == {value}


def test_a_list_of_datasets_arrives_as_it_is_written(given):
    text = "[array.json, {path: table.csv, weight: 2.5, max_rows: 3}, {path: '123', columns: {output: a}}]"
    wanted = [
        "array.json",
        {"path": "table.csv", "weight": 2.5, "max_rows": 3},
        {"path": "123", "columns": {"output": "a"}},
    ]
    Path("over.yaml").write_text(f"data: {{dataset_path: {text}}}")
    assert given("--data.dataset_path", text)["data.dataset_path"] == wanted
    assert given("--config", "over.yaml")["data.dataset_path"] == wanted
    longer = given("--config", "over.yaml", "--data.dataset_path+=array.json")
    assert longer["data.dataset_path"] == [*wanted, "array.json"]
    assert given("--data.dataset_path", text, "--data.dataset_path+=pipe")["data.dataset_path"] == [*wanted, "pipe"]


def test_a_prompt_is_its_text(given):
    texts = ["array.json", "novel.txt", "pipe", "123", "yes", "1e3", "[", "a: b", "{a: b}", "#1?", "What? [x]", ""]
    assert given(*[f"--samples.prompts+={text}" for text in texts])["samples.prompts"] == texts
    quoted = [*texts, "null", "~", "[a]", "true"]
    assert given("--samples.prompts", json.dumps(quoted))["samples.prompts"] == quoted
    Path("over.yaml").write_text(f"samples: {{prompts: {json.dumps(quoted)}}}")
    assert given("--config", "over.yaml")["samples.prompts"] == quoted


def test_a_written_configuration_gives_the_same_values_again(given, monkeypatch, capsys):
    quoted = ["null", "~", "123", "yes", "1e3", "a: b", "#1", "array.json", "2020-01-01", "0x1F", " a ", "好\n"]
    datasets = ["array.json", {"path": "123", "weight": 0.5, "max_rows": None}, {"path": "null", "max_rows": 7}, "1e3"]
    over = {
        "output_dir": "1e3",
        "ckpt_path": "null ",
        "samples": {"prompts": quoted},
        "data": {"dataset_path": datasets, "val_dataset_path": "yes", "cache_dir": "0o17", "fields": {"a": "no"}},
    }
    Path("over.yaml").write_text(json.dumps(over))
    first = given("--config", "over.yaml")
    capsys.readouterr()
    assert main(["fit", "--config", QWEN7B, "--config", "over.yaml", "--print_config"]) == 0
    Path("again.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    second = given("--config", "again.yaml")
    assert {**first.as_dict(), "config": 0} == {**second.as_dict(), "config": 0}
    assert second.data.dataset_path == datasets and second.samples.prompts == quoted and second.output_dir == "1e3"


def test_only_a_yaml_gives_a_section(given, capsys):
    Path("lora.yaml").write_text("r: 3\ntarget_modules: [v_proj]")
    assert given("--model.lora_config", "lora.yaml")["model.lora_config.r"] == 3
    wrong = {"data": "object.json", "model": "pipe", "model.lora_config": "none", "trainer": "gbk.jsonl"}
    for section, value in wrong.items():
        capsys.readouterr()
        assert given(f"--{section}", value) is None
        told = f"{section} is a section of keys, not {value!r}; give --{section}.KEY VALUE, or a file that ends in"
        assert capsys.readouterr().err.endswith(f"{told} .yaml\n")
    Path("over.yaml").write_text("data: object.json")
    assert given("--config", "over.yaml") is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data.batch_size", "many"], "data.batch_size: expected int, not 'many'"),
        (["--model.rank", "3"], "there is no key model.rank; did you mean model.lora_config.r?"),
        (
            ["--model.quantization_config", "none"],
            "model.quantization_config: expected Quantization or null, not 'none'; write null for none",
        ),
        (["--model.quantization_config", "array.json"], "expected Quantization or null, not 'array.json'"),
        (["--model.quantization_config.load_in_5bit", "true"], "load_in_5bit"),
        (["--export.gguf", "none"], "'bf16'] or null, not 'none'; write null for none"),
        (["--export.gguf", "False"], "write null for none"),
        (
            ["--samples.prompts", "novel.txt"],
            "samples.prompts: expected list[str] or null, not 'novel.txt'; give a list, as [novel.txt]",
        ),
        (["--data.fields", "object.json"], "data.fields: expected dict[str, str] or null, not 'object.json'"),
        (["--trainer.callbacks", "array.json"], "trainer.callbacks: expected"),
        (["--trainer.callbacks+=NoSuchThing"], "NoSuchThing"),
        (["--trainer.logger", "no_such.Logger"], "there is no module no_such; pip install no_such, or"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--config", "array.json"], "array.json: is not a configuration"),
        (["--config", "empty.txt"], "empty.txt: is not a configuration"),
        (["--config", "gbk.jsonl"], "gbk.jsonl: is not UTF-8"),
        (["--config", "folder"], "folder"),
    ],
)
def test_what_cannot_be_parsed_is_one_line(given, capsys, args, words):
    assert given(*args) is None
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and words in told and len(told) < 700


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output_dir: 123", "over.yaml: output_dir: expected str, not '123'; a text that YAML takes"),
        ("samples: {prompts: [null]}", "samples.prompts: expected list[str] or null, not '[None]'"),
        ("data: {dataset_path: 123}", "data.dataset_path: expected str"),
        ("data: {dataset_pth: a}", "there is no key data.dataset_pth"),
        ("a: [", "over.yaml: Problems parsing config"),
        ("# nothing", "over.yaml: is not a configuration"),
    ],
)
def test_what_cannot_be_parsed_in_a_file_is_one_line_with_its_name(given, capsys, text, words):
    Path("over.yaml").write_text(text)
    assert given("--config", "over.yaml") is None
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and words in told


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("hf://tatsu-lab/alpaca", "is an address"),
        ("", "an empty path"),
        ("folder", "folder holds no file that ends in .jsonl"),
        ("pipe", "no such dataset: pipe"),
        ("[{pth: rows.jsonl}]", "an item has the key 'pth'"),
        ("none", "write null for none"),
    ],
)
def test_what_is_no_dataset_is_named_before_anything_is_loaded(folder, model_folder, capsys, value, words):
    key = "val_dataset_path" if value in ("none", "") else "dataset_path"
    args = ["fit", "--config", QWEN7B, "--model.model_name_or_path", str(model_folder)]
    args += ["--data.dataset_path", "rows.jsonl", "--data.cache_dir", "cache", f"--data.{key}", value]
    assert main(args) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: data.{key}") and told.count("\n") == 1 and words in told
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "an empty list"),
        ([{"weight": 2}], "has no path"),
        ([{"path": "a.jsonl", "weight": "much"}], "a.jsonl: weight is 'much'; give a number"),
        ([{"path": "a.jsonl", "max_rows": 1.5}], "a.jsonl: max_rows is 1.5; give a whole number or null"),
        ([{"path": "a.jsonl", "max_rows": True}], "a.jsonl: max_rows is True"),
        ([{"path": 12}], "path is 12; give a text"),
    ],
)
def test_an_item_of_another_kind_is_named_by_its_key(items, words):
    with pytest.raises(DataError, match=re.escape(words)):
        as_sources(items)


@pytest.mark.parametrize("address", ["s3://bucket/rows.jsonl", "https://example.org/rows.jsonl", "hf://a/b"])
def test_an_address_is_no_path(address):
    with pytest.raises(DataError, match="is an address"):
        expand(Source(address))
