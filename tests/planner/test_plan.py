"""The plan never exceeds its budget, and takes what makes it faster."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_lit.engine.engine import spread
from qwen_lit.errors import UserError
from qwen_lit.planner.plan import GIB, HostProfile, Shape, choose, limit, parse_bytes, time_of

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
FOUR = {n: n * 2048 for n in (4, 2, 1)}
EIGHT = {8: 8 * 2048, **FOUR}


@pytest.mark.parametrize("budget", [7, 8, 12, 16, 24, 40, 80])
def test_a_plan_stays_under_its_budget(budget):
    plan = choose(SEVEN, STATIC, budget * GIB, EIGHT)
    assert plan.estimate < budget * GIB


def test_more_memory_never_gives_a_slower_plan():
    plans = [choose(SEVEN, STATIC, budget * GIB // 8, EIGHT) for budget in range(8 * 8, 80 * 8)]
    costs = [time_of(plan, SEVEN, 2048) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert plans[-1].micro_batches_at_once == 8 and plans[-1].recompute_layers == 0
    assert plans[0].recompute_layers > 20


@pytest.mark.parametrize("sizes", [{1: 16_000}, {8: 2048, 4: 1024, 2: 512, 1: 256}], ids=len)
def test_nor_does_it_for_a_small_model(sizes):
    """Holding a layer's weights can be worth recomputing another."""
    small = replace(
        SEVEN,
        kept=2 * (8 * 1024 + 2 * 3072),
        input=2048,
        working=2 * (3072 + 3 * 1024),
        fixed=2**25,
        again=2 * (8 * 1024 + 3 * 3072),
        resident=2 * 15_700_000,
    )
    static, budgets = GIB // 2, [budget * GIB // 16 for budget in range(24, 24 * 16)]
    costs = [time_of(choose(small, static, budget, sizes), small, sizes[1]) for budget in budgets]
    assert costs == sorted(costs, reverse=True)


def test_little_memory_moves_the_embedding_to_the_cpu_and_then_the_inputs():
    smaller = replace(SEVEN, embedding=304_128 * 3584)
    plans = [choose(smaller, STATIC, int(budget * GIB), {1: 2048}) for budget in (8, 6, 5.4)]
    assert [(plan.host_embedding, plan.offload) for plan in plans] == [(False, False), (True, False), (True, True)]
    assert all(
        (plan.micro_batches_at_once, plan.recompute_layers, plan.loss_chunk) == (1, 28, 128) for plan in plans[1:]
    )
    estimates = [plan.estimate for plan in plans]
    assert estimates == sorted(estimates, reverse=True)
    assert not choose(SEVEN, STATIC, 5 * GIB, {1: 2048}).host_embedding


def test_short_rows_share_a_micro_batch_where_memory_is_least_too():
    smaller, sizes = replace(SEVEN, embedding=304_128 * 3584), {8: 1500, 4: 900, 2: 550, 1: 300}
    plans = [choose(smaller, STATIC, int(budget * GIB), sizes) for budget in (5.1, 5.2, 5.35, 5.6, 6.2)]
    merges = [plan.micro_batches_at_once for plan in plans]
    assert merges == sorted(merges) and merges[0] > 1 and merges[-2:] == [8, 8]
    assert all(plan.host_embedding and plan.estimate <= limit(plan.budget) for plan in plans)
    # The host's memory holds the inputs of so many tokens alone.
    plan = choose(smaller, STATIC, int(5.1 * GIB), sizes, HostProfile(memory=600 * 28 * 7168))
    assert sizes[plan.micro_batches_at_once] <= 600 and plan.fits


def test_one_long_row_does_not_keep_short_ones_from_sharing_a_micro_batch():
    sizes, machine = {8: 10_000, 4: 9000, 2: 8500, 1: 8192}, HostProfile(launch=3500)
    shared, alone = (choose(SEVEN, STATIC, 24 * GIB, one, machine, mean=250.0) for one in (sizes, {1: 8192}))
    assert shared.micro_batches_at_once == 8 > choose(SEVEN, STATIC, 24 * GIB, sizes, machine).micro_batches_at_once
    assert time_of(shared, SEVEN, 250.0, 3500) < 0.5 * time_of(alone, SEVEN, 250.0, 3500)


def test_a_long_row_leaves_room_for_the_gaps_between_large_blocks_at_every_budget():
    shape = replace(SEVEN, embedding=304_128 * 3584)
    for budget in (8, 12, 16, 20, 24, 40, 80):
        for tokens in (8_200, 16_000, 26_800, 30_000, 45_000, 53_200, 120_000):
            plan = choose(shape, STATIC, budget * GIB, {1: tokens})
            held = plan.resident_layers * shape.resident
            grown = plan.estimate - held - STATIC + shape.embedding * plan.host_embedding
            assert not plan.fits or plan.estimate + 0.35 * grown < budget * GIB
    assert choose(shape, STATIC, 24 * GIB, {1: 78_475}).fits


def test_a_plan_that_does_not_fit_says_so():
    plan = choose(SEVEN, STATIC, 5 * GIB, {1: 2048})
    assert not plan.fits and "MAY NOT FIT" in str(plan)
    assert "MAY NOT FIT" not in str(choose(SEVEN, STATIC, 8 * GIB, {1: 2048}))


@pytest.mark.parametrize("options", [{"layers_to_transform": [2]}, {"rank_pattern": {r"layers\.2\..*": 16}}])
def test_the_layer_that_needs_most_counts(options):
    from tests.engine.test_engine import ALL, adapted

    first, last = (
        (
            {**options, "layers_to_transform": [0]}
            if "layers_to_transform" in options
            else {"rank_pattern": {r"layers\.0\..*": 16}}
        ),
        options,
    )
    wanted, found = (Shape.of(adapted("qwen2", target_modules=ALL, **one), 2) for one in (first, last))
    assert found == wanted
    assert found.kept > Shape.of(adapted("qwen2", target_modules=["q_proj"]), 2).kept


