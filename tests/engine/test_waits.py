"""What is waited for the host is added up where the device is past it, and looked at every so many steps."""

from types import SimpleNamespace

import pytest
import torch

from qwen_lit.callbacks import link
from qwen_lit.callbacks.link import STEPS, LinkGuard
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies
from qwen_lit.engine.waits import Waits
from qwen_lit.planner.planner import Planned
from tests.engine.test_engine import adapted, batch
from tests.planner.test_planner import FakeGpu, offloading, work_of

CPU = torch.device("cpu")


class Mark:
    """A point in time that a device has passed, or has not."""

    def __init__(self, at, passed=True):
        self.at, self.passed = at, passed

    def __eq__(self, other):
        raise AssertionError("there are thousands of marks between two looks, too many to search them for each other")

    def query(self):
        return self.passed

    def elapsed_time(self, after):
        return after.at - self.at


def waits_of(monkeypatch, *marks):
    left = iter(marks)
    monkeypatch.setattr(Waits, "mark", lambda self: next(left))
    return Waits(CPU)


def test_only_what_the_device_is_past_is_added_up_and_each_wait_once(monkeypatch):
    waits = waits_of(monkeypatch, Mark(0), Mark(250), Mark(1000), late := Mark(1500, passed=False))
    with waits.waiting():
        pass
    assert not waits.pairs
    waits.on = True
    for _ in range(2):
        with waits.waiting():
            pass
    assert waits.take() == 0.25 and waits.take() == 0
    late.passed = True
    assert waits.take() == 0.5 and waits.take() == 0


def test_the_engine_notes_its_waits_for_streamed_layers_and_without_a_device_there_are_none():
    engine = FastEngine(adapted("qwen2"), Policies.of_counts(3, offload_activations=3))
    engine.waits.on = True
    engine.loss_sum(batch(True)).backward()
    assert engine.waits.take() == 0 and not engine.waits.pairs


@pytest.fixture
def run(monkeypatch):
    """A run whose steps take a second each, of which it waits for copies as long as is said."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(link, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, global_step=0)

    def steps(guard, module, count, waited):
        for _ in range(count):
            guard.on_train_batch_start(trainer, module, [], 0)
            assert module.fast.waits.on
            clock.now += 1.0
            trainer.global_step += 1
            monkeypatch.setattr(module.fast.waits, "take", lambda: waited * guard.steps)
            guard.on_train_batch_end(trainer, module, None, [], 0)
            assert not module.fast.waits.on

    return steps


def module_of(planner, found):
    module = SimpleNamespace(fast=found.engine, plan=found.plan, engine_description="")
    module.choice = SimpleNamespace(planner=planner, work=work_of(150_000))

    def use(planned: Planned):
        module.fast, module.plan, module.engine_description = planned.engine, planned.plan, f"fast, {planned.plan}"

    module.use = use
    return module


def test_a_run_that_waits_for_a_slower_link_goes_on_with_another_plan_and_says_so_once(run, caplog):
    caplog.set_level("INFO")
    module, guard = module_of(*offloading(FakeGpu(lambda engine: 0, link=2 * 10**8))), LinkGuard()
    before = module.plan
    run(guard, module, STEPS - 1, 0.3)
    assert module.plan is before and not caplog.messages
    run(guard, module, 1, 0.3)
    assert module.plan.policies.offloaded < before.policies.offloaded
    (line,) = caplog.messages
    assert "held up 30 % of the time (0 % planned), with the link at 20 % of the rate" in line
    assert f"from step {STEPS + 1} on: fast, 1 micro-batch at once" in line


def test_a_run_that_hardly_waits_is_left_alone_and_one_whose_link_is_as_planned_is_asked_ever_less(run, caplog):
    caplog.set_level("INFO")
    gpu = FakeGpu(lambda engine: 0)
    module, guard = module_of(*offloading(gpu)), LinkGuard()
    before = module.plan
    run(guard, module, 3 * STEPS, link.SHARE)
    assert not caplog.messages
    run(guard, module, 7 * STEPS, 0.3)
    assert module.plan is before and len(caplog.messages) == 3
    assert all(one.endswith("the plan stays") for one in caplog.messages)
