"""Datasets of the hub by their name, from a hub on this machine."""

import json
import subprocess
import sys

import pytest

from qwen_lit.data.faults import DataError
from qwen_lit.data.kinds import is_hub_name
from qwen_lit.data.sources import as_sources

TEAS = {"path": "someone/teas"}
ASKED = [
    TEAS,
    TEAS | {"split": "test", "columns": {"output": "answer"}},
    TEAS | {"split": "train[1:]+test"},
    TEAS | {"split": "tran"},
    TEAS | {"name": "green"},
    TEAS | {"columns": {"output": "reply"}},
    {"path": "someone/else"},
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What is told of each of ``ASKED``; the libraries read their environment as they are imported."""
    command = [sys.executable, "-m", "tests.hub", str(tmp_path_factory.mktemp("hub"))]
    done = subprocess.run(command, input=json.dumps(ASKED), capture_output=True, text=True, timeout=900, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_rows_are_those_of_the_split_and_the_newest_commit(told):
    questions = [[row["question"] for _, row in rows] for rows in told["with"][:3]]
    assert questions == [["Q1", "Q2"], ["Q3"], ["Q2", "Q3"]]
    assert all(name.endswith("-0123456789abcdef.parquet") for name, _ in told["with"][0])


def test_what_is_not_there_is_one_line_that_names_what_is(told):
    assert told["with"][3:] == [
        "DataError: someone/teas: has no split 'tran'; it has train, test.",
        "DataError: someone/teas: has no configuration 'green'; it has default.",
        "DataError: someone/teas: has no column 'reply'; it has question, answer.",
        told["with"][6],
    ]
    assert "no such dataset: someone/else; it is no file or folder here, and http://127.0.0.1" in told["with"][6]


def test_without_the_hub_an_earlier_copy_is_used_or_the_mirror_named(told):
    assert told["without"][:3] == told["with"][:3]
    for line in (told["without"][3], told["without"][6]):
        assert "is not reached" in line and "set HF_ENDPOINT to a mirror" in line and "\n" not in line


@pytest.mark.parametrize("path", ["a/b.jsonl", "data/novel.txt", "a/b/c", "teas", "./a/b", "tests/data", "a b/c"])
def test_paths_are_not_taken_for_names(path):
    assert is_hub_name("tatsu-lab/alpaca") and not is_hub_name(path)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"path": "a.jsonl", "split": "train"}, "split is for datasets of the hub"),
        ({"path": "a/b", "columns": ["x"]}, "give our names with the file's"),
        ({"path": "a/b", "columns": {"output": 3}}, "columns.output is 3"),
        ({"path": "a/b", "subset": "x"}, "its keys are path, weight, max_rows, name, split, columns"),
    ],
)
def test_a_wrong_key_of_a_source_is_named(item, said):
    with pytest.raises(DataError, match=said):
        as_sources([item])
