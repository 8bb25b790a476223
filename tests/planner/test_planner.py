"""The plan of a run is measured before it is trained, and made anew where it took too much."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch

from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.offload import UNPINNED
from qwen_lit.engine.products import Products
from qwen_lit.planner.choice import bucket_bytes
from qwen_lit.planner.host import HostProfile
from qwen_lit.planner.plan import GIB, Plan
from qwen_lit.planner.planner import TRIES, Planner, Work, more_beside, possible_at_once, same_bits
from qwen_lit.planner.search import limit
from tests.engine.test_engine import adapted, batch, four_bit

BUDGET = 2 * GIB
HOST = HostProfile(1.0, 2**40, 100, 2**40, rate=10**9)
COUNTS = tuple(possible_at_once(8))


@dataclass
class FakeGpu:
    """A device whose peaks are what ``peak_of`` says of an engine."""

    peak_of: object
    host: HostProfile = HOST
    free_bytes: int = BUDGET
    tried: list[FastEngine] = field(default_factory=list)
    link: int = 10**9
    """Bytes a second, when it is measured anew."""

    def free(self):
        return self.free_bytes

    def allocated(self):
        return 0

    def empty_cache(self):
        pass

    def profile(self, model, memory, processes, meet):
        meet()
        return self.host

    def rate(self, meet):
        meet()
        return self.link

    def peak(self, engine, one):
        self.tried.append(engine)
        return self.peak_of(engine)


def work_of(tokens=50_000, asked=None):
    """Micro-batches of so many tokens each; which heaviest ones are asked for is written down."""
    asked = [] if asked is None else asked
    return Work({count: count * tokens for count in COUNTS}, tokens, lambda count: asked.append(count) or batch(True))


def planner(gpu, agree=int, only=None, budget=None):
    return Planner(adapted("qwen2"), gpu, agree, nullcontext, 2, budget, only)


def test_what_ranks_add_gradients_up_in_is_left_free():
    model = adapted("qwen2")
    size = bucket_bytes(model)
    assert size == 4 * sum(one.numel() for one in FastEngine(model).trained) > 0
    found = Planner(model, FakeGpu(lambda engine: 0), int, nullcontext, 2, reserved=size)
    assert found.budget == BUDGET - size and found.plan(work_of()).plan.budget == BUDGET - size


def full(engine):
    raise torch.OutOfMemoryError("full")


def test_a_plan_that_is_within_the_budget_is_the_one_that_is_trained():
    gpu, asked = FakeGpu(lambda engine: BUDGET // 2), []
    found = planner(gpu).plan(work_of(asked=asked))
    assert gpu.tried == [found.engine] and asked == [found.plan.micro_batches_at_once] and found.plan.fits
    # What the optimizer will hold is added to the measured peak.
    assert BUDGET // 2 < found.peak < BUDGET // 2 + 2**20
    assert found.engine.policies == found.plan.policies


def test_an_optimizer_without_states_adds_nothing_to_the_peak():
    made = Planner(adapted("qwen2"), FakeGpu(lambda engine: BUDGET // 2), int, nullcontext, 0)
    assert made.plan(work_of()).peak == BUDGET // 2


def test_a_plan_that_takes_too_much_is_made_anew():
    gpu, asked = FakeGpu(None), []
    gpu.peak_of = lambda engine: limit(BUDGET) + GIB // 2 if len(gpu.tried) == 1 else limit(BUDGET) // 2
    found = planner(gpu).plan(work_of(asked=asked))
    assert len(gpu.tried) == 2 and found.engine is gpu.tried[1] and found.peak < limit(BUDGET)
    assert asked[1] < asked[0] or found.plan.policies.recomputed > gpu.tried[0].policies.recomputed
    assert found.plan.estimate < limit(BUDGET)


def test_what_a_plan_took_beyond_its_estimate_is_beside_the_next_and_what_did_not_fit_doubles():
    plan = Plan(1, adapted_policies(), GIB, 8 * GIB)
    assert more_beside(0, plan, GIB + GIB // 2) == GIB // 2
    assert more_beside(GIB, plan, GIB + 1) == GIB + GIB // 16
    assert more_beside(0, plan, None) == 8 * GIB // 32 and more_beside(GIB, plan, None) == 2 * GIB


def adapted_policies():
    return FastEngine(adapted("qwen2")).policies


def test_one_that_does_not_fit_is_made_anew_and_the_last_failure_is_told():
    gpu = FakeGpu(full)
    with pytest.raises(torch.OutOfMemoryError, match="heaviest micro-batch does not fit: 1 micro-batch at once"):
        planner(gpu).plan(work_of())
    assert 1 < len(gpu.tried) <= TRIES


def test_the_last_plan_that_is_tried_is_the_smallest_and_fits_where_its_peak_does():
    everything = lambda engine: engine.policies.recomputed == 3 and engine.policies.mlp_piece  # noqa: E731
    gpu = FakeGpu(lambda engine: GIB if everything(engine) and len(gpu.tried) == TRIES else full(engine))
    found = planner(gpu).plan(work_of(20_000))
    assert len(gpu.tried) == TRIES and found.plan.fits and GIB < found.peak < GIB + 2**20
    # Its estimate is that of the plan alone, although all of the budget was said to be taken beside it.
    assert 0 < found.plan.estimate < BUDGET
    gpu = FakeGpu(lambda engine: 2 * BUDGET)
    assert not planner(gpu).plan(work_of(20_000)).plan.fits and len(gpu.tried) <= TRIES


def least_of_two():
    """What two threads agree on: the smaller of their values."""
    meet, told = threading.Barrier(2, timeout=300), {}

    def least(value):
        told[threading.get_ident()] = value
        meet.wait()
        found = min(told.values())
        meet.wait()
        return found

    return least


@pytest.mark.parametrize("failure", ["device", "host", "slow link"])
def test_ranks_that_measure_differently_train_the_same_plan(failure):
    """Two ranks as two threads; a rank that asks the other more or less often than it is asked waits in vain."""
    least = least_of_two()

    def rank(number):
        def peak_of(engine):
            if number == 1 and failure == "device" and len(gpu.tried) == 1:
                full(engine)
            if number == 1 and failure == "host" and engine.policies.offloaded:
                raise RuntimeError(f"{UNPINNED} 64 MiB more of its memory")
            return 0

        share = 0.0 if number == 1 and failure == "slow link" else 1.0
        gpu = FakeGpu(peak_of, HostProfile(share, 2**40, 100, 2**40, rate=10**9))
        return planner(gpu, least).plan(work_of(150_000)), len(gpu.tried)

    with ThreadPoolExecutor(2) as pool:
        (one, tries), (other, more) = pool.map(rank, range(2))
    assert one.plan == other.plan and tries == more == (1 if failure == "slow link" else 2)
    assert bool(one.plan.policies.offloaded) == (failure == "device")


def test_nothing_is_measured_where_nothing_is_trained():
    gpu, asked = FakeGpu(full), []
    found = planner(gpu).plan_unmeasured(work_of(asked=asked))
    assert found.engine.policies == found.plan.policies and found.peak is None and not gpu.tried and not asked


def test_a_budget_below_what_is_free_is_the_budget():
    budgets = [planner(FakeGpu(int), budget=given).budget for given in (None, GIB, 4 * GIB)]
    assert budgets == [BUDGET, GIB, BUDGET]


def test_a_resumed_run_computes_as_many_micro_batches_at_once_as_before_where_that_fits():
    chosen = [
        planner(FakeGpu(lambda engine: 0), only=only).plan(work_of()).plan.micro_batches_at_once
        for only in (None, 1, 3, 4, 8)
    ]
    assert chosen == [2, 1, 3, 4, 2]


def test_a_host_that_does_not_pin_is_not_asked_again():
    def unpinned(engine):
        if engine.policies.on_host:
            raise RuntimeError(f"{UNPINNED} 64 MiB more of its memory")
        return 0

    gpu = FakeGpu(unpinned)
    found = planner(gpu).plan(work_of(150_000))
    assert len(gpu.tried) == 2 and gpu.tried[0].policies.on_host and not found.plan.policies.on_host


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def broken(engine):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        planner(FakeGpu(broken)).plan(work_of())


def test_any_number_of_micro_batches_may_be_computed_at_once_but_those_that_save_no_pass():
    assert possible_at_once(8) == [8, 4, 3, 2, 1] and possible_at_once(7) == [7, 4, 3, 2, 1]
    assert possible_at_once(1) == [1] and len(possible_at_once(64)) == 15
    for per_step in range(1, 40):
        passes = {math.ceil(per_step / one) for one in possible_at_once(per_step)}
        assert passes == {math.ceil(per_step / one) for one in range(1, per_step + 1)}


def test_products_that_a_probe_leaves_in_bf16_are_planned_with_and_looked_for_once(model_folder):
    asked, found = [], Products("fp8", frozenset({(0, 2)}))
    gpu = FakeGpu(lambda engine: BUDGET // 2)
    mine = Planner(
        four_bit(model_folder),
        gpu,
        int,
        nullcontext,
        2,
        products=Products("fp8"),
        probe=lambda engine: asked.append(engine) or found,
    )
    planned = mine.plan(work_of())
    assert gpu.tried == [*asked, planned.engine] and len(asked) == 1 and planned.engine.products == found
    narrow = [group[0].passes.forward.narrow for layer in mine.memory.layers for group in layer.groups]
    assert narrow == [True, True, False, True] + [True] * 4


def offloading(gpu, agree=int, kept="bf16", tokens=150_000):
    """A planner and its plan, in which layers' activations wait on the host."""
    made = Planner(adapted("qwen2"), gpu, agree, nullcontext, 2, kept=kept)
    found = made.plan(work_of(tokens))
    assert found.plan.policies.offloaded >= 2
    return made, found


