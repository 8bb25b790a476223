"""The plan of a run is measured before it is trained, and made anew where it took too much."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from qwen_lit.distributed import least
from qwen_lit.engine.offload import UNPINNED
from qwen_lit.planner import planner as planning
from qwen_lit.planner.plan import GIB, HostProfile, limit
from qwen_lit.planner.planner import planned_engine, possible_at_once
from tests.engine.test_engine import adapted, batch

BUDGET = 2 * GIB
MACHINE = HostProfile(1.0, 2**40, 100)


@pytest.fixture
def asked():
    return []


@pytest.fixture
def plan(monkeypatch, asked):
    """A run with micro-batches of so many tokens; its peaks are what ``peak_of`` says."""

    mine = threading.local()

    def measured(engine, batch):
        asked.append(engine)
        return mine.peak_of(engine)

    monkeypatch.setattr(planning, "free_memory", lambda device: BUDGET)
    monkeypatch.setattr(planning, "measure_host", lambda *_: mine.machine)
    monkeypatch.setattr(planning, "measure_peak", measured)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(planning, "least", lambda trainer, value: mine.least(trainer, value))

    def make(peak_of, fn="fit", before=None, tokens=50_000, least=least, machine=MACHINE):
        mine.peak_of, mine.least, mine.machine = peak_of, least, machine
        data = SimpleNamespace(
            most_tokens=lambda counts: {count: count * tokens for count in counts},
            mean_tokens=lambda: tokens,
            heaviest=lambda merge: merges.append(merge) or batch(True),
        )
        merges = data.merges = []
        trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            world_size=1,
            num_devices=1,
            micro_batches_per_step=8,
            state=SimpleNamespace(fn=fn),
            precision_plugin=SimpleNamespace(forward_context=nullcontext),
        )
        return *planned_engine(trainer, adapted("qwen2"), data, None, 2, before), merges

    return make


def test_a_plan_that_is_within_the_budget_is_the_one_that_is_trained(plan, asked):
    engine, chosen, peak, merges = plan(lambda engine: BUDGET // 2)
    assert asked == [engine] and merges == [chosen.micro_batches_at_once] and BUDGET // 2 < peak < BUDGET // 2 + 2**20
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

    with pytest.raises(torch.OutOfMemoryError, match="heaviest micro-batch does not fit: 1 micro-batch at once"):
        plan(full)
    assert len(asked) > 1


@pytest.mark.parametrize("failure", ["device", "host", "slow link"])
def test_ranks_that_measure_differently_train_the_same_plan(plan, monkeypatch, failure):
    """Two ranks as two threads; a rank that asks the other more or less often than it is asked waits in vain."""
    meet, told = threading.Barrier(2, timeout=20), {}

    def least(trainer, value):
        told[threading.get_ident()] = value
        meet.wait()
        found = min(told.values())
        meet.wait()
        return found

    def rank(number):
        tried = []

        def peak_of(engine):
            tried.append(engine)
            if number == 1 and failure == "device" and len(tried) == 1:
                raise torch.OutOfMemoryError("full")
            if number == 1 and failure == "host" and engine.away:
                raise RuntimeError(f"{UNPINNED} 64 MiB more of its memory")
            return 0

        share = 0.0 if number == 1 and failure == "slow link" else 1.0
        return plan(peak_of, tokens=150_000, least=least, machine=HostProfile(share, 2**40, 100)), len(tried)

    with ThreadPoolExecutor(2) as pool:
        (one, tries), (other, more) = pool.map(rank, range(2))
    assert one[1] == other[1] and tries == more == (1 if failure == "slow link" else 2)
    assert bool(one[1].offload_layers) == (failure == "device")


def test_nothing_is_measured_where_nothing_is_trained(plan, asked):
    engine, _, peak, merges = plan(lambda engine: 0, fn="validate")
    assert engine is not None and peak is None and not asked and not merges


def test_a_resumed_run_computes_as_many_micro_batches_at_once_as_before_where_that_fits(plan):
    chosen = plan(lambda engine: 0)[1]
    assert chosen.micro_batches_at_once == 2
    *_, merged = plan(lambda engine: 0, before=1)
    assert merged == [1]
    assert [plan(lambda engine: 0, before=one)[1].micro_batches_at_once for one in (None, 3, 4, 5, 8)] == [
        2,
        3,
        4,
        2,
        2,
    ]


def test_a_host_that_does_not_pin_is_not_asked_again(plan, asked):
    def unpinned(engine):
        if engine.away or engine.offload:
            raise RuntimeError(f"{UNPINNED} 64 MiB more of its memory")
        return 0

    engine, chosen, *_ = plan(unpinned, tokens=150_000)
    assert len(asked) == 2 and asked[0].away and not chosen.offload_layers and not chosen.offload


def test_other_errors_are_not_taken_for_a_lack_of_memory(plan):
    def broken(engine):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        plan(broken)


def test_any_number_of_micro_batches_may_be_computed_at_once_but_those_that_save_no_pass():
    assert possible_at_once(8) == [8, 4, 3, 2, 1] and possible_at_once(7) == [7, 4, 3, 2, 1]
    assert possible_at_once(1) == [1] and len(possible_at_once(64)) == 15
    for per_step in range(1, 40):
        passes = {math.ceil(per_step / one) for one in possible_at_once(per_step)}
        assert passes == {math.ceil(per_step / one) for one in range(1, per_step + 1)}
