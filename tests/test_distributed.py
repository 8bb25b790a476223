"""Two processes train what one of them would, survive each other's faults, and go on together."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from qwen_lit.callbacks.checkpoint_io import last_checkpoint
from qwen_lit.cli import main
from tests.runs import SLOW, WORKERS, adapter, doing, forked, same, scalars, trace

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
ALIKE = ["--model.lora_config.lora_dropout", "0", "--data.num_workers", "0"]
HANG = 900
"""Seconds after which a command hangs, on a machine that has much else to do."""
PADDED = ["--data.packing", "false", "--data.batch_size", "2", "--data.max_length", "128"]


class Started(NamedTuple):
    """A first rank, which shares this process's imports; those that it starts are processes from the beginning."""

    pid: int
    errors: Path


def start(command: list[str], **environment: str) -> Started:
    handle, errors = tempfile.mkstemp(suffix=".txt")
    os.close(handle)
    return Started(forked(command, errors, {"OMP_NUM_THREADS": "1"} | environment), Path(errors))


def finish(process: Started, seconds: float = HANG) -> tuple[int, str]:
    """Its exit code, negative for a signal, and what all ranks said on stderr."""
    ends = time.monotonic() + seconds
    while not (found := os.waitpid(process.pid, os.WNOHANG))[0]:
        if time.monotonic() > ends:
            os.kill(process.pid, signal.SIGKILL)
            raise AssertionError(process.errors.read_text())
        time.sleep(0.05)
    text = process.errors.read_text()
    process.errors.unlink()
    return os.waitstatus_to_exitcode(found[1]), text


def run(command: list[str]) -> tuple[int, str]:
    return finish(start(command))


def children(process: Started) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(one) for one in path.read_text().split()]


def until(condition, seconds: float = HANG) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def steps_done(out: Path) -> int:
    return len(trace(out)) if (out / "trace.jsonl").is_file() else 0


@pytest.fixture(scope="module")
def command(command):
    """The shared one, with two workers."""
    return lambda out, *options: command(out, *WORKERS, *options)


@pytest.fixture(scope="module")
def two(command, tmp_path_factory) -> Path:
    """Two ranks with dropout, and two workers each, never stopped."""
    out = tmp_path_factory.mktemp("two") / "out"
    code, text = run(command(out, *TWO))
    assert code == 0, text
    return out