def bits(engine):
    """The loss and the gradients of a micro-batch."""
    torch.manual_seed(3)
    engine.model.zero_grad()
    loss = engine.loss_sum(batch(True))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in engine.trained)]


@pytest.mark.parametrize("share", [0.5, 0.2, 0.01])
def test_a_link_that_is_slower_than_planned_gets_a_plan_that_computes_the_same_bits(share):
    gpu = FakeGpu(lambda engine: 0, link=int(share * 10**9))
    made, before = offloading(gpu)
    wanted = bits(before.engine)
    after = made.again(work_of(150_000), before)
    assert after.plan.policies.offloaded < before.plan.policies.offloaded and gpu.tried[-1] is after.engine
    assert after.plan.policies.recomputed > before.plan.policies.recomputed and same_bits(after.plan, before.plan)
    assert all(torch.equal(one, other) for one, other in zip(bits(after.engine), wanted, strict=True))
    # It is what the slower link is planned for from here on.
    assert made.host.rate == gpu.link and made.again(work_of(150_000), after) is after


def test_a_link_as_fast_as_planned_or_one_that_cannot_be_measured_leaves_the_plan():
    gpu = FakeGpu(lambda engine: 0)
    made, before = offloading(gpu)
    for gpu.link in (10**9, int(0.95 * 10**9), 0):
        assert made.again(work_of(150_000), before) is before and len(gpu.tried) == 1


