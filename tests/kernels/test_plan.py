"""The plan never exceeds its budget, and takes what makes it faster."""

from dataclasses import replace

import pytest

from qwen_lit.errors import UserError
from qwen_lit.kernels.plan import GIB, Shape, choose, parse_bytes, time_of

# The shape of Qwen2.5-7B with LoRA on q, k, v and o.
SEVEN = Shape(
    layers=28,
    kept=2 * (3 * 3584 + 2 * 3584 + 2 * 512 + 2 * 18944) + 112,
    input=7168,
    working=2 * (18944 + 3 * 3584),
    fixed=20_185_088 * 8 + 3584 * 18944 * 2,
    vocabulary=304_128,
    again=2 * (3 * 3584 + 2 * 3584 + 2 * 512 + 3 * 18944) + 112,
    attention=76_800,
    mixed=45_056,
    piece=2 * (4 * 18944 + 4 * 3584),
    resident=466_000_000,
)
STATIC = int(5.25 * GIB)


@pytest.mark.parametrize("budget", [7, 8, 12, 16, 24, 40, 80])
def test_a_plan_stays_under_its_budget(budget):
    plan = choose(SEVEN, STATIC, budget * GIB, 2048, [8, 4, 2, 1])
    assert plan.estimate < budget * GIB


def test_more_memory_never_gives_a_slower_plan():
    plans = [choose(SEVEN, STATIC, budget * GIB // 8, 2048, [8, 4, 2, 1]) for budget in range(8 * 8, 80 * 8)]
    costs = [time_of(plan, SEVEN, 2048) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert plans[-1].merge == 8 and plans[-1].recompute_layers == 0
    assert plans[0].recompute_layers > 20


@pytest.mark.parametrize(("tokens", "merges"), [(16_000, [1]), (256, [8, 4, 2, 1])])
def test_nor_does_it_for_a_small_model(tokens, merges):
    """Holding a layer's weights can be worth recomputing another."""
    small = replace(
        SEVEN, kept=2 * (8 * 1024 + 2 * 3072), input=2048, working=2 * (3072 + 3 * 1024), fixed=2**25,
        again=2 * (8 * 1024 + 3 * 3072), resident=2 * 15_700_000,
    )  # fmt: skip
    static, budgets = GIB // 2, [budget * GIB // 16 for budget in range(24, 24 * 16)]
    costs = [time_of(choose(small, static, budget, tokens, merges), small, tokens) for budget in budgets]
    assert costs == sorted(costs, reverse=True)


def test_little_memory_moves_the_embedding_to_the_cpu_and_then_the_inputs():
    smaller = replace(SEVEN, embedding=304_128 * 3584)
    plans = [choose(smaller, STATIC, int(budget * GIB), 2048, [8, 4, 2, 1]) for budget in (8, 6, 5.4)]
    assert [(plan.host_embedding, plan.offload) for plan in plans] == [(False, False), (True, False), (True, True)]
    assert all((plan.merge, plan.recompute_layers, plan.loss_chunk) == (1, 28, 128) for plan in plans[1:])
    estimates = [plan.estimate for plan in plans]
    assert estimates == sorted(estimates, reverse=True)
    assert not choose(SEVEN, STATIC, 5 * GIB, 2048, [1]).host_embedding


def test_a_long_row_leaves_room_for_the_gaps_between_large_blocks_at_every_budget():
    shape = replace(SEVEN, embedding=304_128 * 3584)
    for budget in (8, 12, 16, 20, 24, 40, 80):
        for tokens in (8_200, 16_000, 26_800, 30_000, 45_000, 53_200, 120_000):
            plan = choose(shape, STATIC, budget * GIB, tokens, [1])
            held = plan.resident_layers * shape.resident
            grown = plan.estimate - held - STATIC + shape.embedding * plan.host_embedding
            assert not plan.fits or plan.estimate + 0.35 * grown < budget * GIB
    assert choose(shape, STATIC, 24 * GIB, 78_475, [1]).fits


def test_a_plan_that_does_not_fit_says_so():
    plan = choose(SEVEN, STATIC, 5 * GIB, 2048, [1])
    assert not plan.fits and "MAY NOT FIT" in str(plan)
    assert "MAY NOT FIT" not in str(choose(SEVEN, STATIC, 8 * GIB, 2048, [1]))


@pytest.mark.parametrize("options", [{"layers_to_transform": [2]}, {"rank_pattern": {r"layers\.2\..*": 16}}])
def test_the_layer_that_needs_most_counts(options):
    from tests.kernels.test_engine import ALL, adapted

    first, last = ({**options, "layers_to_transform": [0]} if "layers_to_transform" in options else
                   {"rank_pattern": {r"layers\.0\..*": 16}}), options  # fmt: skip
    wanted, found = (Shape.of(adapted("qwen2", target_modules=ALL, **one), 2) for one in (first, last))
    assert found == wanted
    assert found.kept > Shape.of(adapted("qwen2", target_modules=["q_proj"]), 2).kept


def test_memory_to_spare_holds_weights_dequantised():
    plans = [choose(SEVEN, STATIC, budget * GIB, 2048, [4, 2, 1]) for budget in (24, 40, 60, 80)]
    assert [plan.resident_layers for plan in plans] == sorted(plan.resident_layers for plan in plans)
    assert plans[-1].resident_layers == 28 and all(plan.estimate < plan.budget for plan in plans)
    assert choose(replace(SEVEN, resident=0), STATIC, 80 * GIB, 2048, [4, 2, 1]).resident_layers == 0


def test_weights_that_are_held_can_be_worth_more_than_a_larger_micro_batch():
    assert choose(replace(SEVEN, resident=0), STATIC, 60 * GIB, 2048, [8, 4, 2, 1]).merge == 8
    plan = choose(SEVEN, STATIC, 60 * GIB, 2048, [8, 4, 2, 1])
    assert (plan.merge, plan.recompute_layers, plan.resident_layers) == (4, 0, 28)


@pytest.mark.parametrize(("tokens", "budget"), [(2_972, 8), (78_475, 24), (342_733, 80)])
def test_a_very_long_row_goes_in_pieces_and_fits(tokens, budget):
    plan = choose(replace(SEVEN, embedding=304_128 * 3584), STATIC, budget * GIB, tokens, [1])
    assert plan.estimate < budget * GIB
    assert bool(plan.piece) == (tokens > 8192)


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * GIB), ("24 GB", 24 * 10**9), ("1.5gib", 3 * GIB // 2), ("7", 7)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 cards", "-1GiB"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(UserError, match="model.memory_budget"):
        parse_bytes(text)