@pytest.mark.parametrize("layout", [[], PADDED], ids=["packed", "padded"])
def test_two_ranks_learn_what_one_with_twice_the_accumulation_learns(command, tmp_path, layout):
    one, two, kept = tmp_path / "one", tmp_path / "two", tmp_path / "bases"
    assert main(command(one, *ALIKE, *layout, "--trainer.accumulate_grad_batches", "6")) == 0
    code, text = run(command(two, *ALIKE, *layout, *TWO, "--model.base_cache", str(kept)))
    assert code == 0, text
    assert len(list(kept.glob("*.safetensors"))) == 1
    expected, found = trace(one), trace(two)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(expected, found, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    # AdamW learns the same from a gradient of any scale, and the clipping does not.
    norms = [scalars(out)["train/grad_norm"] for out in (one, two)]
    assert len(norms[0]) == len(found) and norms[0] == pytest.approx(norms[1], rel=1e-4)
    left, right = adapter(one), adapter(two)
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5
    best = [torch.load(out / "checkpoints" / "best.ckpt", weights_only=True) for out in (one, two)]
    losses = [state["callbacks"]["RunCheckpoint"]["best"] for state in best]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_each_row_is_trained_once_an_epoch_over_all_ranks(two):
    other = [json.loads(line) for line in (two / "trace.jsonl.1").read_text().splitlines()]
    for epoch in (0, 1):
        seen = Counter(row for line in [*trace(two), *other] if line["epoch"] == epoch for row in line["rows"])
        assert len(seen) > 50 and set(seen.values()) == {1}
    assert not {row for line in trace(two) if line["epoch"] == 0 for row in line["rows"]} & {
        row for line in other if line["epoch"] == 0 for row in line["rows"]
    }


def test_the_figures_of_two_ranks_are_of_both(two):
    summary = json.loads((two / "summary.json").read_text())
    panel, data = summary["throughput"], summary["data"]
    # Both epochs were trained whole: of one rank's rows alone this would be another share.
    share = data["supervised_tokens"] / data["tokens_in_an_epoch"]
    assert panel["supervised_tokens_per_second"] / panel["tokens_per_second"] == pytest.approx(share, rel=1e-5)
    assert panel["tokens_per_second_per_card"] == pytest.approx(panel["tokens_per_second"] / 2, rel=1e-5)
    assert len(scalars(two)["train/tokens_per_second_per_card"]) == summary["steps"]
    assert [step for step, _ in summary["history"]["tokens_per_second"]] == list(range(1, summary["steps"] + 1))


def test_a_signal_to_any_rank_stops_all_and_the_run_that_torchrun_resumes_is_the_whole_one(command, two, tmp_path):
    out = tmp_path / "out"
    for asked in ("the other rank", "both"):
        before = steps_done(out)
        process = start(command(out, *TWO, *SLOW, "--ckpt_path", "last"))
        until(lambda done=before: steps_done(out) > done)
        others = children(process)[:1]
        for pid in others if asked == "the other rank" else [process.pid, *others]:
            os.kill(pid, signal.SIGTERM)
        code, text = finish(process)
        assert code == 143, text
        assert before < steps_done(out) < len(trace(two))
    code, told = torchrun(command(out, *TWO, "--ckpt_path", "last"))
    assert code == 0, told
    assert same(two, out)


def torchrun(command: list[str]) -> tuple[int, str]:
    """Two ranks by PyTorch's own launcher: its exit code, and what it and they said."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    started = subprocess.Popen(
        [*launcher, "qwen_lit", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
    )
    try:
        told, _ = started.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        for rank in psutil.Process(started.pid).children(recursive=True):
            # It tells what each of its threads waits for.
            rank.send_signal(signal.SIGABRT)
        told, _ = started.communicate(timeout=60)
    return started.returncode, told


def test_another_number_of_ranks_is_refused(command, two, tmp_path, capsys):
    assert main(command(two, "--ckpt_path", "last")) == 2
    assert "trainer.devices x trainer.num_nodes: 2 in the checkpoint, 1 now" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["the other rank", "the first rank"])
def test_when_a_rank_dies_the_others_end_and_the_last_checkpoint_is_whole(command, tmp_path, lost):
    out = tmp_path / "out"
    process = start(command(out, *TWO, *SLOW, "--checkpoint.every_n_train_steps", "1"))
    until(lambda: steps_done(out) >= 2)
    (other,) = children(process)[:1]
    os.kill(other if lost == "the other rank" else process.pid, signal.SIGKILL)
    code, text = finish(process)
    assert code not in (0, 143), text
    until(lambda: not Path(f"/proc/{other}").exists())
    assert last_checkpoint(out / "checkpoints") is not None


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all_and_named_by_that_one(command, tmp_path):
    out = tmp_path / "out"
    code, text = run(command(out, *TWO, *doing(2, "poison_rank", "1")))
    assert code == 0, text
    assert text.count("the loss is not finite; the step is skipped (") == 2
    assert text.count("the step is skipped ()") == 1
    assert all(one.isfinite().all() for one in adapter(out).values())
    assert [line["step"] for line in trace(out) if line["loss"] is None] == [2]


def test_machines_with_different_rows_are_refused_on_both(command, tmp_path):
    other = tmp_path / "other.jsonl"
    asked = [{"instruction": f"Ask {n}", "output": f"It is {n}."} for n in range(59)]
    other.write_text("".join(json.dumps(row) + "\n" for row in asked))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    machines = []
    for rank in ("0", "1"):
        rows = ["--data.dataset_path", str(other)] if rank == "1" else []
        options = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": rank}
        machines.append(start(command(tmp_path / rank, *options, *rows), **place))
    for code, text in map(finish, machines):
        assert code == 2, text
        assert "the ranks of this run would train different things" in text
        assert "data.dataset_path: " in text and "on rank 1" in text


def runs(process):
    """Whether it does; one that has ended can wait for whoever asks how."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_rank_ends_with_what_has_started_it_and_a_run_of_one_process_does_not(tmp_path):
    child = "from qwen_lit import distributed; distributed.GRACE = 0.0; distributed.watch_parent()\n"
    (tmp_path / "child.py").write_text(child + "print('watching', flush=True); import time; time.sleep(2000)")
    (tmp_path / "parent.py").write_text(
        "import os, subprocess, sys, time\n"
        "for more in ({}, {'LOCAL_RANK': '1'}, {'LOCAL_RANK': '0', 'TORCHELASTIC_RUN_ID': 'none'}):\n"
        "    environment = {k: v for k, v in os.environ.items() if k not in ('LOCAL_RANK', 'TORCHELASTIC_RUN_ID')}\n"
        f"    made = subprocess.Popen([sys.executable, {str(tmp_path / 'child.py')!r}], env=environment | more,\n"
        "                            stdout=subprocess.PIPE)\n"
        "    made.stdout.readline()\n"
        "    print(made.pid, flush=True)\n"
        "time.sleep(2000)"
    )
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(parent.stdout.readline())) for _ in range(3)]
    try:
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + HANG
        while any(map(runs, children[1:])) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [runs(one) for one in children] == [True, False, False]
    finally:
        for one in children:
            with suppress(psutil.NoSuchProcess):
                one.kill()
