"""Up to how many tokens micro-batches are graphs, and that their memory is in the plan."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qwen_lit.engine.policy import Policies
from qwen_lit.model.settings import ModelSettings
from qwen_lit.planner.choice import without_graphs
from qwen_lit.planner.graphs import MOST, can_record, graph_bytes, graph_tokens
from qwen_lit.planner.host import HostProfile
from qwen_lit.planner.memory import MEMORY, ModelMemory
from qwen_lit.planner.plan import GIB
from qwen_lit.planner.planner import Planner
from qwen_lit.planner.search import limit
from qwen_lit.planner.speed import COSTS, Clock
from tests.engine.test_engine import adapted
from tests.planner.test_planner import BUDGET, FakeGpu, nullcontext, work_of

MEMORY_OF = ModelMemory.of(adapted("qwen2"), 2)
EACH = int(COSTS.launch_tokens + COSTS.dequantise_tokens)
SHARE = COSTS.products * (1 - Clock(MEMORY_OF, HostProfile()).head_share)


def launching(tokens):
    """A host that launches a micro-batch while the device computes one of so many tokens."""
    return HostProfile(1.0, 2**40, math.ceil((tokens + EACH) / SHARE), 2**40)


HOST = launching(2048)


def test_what_takes_longer_to_compute_than_to_launch_is_no_graph():
    def tokens(host, largest=100_000, usual=200.0):
        return graph_tokens(Clock(MEMORY_OF, host), largest, usual)

    assert tokens(HOST) == 2048 and tokens(launching(2040)) == 1792 and tokens(launching(10**6)) == MOST
    # No shape is larger than the largest micro-batch needs.
    assert tokens(HOST, largest=900) == 1024
    # Most are larger, or launching takes no time.
    assert tokens(HOST, usual=2100.0) == tokens(HostProfile()) == tokens(launching(200)) == 0


@pytest.mark.parametrize(
    "policies",
    [
        Policies.of_counts(3, 1),
        Policies.of_counts(3, offload_activations=1),
        Policies.of_counts(3, offload_embedding=True),
        Policies.of_counts(3, offload_head=True),
        Policies.of_counts(3, mlp_piece=64),
        Policies.of_counts(3, streamed=frozenset([1])),
    ],
    ids=["recomputed", "offloaded", "embedding", "head", "pieces", "streamed"],
)
def test_graphs_are_for_plans_that_leave_everything_on_the_device(policies):
    assert not can_record(policies) and can_record(Policies.of_counts(3, resident=2))


def test_graphs_take_what_their_largest_micro_batch_keeps():
    policies = Policies.of_counts(3)
    small, large = (graph_bytes(MEMORY_OF, tokens, policies) for tokens in (1024, 2048))
    assert small - MEMORY.graphs > 1024 * 3 * MEMORY_OF.saved
    assert large - MEMORY.graphs == pytest.approx(2 * (small - MEMORY.graphs), rel=0.3)


def planned(graphs=None, tokens=200, host=HOST, budget=BUDGET, peak=0):
    gpu = FakeGpu(lambda engine: peak, host, free_bytes=budget)
    return Planner(adapted("qwen2"), gpu, int, nullcontext, 2, graphs=graphs).plan(work_of(tokens))


def test_the_memory_of_graphs_is_in_the_plan_and_beside_what_is_measured():
    without, with_graphs = planned(0), planned()
    plan = with_graphs.plan
    assert plan.graph_tokens == 1792 and plan.graph_bytes > MEMORY.graphs and without.plan.graph_tokens == 0
    assert plan.estimate == without.plan.estimate + plan.graph_bytes
    assert with_graphs.peak == without.peak + plan.graph_bytes
    assert "micro-batches of up to 1792 tokens as CUDA graphs" in str(plan)
    assert replace(plan, graph_tokens=0, graph_bytes=0, estimate=without.plan.estimate) == without.plan


def test_there_are_none_where_they_have_no_room_or_long_rows_gain_nothing():
    least = planned(0).plan.estimate
    # Room for the plan, and not for graphs beside it.
    small = int((least + MEMORY.graphs + MEMORY.libraries) / (1 - MEMORY.margin))
    found = planned(budget=small).plan
    assert found.graph_tokens == 0 and found.fits and found.estimate <= limit(small)
    assert planned(tokens=5000).plan.graph_tokens == 0
    assert planned(host=replace(HOST, launch=0)).plan.graph_tokens == 0


def test_a_resumed_run_has_graphs_up_to_what_it_had():
    assert [planned(tokens).plan.graph_tokens for tokens in (1280, 0)] == [1280, 0]


def test_what_cannot_be_recorded_says_why():
    def why(command="fit", scaler=None, **settings):
        trainer = SimpleNamespace(state=SimpleNamespace(fn=command), precision_plugin=SimpleNamespace(scaler=scaler))
        given = SimpleNamespace(**{"graphs": "auto", "neftune_noise_alpha": 0.0, **settings})
        return without_graphs(given, trainer)

    assert why() is None and ModelSettings.graphs == "auto"
    assert why(graphs="off") == "model.graphs is off"
    assert "NEFTune" in why(neftune_noise_alpha=5.0)
    assert "float16" in why(scaler=object()) and why("validate") == "nothing is trained"
    assert planned(0, budget=4 * GIB).plan.graph_bytes == 0
