"""The other ranks of a machine load beside the first one, and begin with it or end without a word."""

import json
import os
import sys

import pytest

from qwen_lit import front
from qwen_lit.waiting import WAITS, WaitingRanks, own_command, ranks_of

DDP = ["--trainer.strategy", "ddp"]


@pytest.mark.parametrize(
    ("args", "count"),
    [
        (["fit", "--trainer.devices", "4", *DDP], 4),
        (["fit", "--trainer.devices=2", "--trainer.strategy=ddp"], 2),
        (["fit", "--trainer.devices", "0,3,5", *DDP], 3),
        (["fit", "--trainer.devices", "[1, 2]", *DDP], 2),
        (["fit", "--trainer.devices", "4"], 1),
        (["plan", "--trainer.devices", "4", *DDP], 1),
        (["fit", "--trainer.devices", "auto", *DDP], 1),
        (["fit", "--trainer.devices", "{", *DDP], 1),
        (["fit", *DDP], 1),
        (["fit", "--config", "YAML"], 2),
        (["--config=YAML", "fit", "--trainer.devices", "3"], 3),
        (["fit", "--config", "no such file", "--trainer.devices", "2", *DDP], 2),
    ],
)
def test_the_number_of_ranks_is_read_off_the_command_line_and_its_files(args, count, tmp_path):
    (tmp_path / "run.yaml").write_text("trainer: {devices: 2, strategy: ddp, max_epochs: 1}\n")
    assert ranks_of([one.replace("YAML", str(tmp_path / "run.yaml")) for one in args]) == count


def waiting(tmp_path, count):
    """Ranks that write down the environment that they are given."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, sys\n"
        "from qwen_lit.waiting import environment_given\n"
        "rank, found = os.environ['LOCAL_RANK'], environment_given()\n"
        f"open(os.path.join({str(tmp_path)!r}, rank), 'w').write(json.dumps(found))\n"
    )
    return WaitingRanks([sys.executable, str(script)], count)


def test_each_rank_begins_in_the_environment_that_the_first_one_has_by_then(tmp_path):
    ranks = waiting(tmp_path, 2)
    assert all(one.poll() is None for one in ranks.processes)
    found = ranks.begin({"MASTER_PORT": "123", "LOCAL_RANK": "0"})
    assert [one.wait(60) for one in found] == [0, 0]
    told = [json.loads((tmp_path / rank).read_text()) for rank in ("1", "2")]
    assert told == [{"MASTER_PORT": "123", "LOCAL_RANK": rank} for rank in ("1", "2")]


def test_a_rank_that_the_run_has_no_use_for_ends(tmp_path):
    ranks = waiting(tmp_path, 1)
    ranks.dismiss()
    assert ranks.processes[0].wait(60) == 0 and json.loads((tmp_path / "1").read_text()) is None


def test_a_rank_that_waits_imports_as_the_first_one_does(monkeypatch):
    read, write = os.pipe()
    os.close(write)
    called = []
    monkeypatch.setenv(WAITS, str(read))
    monkeypatch.setattr(front, "import_bitsandbytes", lambda: called.append("without inductor"))
    assert front.main(["fit"]) == 0 and called


def test_a_rank_runs_the_command_of_the_first_one():
    assert own_command(["fit", "--a", "b"])[0] == sys.executable and own_command(["fit"])[-1] == "fit"
