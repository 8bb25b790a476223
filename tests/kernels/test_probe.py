"""What is measured: the host's memory, and a plan whose peak is within its budget."""

import psutil
import pytest

from qwen_lit.kernels import probe
from qwen_lit.kernels.plan import GIB, Plan, limit
from qwen_lit.kernels.probe import TRIES, host_memory, settle


@pytest.mark.parametrize(
    ("most", "used", "free"), [("3000", "1000", 2000), ("max", "1000", None), (str(2**62), "1000", None)]
)
def test_host_memory_is_what_the_machine_and_the_control_group_leave(monkeypatch, tmp_path, most, used, free):
    monkeypatch.setattr(probe, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text(most + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5000})())
    assert host_memory() == (5000 if free is None else free)


def test_host_memory_is_the_machines_where_there_is_no_control_group(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "GROUP", tmp_path)
    assert 0 < host_memory() <= psutil.virtual_memory().total


BUDGET = 8 * GIB


def planner(asked, smallest=4 * GIB):
    """Plans that take all they may, down to the smallest."""

    def plan_with(beside):
        asked.append(beside)
        estimate = limit(BUDGET) - beside
        return Plan(1, 0, 128, max(estimate, smallest), BUDGET, fits=estimate >= smallest)

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
    plan, peak = settle(planner(asked), lambda plan: None if plan.estimate > 6.8 * GIB else plan.estimate)
    assert asked == [0, GIB // 4, GIB // 2, GIB] and peak == plan.estimate


def test_the_smallest_plan_is_tried_and_its_failure_told():
    asked = []
    plan, peak = settle(planner(asked, smallest=limit(BUDGET) - GIB // 3), lambda plan: None)
    assert not plan.fits and peak is None and len(asked) == 3
    asked.clear()
    assert settle(planner(asked), lambda plan: None)[1] is None and len(asked) == TRIES
