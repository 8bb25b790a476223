"""A run that is stopped and resumed is the run that was not: losses, rows and adapter, bit for bit on the CPU."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen_lit.callbacks import checkpoint as checkpoint_module
from qwen_lit.cli import main
from qwen_lit.commands import verify_resume
from tests.runs import WORKERS, adapter, forked, same, scalars, stopping, trace

STEPS = 10
ANSWERING = ["--samples.rows", "2"]
"""Sampling draws no number of the run's."""
STEADY = ["--model.lr_scheduler", "constant", "--model.warmup_ratio", "0"]
"""The schedule does not end with a shorter run."""


@pytest.fixture(scope="module")
def command(command):
    """The shared one, with two workers."""
    return lambda out, *options: command(out, *WORKERS, *options)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(out, *ANSWERING)) == 0
    assert len(trace(out)) == STEPS and len({row for line in trace(out) for row in line["rows"]}) > 50
    return out


@pytest.fixture(scope="module")
def steady(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("steady") / "out"
    assert main(command(out, *STEADY)) == 0
    return out


@pytest.fixture(scope="module")
def stopped_at_2(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "out"
    assert main(command(out, *stopping(2))) == 143
    return out


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_stop_at_any_step_leaves_no_trace_in_the_result(command, whole, tmp_path, step):
    out = tmp_path / "out"
    assert main(command(out, *stopping(step))) == 143
    # The fifth step is the last of its epoch, and the stop comes before its validation, which is made up for.
    assert len(trace(out)) == step and ("val/loss" in scalars(out)) == (step > 5)
    assert main(command(out, "--ckpt_path", "last")) == 0
    assert same(whole, out)
    assert scalars(out)["val/loss"] == scalars(whole)["val/loss"] and len(scalars(out)["val/loss"]) == 2
    best = [torch.load(one / "checkpoints" / "best.ckpt", weights_only=True) for one in (whole, out)]
    assert best[0]["global_step"] == best[1]["global_step"]


def test_three_stops_in_one_epoch_and_one_in_the_next_leave_no_trace(command, whole, tmp_path):
    out = tmp_path / "out"
    for step, name, code in ((1, "SIGTERM", 143), (2, "SIGINT", 130), (3, "SIGUSR1", 143), (5, "SIGTERM", 143)):
        assert main(command(out, *ANSWERING, "--ckpt_path", "last", *stopping(step, name))) == code
    assert main(command(out, *ANSWERING, "--ckpt_path", "last")) == 0
    assert same(whole, out)


@pytest.mark.parametrize("stops", [(5, 7), (4, 5, 6, 9)], ids=str)
def test_stops_at_the_end_of_an_epoch_and_soon_after_it_leave_no_trace(command, whole, tmp_path, stops):
    out = tmp_path / "out"
    for step in stops:
        assert main(command(out, "--ckpt_path", "last", *stopping(step))) == 143
    assert main(command(out, "--ckpt_path", "last")) == 0
    assert same(whole, out)


@pytest.mark.parametrize("limit", [3, 5, 7])
def test_a_run_that_max_steps_has_ended_goes_on_with_the_very_next_row(command, steady, tmp_path, limit):
    short = tmp_path / "short"
    assert main(command(short, *STEADY, "--trainer.max_steps", str(limit))) == 0
    assert len(trace(short)) == limit
    assert main(command(short, *STEADY, "--ckpt_path", "last")) == 0
    assert same(steady, short)


@pytest.mark.parametrize("lost", ["rng", "position"])
def test_without_the_generators_or_the_position_the_result_is_another(
    command, whole, stopped_at_2, tmp_path, lost, monkeypatch
):
    from qwen_lit.data.batches import ResumableLoader

    out = shutil.copytree(stopped_at_2, tmp_path / "out")
    if lost == "rng":
        monkeypatch.setattr(checkpoint_module, "_set_rng", lambda state: torch.manual_seed(0))
    else:
        monkeypatch.setattr(ResumableLoader, "load_state_dict", lambda self, state: None)
    assert main(command(out, "--ckpt_path", "last")) == 0
    assert not same(whole, out)


def test_tensorboard_shows_each_step_once_across_resumes(command, whole, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = shutil.copytree(whole, tmp_path / "out")
    for path in (out / "checkpoints").glob("step=00000010.*"):
        path.unlink()
    newest = sorted((out / "checkpoints").glob("step=*.ckpt"))[-1]
    assert main(command(out, "--ckpt_path", "last")) == 0
    found = []
    for folder in (whole, out):
        events = EventAccumulator(str(folder / "logs"))
        events.Reload()
        found.append([(e.step, e.value) for tag in ("train/loss", "val/loss") for e in events.Scalars(tag)])
    assert newest.name == "step=00000009.ckpt"
    assert found[0] == found[1]


def test_a_finished_run_goes_on_when_it_is_given_more_epochs(command, steady, tmp_path):
    short = tmp_path / "short"
    assert main(command(short, *STEADY, "--trainer.max_epochs", "1")) == 0
    shutil.rmtree(short / "lora_adapter")
    assert main(command(short, *STEADY, "--ckpt_path", "last")) == 0
    assert same(steady, short)


def test_a_changed_learning_rate_is_taken_and_told(command, stopped_at_2, tmp_path, caplog):
    out = shutil.copytree(stopped_at_2, tmp_path / "out")
    state = torch.load(out / "checkpoints" / "step=00000002.ckpt", weights_only=True)["state_dict"]
    changed = ["--model.learning_rate", "1e-30", "--trainer.max_steps", "4"]
    assert main(command(out, "--ckpt_path", "last", *changed)) == 0
    assert "model.learning_rate was 0.0002 until here, and is 1e-30 from here on" in caplog.text
    kept = {name.removeprefix("model.").replace(".default", ""): tensor for name, tensor in state.items()}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter(out).items())


class Started(subprocess.Popen):
    """The first is a process from its beginning; the others share this one's imports."""

    all: list[subprocess.Popen]

    def _execute_child(self, command, *options):
        assert command[:3] == [sys.executable, "-m", "qwen_lit"]
        if self.all:
            self.pid, self._child_created = forked(command[3:]), True
        else:
            super()._execute_child(command, *options)
        self.all.append(self)


def test_verify_resume_says_that_a_killed_run_is_the_same_run(command, tmp_path, capfd, monkeypatch):
    arguments = command(tmp_path / "out")
    eight = ["--model.engine", "fast", "--model.products", "fp8", "--model.products_check_every", "1"]
    monkeypatch.setattr(Started, "all", [], raising=False)
    monkeypatch.setattr(verify_resume, "subprocess", SimpleNamespace(Popen=Started))
    assert main(["verify-resume", *arguments[1:], *eight, "--steps", "4"]) == 0
    assert len(Started.all) == 3
    assert "a resumed run is the same run" in capfd.readouterr().out
    assert len(trace(tmp_path / "out" / "verify_resume" / "whole")) == 4


def test_verify_resume_says_when_it_is_another_run(command, whole, tmp_path):
    other = tmp_path / "other"
    assert main(command(other, "--seed_everything", "7")) == 0
    verdict = verify_resume.compare(whole, other, 5)
    assert not verdict.good and not verdict.same_rows and "ANOTHER" in str(verdict)