def test_memory_to_spare_holds_weights_dequantised():
    plans = [choose(SEVEN, STATIC, budget * GIB, FOUR) for budget in (24, 40, 60, 80)]
    assert [plan.resident_layers for plan in plans] == sorted(plan.resident_layers for plan in plans)
    assert plans[-1].resident_layers == 28 and all(plan.estimate < plan.budget for plan in plans)
    assert choose(replace(SEVEN, resident=0), STATIC, 80 * GIB, FOUR).resident_layers == 0


def test_weights_that_are_held_can_be_worth_more_than_a_larger_micro_batch():
    assert choose(replace(SEVEN, resident=0), STATIC, 60 * GIB, EIGHT).micro_batches_at_once == 8
    plan = choose(SEVEN, STATIC, 60 * GIB, EIGHT)
    assert (plan.micro_batches_at_once, plan.recompute_layers, plan.resident_layers) == (4, 0, 28)


@pytest.mark.parametrize(("tokens", "budget"), [(2_972, 8), (78_475, 24), (342_733, 80)])
def test_a_very_long_row_goes_in_pieces_and_fits(tokens, budget):
    plan = choose(replace(SEVEN, embedding=304_128 * 3584), STATIC, budget * GIB, {1: tokens})
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


def test_estimates_are_within_2_percent_of_the_peaks_of_qwen25_7b_on_an_h100():
    """Peaks in GiB, as measured; every token was supervised."""
    with torch.device("meta"):
        base = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=152_064,
                hidden_size=3584,
                intermediate_size=18_944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
                tie_word_embeddings=False,
            )
        ).to(torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    shape, held = Shape.of(model, 2), 466_000_000
    found = {
        67.41: shape.peak(STATIC + 28 * held, 16_384, 0, 2048),
        36.90: shape.peak(STATIC + 28 * held, 8192, 0, 2048, away=8),
        36.47: shape.peak(STATIC + 13 * held, 8192, 0, 2048),
        22.09: shape.peak(STATIC, 8192, 1, 1664, away=10),
        21.86: shape.peak(STATIC + 14 * held, 4096, 0, 1664, away=7),
        14.76: shape.peak(STATIC, 4096, 2, 1024, away=7),
        7.44: shape.peak(STATIC, 4096, 26, 512),
        7.31: shape.peak(STATIC, 4096, 20, 512, away=7),
        7.25: shape.peak(STATIC, 4096, 17, 512, away=10),
        7.02: shape.peak(STATIC, 32_000, 28, 128, True, True, 1024),
        4.96: shape.peak(STATIC, 2048, 28, 128, True, True),
    }
    wrong = {peak: one / GIB for peak, one in found.items() if abs(one / GIB / peak - 1) > 0.02}
    assert not wrong


def test_offloading_is_planned_where_the_link_has_room_and_the_host_memory():
    shape = replace(SEVEN, embedding=304_128 * 3584)
    for budget in (8, 12, 16, 24, 40):
        times = []
        for share in (0.0, 0.25, 0.5, 1.0):
            plan = choose(shape, STATIC, budget * GIB, EIGHT, HostProfile(share))
            assert plan.offload_layers <= share * 28 and plan.estimate < budget * GIB
            times.append(time_of(plan, SEVEN, 2048))
        assert times == sorted(times, reverse=True) and times[-1] < times[0]
    full = choose(shape, STATIC, 8 * GIB, EIGHT, HostProfile(1.0, 2 * GIB))
    assert 0 < full.offload_layers < choose(shape, STATIC, 8 * GIB, EIGHT, HostProfile(1.0)).offload_layers
    assert full.offload_layers * 2048 * full.micro_batches_at_once * SEVEN.kept <= 2 * GIB
    assert choose(shape, STATIC, 80 * GIB, EIGHT, HostProfile(1.0)).offload_layers == 0


def test_inputs_are_not_sent_to_a_host_without_the_memory_for_them():
    shape = replace(SEVEN, embedding=304_128 * 3584)
    assert choose(shape, STATIC, int(5.5 * GIB), {1: 2048}, HostProfile()).offload
    assert not choose(shape, STATIC, int(5.5 * GIB), {1: 2048}, HostProfile(memory=GIB // 4)).fits


def test_a_host_that_launches_slowly_is_given_larger_micro_batches():
    plans = [choose(SEVEN, STATIC, 16 * GIB, EIGHT, HostProfile(launch=launch)) for launch in (0, 3500)]
    assert [plan.micro_batches_at_once for plan in plans] == [1, 2]
    assert time_of(plans[0], SEVEN, 2048, 3500) > 1.1 * time_of(plans[1], SEVEN, 2048, 3500)


def test_layers_that_go_to_the_host_are_spread_evenly():
    for layers in (6, 28, 36):
        for count in range(layers + 1):
            found = sorted(spread(layers, count))
            gaps = {two - one for one, two in pairwise(found)}
            assert len(found) == count and max(gaps, default=0) - min(gaps, default=0) <= 1


def test_very_little_memory_makes_the_pieces_smaller():
    shape = replace(SEVEN, embedding=304_128 * 3584)
    plans = [choose(shape, STATIC, int(budget * GIB), {1: 32_000}) for budget in (10, 9, 8.6)]
    pieces = [plan.piece for plan in plans]
    assert pieces == sorted(pieces, reverse=True) and pieces[0] == 8192 > pieces[-1] > 0
    assert all(plan.fits for plan in plans)
