"""Signals and kills at any moment: the run ends with its code, and goes on as if it had not."""

import os
import random
import signal
import time

import pytest
import torch

from qwen_lit.cli import main
from tests.runs import SLOW, WORKERS, adapter, ended, forked, same, trace, wait_for


def test_a_second_ctrl_c_ends_the_process_at_once(command, tmp_path):
    out = tmp_path / "out"
    pid = forked(command(out, *WORKERS, "--trainer.max_epochs", "1000"))
    wait_for(out / "trace.jsonl")
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130


def test_sigterm_to_the_whole_process_group_leaves_the_data_workers_to_the_run(command, whole, tmp_path):
    out = tmp_path / "out"
    pid = forked(command(out, *WORKERS, *SLOW))
    wait_for(out / "trace.jsonl")
    os.killpg(pid, signal.SIGTERM)
    assert ended(pid) == 143 and 1 <= len(trace(out)) < len(trace(whole))
    assert main(command(out, *WORKERS, "--ckpt_path", "last")) == 0
    assert same(whole, out)


def test_sigterm_before_training_has_begun_exits_143(command, tmp_path, monkeypatch):
    from qwen_lit.model.module import QwenModule

    monkeypatch.setattr(QwenModule, "configure_model", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    assert main(command(tmp_path / "out", *WORKERS)) == 143


def test_a_signal_during_the_export_loses_nothing(command, whole, tmp_path, monkeypatch):
    from qwen_lit.export import pipeline as export

    out, plain = tmp_path / "out", export.merge_adapter
    monkeypatch.setattr(export, "merge_adapter", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*command(out, *WORKERS), "--export.merge", "true"]) == 143
    monkeypatch.setattr(export, "merge_adapter", plain)
    assert main([*command(out, *WORKERS), "--export.merge", "true", "--ckpt_path", "last"]) == 0
    assert same(whole, out) and (out / "final_model" / "config.json").is_file()


@pytest.mark.timeout(600)
def test_a_run_killed_at_random_moments_ends_with_the_same_adapter(command, whole, tmp_path):
    out, draw, kills = tmp_path / "out", random.Random(1), 0
    options = ["--export.merge", "true", "--checkpoint.every_n_train_steps", "1", "--ckpt_path", "last"]
    while kills < 6:
        pid = forked([*command(out, *WORKERS), *options])
        time.sleep(draw.uniform(1.0, 4.5))
        os.killpg(pid, signal.SIGKILL)
        kills += ended(pid) == -signal.SIGKILL
    assert ended(forked([*command(out, *WORKERS), *options])) == 0
    left, right = adapter(whole), adapter(out)
    assert all(torch.equal(left[name], right[name]) for name in left)
    # A step that was trained again after a kill was trained on the same rows.
    steps = {line["step"]: line for line in trace(out)}
    assert all(line == steps[line["step"]] for line in trace(out)) and list(steps.values()) == trace(whole)
