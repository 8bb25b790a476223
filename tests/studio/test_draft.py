"""What is chosen on the page, and the YAML that it becomes."""

import json

import pytest
import yaml

from qwen_lit.errors import UserError
from qwen_lit.help import keys_of, load
from qwen_lit.studio.curves import Curves
from qwen_lit.studio.draft import Draft, Source
from qwen_lit.studio.folders import Folders
from qwen_lit.studio.jobs import Jobs
from qwen_lit.studio.studio import Studio, gguf_kinds


@pytest.fixture
def studio(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}\n")
    folders = Folders([str(tmp_path)])
    return Studio(folders, Jobs(folders.home / "jobs", tmp_path), Curves())


def flat(config, before=""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}.")
        else:
            yield before + key


def test_a_draft_becomes_a_yaml_of_keys_that_fit_knows(studio):
    draft = Draft([Source("a.jsonl")], model="Qwen/Qwen3-8B", output_dir="out/run")
    command, option, path = studio.fit(draft)
    config = yaml.safe_load(open(path, encoding="utf-8"))
    assert (command, option) == ("fit", "--config")
    assert set(flat(config)) <= set(keys_of(load(), "fit"))
    assert config["output_dir"] == str(studio.folders.roots[0] / "out" / "run")
    assert config["data"]["dataset_path"] == str(studio.folders.roots[0] / "a.jsonl")


def test_several_files_are_mixed_by_their_weights(studio):
    draft = Draft([Source("a.jsonl", 1), Source("b.jsonl", 0.5)], model="Qwen/Qwen3-8B", val_path="b.jsonl")
    data = draft.config(studio.folders)["data"]
    assert [one["weight"] for one in data["dataset_path"]] == [1, 0.5]
    assert data["val_dataset_path"].endswith("b.jsonl") and "val_size" not in data


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": []},
        {"sources": [Source("/etc/passwd")]},
        {"model": ""},
        {"model": "../model"},
        {"output_dir": "../out"},
        {"output_dir": "/tmp/out"},
        {"val_path": "../val.jsonl"},
    ],
    ids=str,
)
def test_what_is_missing_or_lies_elsewhere_starts_nothing(studio, changes):
    draft = Draft(**{"sources": [Source("a.jsonl")], "model": "Qwen/Qwen3-8B"} | changes)
    with pytest.raises(UserError):
        studio.fit(draft)


def test_a_draft_is_found_again_and_a_broken_one_is_as_at_the_start(studio):
    draft = Draft([Source("a.jsonl", 2.0)], r=64, model="Qwen/Qwen3-8B")
    draft.keep(studio.draft_file)
    assert studio.draft() == draft
    studio.draft_file.write_text(json.dumps({"r": "64", "sources": [{"path": "a.jsonl", "weight": "x"}, 3]}))
    assert studio.draft() == Draft([Source("a.jsonl")])
    studio.draft_file.write_text("{")
    assert studio.draft() == Draft()


def test_kinds_of_gguf_are_those_of_the_reference():
    from typing import get_args

    from qwen_lit.export.gguf import GgufType

    assert gguf_kinds() == list(get_args(GgufType))