def test_a_plan_in_which_other_layers_keep_8_bits_is_not_gone_on_with():
    gpu = FakeGpu(lambda engine: 0, link=10**8)
    made, before = offloading(gpu, kept="int8", tokens=200_000)
    after = made.again(work_of(200_000), before)
    assert after is before and before.plan.policies.packed == 3 and len(gpu.tried) == 1
    # The plan for the slower link recomputes one of them, which then keeps bf16.
    assert made.plan_unmeasured(work_of(200_000)).plan.policies.packed < 3


def test_where_the_other_plan_takes_too_much_the_first_one_goes_on():
    gpu = FakeGpu(lambda engine: 0 if engine.policies.offloaded == 2 else 2 * BUDGET, link=10**8)
    made, before = offloading(gpu)
    wanted = bits(before.engine)
    after = made.again(work_of(150_000), before)
    assert after.plan is before.plan and len(gpu.tried) == 2
    assert all(torch.equal(one, other) for one, other in zip(bits(after.engine), wanted, strict=True))


def test_the_slowest_link_of_all_ranks_is_planned_for_on_each():
    least = least_of_two()

    def rank(number):
        made, before = offloading(FakeGpu(lambda engine: 0, link=10**9 // (1 + 3 * number)), least)
        return made.again(work_of(150_000), before).plan

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(rank, range(2))
    assert one == other and one.policies.offloaded < 2


def test_a_slow_link_is_waited_for_by_arithmetic_and_a_fast_one_is_not():
    made, found = offloading(FakeGpu(lambda engine: 0))
    assert made.waiting(work_of(150_000), found.plan) == 0
    made.host = HostProfile(1.0, 2**40, 100, 2**6)
    assert 0.1 < made.waiting(work_of(150_000), found.plan) < 1
