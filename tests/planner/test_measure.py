"""What is measured: the host's memory, and a plan whose peak is within its budget."""

import psutil
import pytest
import torch

from qwen_lit.planner import measure as probe
from qwen_lit.planner.measure import TRIES, host_memory, is_full, measure_host, settle
from qwen_lit.planner.plan import GIB, HostProfile, Plan, limit


@pytest.fixture
def group(monkeypatch, tmp_path):
    """A process in a control group of another, on a machine with 5,000 bytes free; ``limit`` gives one a limit."""
    monkeypatch.setattr(probe, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(probe, "MINE", tmp_path / "mine")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5000})())
    inner = tmp_path / "groups" / "job" / "step"
    inner.mkdir(parents=True)
    (tmp_path / "mine").write_text("1:name=systemd:/x\n0::/job/step\n")

    def limit(folder, most, used):
        (tmp_path / "groups" / folder / "memory.max").write_text(f"{most}\n")
        (tmp_path / "groups" / folder / "memory.current").write_text(f"{used}\n")

    return limit


def test_host_memory_is_what_the_machine_and_every_control_group_leave(group):
    assert host_memory() == 5000
    group("job/step", "max", 100)
    assert host_memory() == 5000
    group("job", 3000, 1000)
    assert host_memory() == 2000
    group("job/step", 1500, 100)
    assert host_memory() == 1400
    group(".", 100, 200)
    assert host_memory() == 0


def test_host_memory_is_the_machines_where_there_is_no_control_group(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "MINE", tmp_path / "none")
    assert 0 < host_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("the host does not pin 64 MiB more of its memory (...)"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
    ],
)
def test_what_says_that_memory_is_short_is_told_from_faults(error, full):
    assert is_full(error) is full


def test_a_device_too_full_to_be_measured_is_planned_for_as_any(monkeypatch, group):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(probe, "_share_and_launch", full)
    assert measure_host(None, None, None, 2) == HostProfile(0.0, 1250, 0)
    monkeypatch.setattr(probe, "_share_and_launch", lambda *_: (0.3, 900.7))
    assert measure_host(None, None, None, 1) == HostProfile(0.25, 2500, 900)


BUDGET = 8 * GIB


def planner(asked, smallest=4 * GIB):
    """Plans that take all they may, down to the smallest."""

    def plan_with(beside):
        asked.append(beside)
        estimate = limit(BUDGET) - beside
        fits = estimate >= smallest
        return Plan(1, 0, 128, estimate if fits else smallest + beside, BUDGET, fits=fits)

    return plan_with


def test_a_plan_that_is_within_its_budget_is_taken_at_once():
    asked = []
    plan, peak = settle(planner(asked), lambda plan: plan.estimate)
    assert asked == [0] and peak == plan.estimate


def test_what_a_plan_took_beyond_its_estimate_is_planned_for():
    asked = []
    plan, peak = settle(planner(asked), lambda plan: plan.estimate + GIB // 2)
    assert asked == [0, GIB // 2] and peak == limit(BUDGET)


def test_what_did_not_fit_is_planned_smaller_and_smaller():
    asked = []
    plan, peak = settle(planner(asked), lambda plan: None if plan.estimate > 7 * GIB else plan.estimate)
    assert asked == [0, BUDGET // 32, BUDGET // 16] and peak == plan.estimate


def test_the_last_plan_that_is_tried_is_the_smallest_and_its_failure_is_told():
    asked = []
    plan, peak = settle(planner(asked), lambda plan: None if plan.fits else 4 * GIB)
    assert len(asked) == TRIES and plan.fits and peak == plan.estimate == 4 * GIB
    for too_much in (lambda plan: None, lambda plan: 2 * BUDGET):
        plan, peak = settle(planner(asked), too_much)
        assert not plan.fits and peak == too_much(plan)
