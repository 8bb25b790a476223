"""The plan of a run is measured before it is trained, and made anew where it took too much."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from qwen_lit.kernels.plan import GIB, Machine, limit
from qwen_lit.model import planning
from qwen_lit.model.planning import planned_engine
from tests.kernels.test_engine import adapted, batch

BUDGET = 2 * GIB


@pytest.fixture
def asked():
    return []


@pytest.fixture
def plan(monkeypatch, asked):
    """A run whose micro-batches have 50,000 tokens at most; its peaks are what ``peak_of`` says."""

    def make(peak_of, fn="fit"):
        def measured(engine, batch):
            asked.append(engine)
            return peak_of(engine)

        monkeypatch.setattr(planning, "free_memory", lambda device: BUDGET)
        monkeypatch.setattr(planning, "measure_machine", lambda *_: Machine(0.5, 2**40, 100))
        monkeypatch.setattr(planning, "measure_peak", measured)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        data = SimpleNamespace(most_tokens=lambda: 50_000, heaviest=lambda merge: merges.append(merge) or batch(True))
        merges = data.merges = []
        trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cpu")), world_size=1, num_devices=1,
            limit_train_batches=1.0, val_check_interval=1.0, accumulate_grad_batches=8,
            state=SimpleNamespace(fn=fn), precision_plugin=SimpleNamespace(forward_context=nullcontext),
        )  # fmt: skip
        return *planned_engine(trainer, adapted("qwen2"), data, None, 2), merges

    return make


def test_a_plan_that_is_within_the_budget_is_the_one_that_is_trained(plan, asked):
    engine, chosen, peak, merges = plan(lambda engine: BUDGET // 2)
    assert asked == [engine] and merges == [chosen.merge] and BUDGET // 2 < peak < BUDGET // 2 + 2**20
    assert engine.recompute_layers == chosen.recompute_layers and len(engine.away) == chosen.offload_layers


def test_a_plan_that_takes_too_much_is_made_anew(plan, asked):
    def peak_of(engine):
        return limit(BUDGET) + GIB // 2 if len(asked) == 1 else limit(BUDGET) // 2

    engine, chosen, peak, merges = plan(peak_of)
    assert len(asked) == 2 and engine is asked[1] and peak < limit(BUDGET)
    assert merges[1] < merges[0] or engine.recompute_layers > asked[0].recompute_layers


def test_one_that_does_not_fit_is_made_anew_and_the_last_failure_is_told(plan, asked):
    def full(engine):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="heaviest micro-batch does not fit: micro-batches merged by"):
        plan(full)
    assert len(asked) > 1


def test_nothing_is_measured_where_nothing_is_trained(plan, asked):
    engine, _, peak, merges = plan(lambda engine: 0, fn="validate")
    assert engine is not None and peak is None and not asked and not merges
