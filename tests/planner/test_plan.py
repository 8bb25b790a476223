"""The plan never exceeds its budget, and takes what makes it faster."""

from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from qwen_lit.engine.policy import Policies, Policy, spread
from qwen_lit.errors import UserError
from qwen_lit.kernels.footprint import LayerSize, LinearSize
from qwen_lit.planner.host import HostProfile
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import GIB, parse_bytes
from qwen_lit.planner.search import choose, limit
from qwen_lit.planner.speed import Clock, time_of
from qwen_lit.quantization import planned_weights


def model_of(hidden, inner, query, key, heads, quantized=True, embedding=False):
    """28 layers with LoRA of rank 32 on q, k, v and o, and the vocabulary of Qwen2.5."""

    def linear(inputs, outputs, rank=0):
        return LinearSize(inputs, outputs, rank, 0.0, quantized)

    attention = (linear(hidden, query, 32), linear(hidden, key, 32), linear(hidden, key, 32))
    mlp = (linear(hidden, inner), linear(hidden, inner))
    layer = LayerSize((attention, (linear(query, hidden, 32),), mlp, (linear(inner, hidden),)), heads)
    trained = 28 * 32 * sum(one.inputs + one.outputs for one in (*attention, linear(query, hidden)))
    return ModelMemory((layer,) * 28, 152_064, trained, 2, 2, 304_128 * hidden * embedding, query // heads)


SEVEN = model_of(3584, 18_944, 3584, 512, 28)
"""Qwen2.5-7B, whose embedding is taken to be shared with lm_head unless a test says otherwise."""

SEVEN_WITH_EMBEDDING = model_of(3584, 18_944, 3584, 512, 28, embedding=True)
SEVEN_IN_BF16 = model_of(3584, 18_944, 3584, 512, 28, quantized=False)
STATIC = int(5.25 * GIB)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
FOUR = {n: n * 2048 for n in (4, 2, 1)}
EIGHT = {8: 8 * 2048, **FOUR}


@pytest.mark.parametrize("budget", [7, 8, 12, 16, 24, 40, 80])
def test_a_plan_stays_under_its_budget(budget):
    plan = choose(SEVEN, STATIC, budget * GIB, EIGHT)
    assert plan.estimate < budget * GIB


def test_more_memory_never_gives_a_slower_plan():
    plans = [choose(SEVEN, STATIC, budget * GIB // 8, EIGHT) for budget in range(8 * 8, 80 * 8)]
    costs = [time_of(plan, 2048, SEVEN_WITH_EMBEDDING) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert plans[-1].micro_batches_at_once == 8 and plans[-1].policies.recomputed == 0
    assert plans[0].policies.recomputed > 20


@pytest.mark.parametrize("sizes", [{1: 16_000}, {8: 2048, 4: 1024, 2: 512, 1: 256}], ids=len)
def test_nor_does_it_for_a_small_model(sizes):
    """Holding a layer's weights can be worth recomputing another."""
    small = model_of(1024, 3072, 1024, 512, 16)
    static, budgets = GIB // 2, [budget * GIB // 16 for budget in range(24, 24 * 16)]
    costs = [time_of(choose(small, static, budget, sizes), sizes[1], small) for budget in budgets]
    assert costs == sorted(costs, reverse=True)


def test_little_memory_moves_the_embedding_to_the_cpu_and_then_the_inputs():
    smaller = SEVEN_WITH_EMBEDDING
    plans = [choose(smaller, STATIC, int(budget * GIB), {1: 2048}) for budget in (40, 6, 5.4)]
    assert [(plan.policies.offload_embedding, plan.policies.offload_inputs) for plan in plans] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    assert plans[0].policies.recomputed < plans[1].policies.recomputed <= plans[2].policies.recomputed == 28
    assert plans[-1].policies.loss_chunk == 128
    estimates = [plan.estimate for plan in plans]
    assert estimates == sorted(estimates, reverse=True)
    assert not choose(SEVEN, STATIC, 5 * GIB, {1: 2048}).policies.offload_embedding


def test_short_rows_share_a_micro_batch_where_memory_is_least_too():
    smaller, sizes = SEVEN_WITH_EMBEDDING, {8: 1500, 4: 900, 2: 550, 1: 300}
    plans = [choose(smaller, STATIC, int(budget * GIB), sizes) for budget in (5.2, 5.3, 5.45, 5.6, 6.2)]
    merges = [plan.micro_batches_at_once for plan in plans]
    assert merges == sorted(merges) and merges[0] > 1 and merges[-2:] == [8, 8]
    assert all(plan.policies.offload_embedding and plan.estimate <= limit(plan.budget) for plan in plans)
    # The host's memory holds the inputs of so many tokens alone.
    plan = choose(smaller, STATIC, int(5.2 * GIB), sizes, HostProfile(memory=600 * 28 * 7168))
    assert sizes[plan.micro_batches_at_once] <= 600 and plan.fits


def test_one_long_row_does_not_keep_short_ones_from_sharing_a_micro_batch():
    sizes, machine = {8: 10_000, 4: 9000, 2: 8500, 1: 8192}, HostProfile(launch=3500)
    shared, alone = (choose(SEVEN, STATIC, 24 * GIB, one, machine, mean=250.0) for one in (sizes, {1: 8192}))
    assert shared.micro_batches_at_once == 8 > choose(SEVEN, STATIC, 24 * GIB, sizes, machine).micro_batches_at_once
    assert time_of(shared, 250.0, SEVEN, machine) < 0.5 * time_of(alone, 250.0, SEVEN, machine)


def test_a_long_row_leaves_room_for_the_gaps_between_large_blocks_at_every_budget():
    memory = SEVEN_WITH_EMBEDDING
    for budget in (8, 12, 16, 20, 24, 40, 80):
        for tokens in (8_200, 16_000, 26_800, 30_000, 45_000, 53_200, 120_000):
            plan = choose(memory, STATIC, budget * GIB, {1: tokens})
            held = sum(memory.resident[number] for number in plan.policies.resident)
            grown = plan.estimate - held - STATIC + memory.embedding * plan.policies.offload_embedding
            assert not plan.fits or plan.estimate + 0.35 * grown < budget * GIB
    assert choose(memory, STATIC, 24 * GIB, {1: 78_475}).fits


def test_a_plan_that_does_not_fit_says_so():
    plan = choose(SEVEN, STATIC, 5 * GIB, {1: 2048})
    assert not plan.fits and "MAY NOT FIT" in str(plan)
    assert "MAY NOT FIT" not in str(choose(SEVEN, STATIC, 8 * GIB, {1: 2048}))


@pytest.mark.parametrize("options", [{"layers_to_transform": [2]}, {"rank_pattern": {r"layers\.2\..*": 16}}])
def test_each_layer_counts_for_what_its_own_adapter_needs(options):
    from tests.engine.test_engine import ALL, adapted

    memory = ModelMemory.of(adapted("qwen2", target_modules=ALL, **options), 2)
    saved = [memory.layer(number).saved for number in range(3)]
    assert saved[2] > saved[1] >= saved[0]
    keep, again = Policy.KEEP, Policy.RECOMPUTE
    # Recomputing the layer whose adapter is the largest leaves least for the loss.
    first, last = (memory.moments(100, Policies(way))[0].kept for way in ((again, keep, keep), (keep, keep, again)))
    assert last < first


def test_memory_to_spare_holds_weights_dequantised():
    plans = [choose(SEVEN, STATIC, budget * GIB, FOUR) for budget in (24, 40, 60, 80)]
    assert [len(plan.policies.resident) for plan in plans] == sorted(len(plan.policies.resident) for plan in plans)
    assert len(plans[-1].policies.resident) == 28 and all(plan.estimate < plan.budget for plan in plans)
    assert choose(SEVEN_IN_BF16, STATIC, 80 * GIB, FOUR).policies.resident == frozenset()


def test_weights_that_are_held_can_be_worth_more_than_a_larger_micro_batch():
    assert choose(SEVEN_IN_BF16, STATIC, 60 * GIB, EIGHT).micro_batches_at_once == 8
    plan = choose(SEVEN, STATIC, 60 * GIB, EIGHT)
    assert (plan.micro_batches_at_once, plan.policies.recomputed, len(plan.policies.resident)) == (4, 0, 28)


@pytest.mark.parametrize(("tokens", "budget"), [(2_972, 8), (78_475, 24), (342_733, 80)])
def test_a_very_long_row_goes_in_pieces_and_fits(tokens, budget):
    plan = choose(SEVEN_WITH_EMBEDDING, STATIC, budget * GIB, {1: tokens})
    assert plan.estimate < budget * GIB
    assert bool(plan.policies.mlp_piece) == (tokens > 8192)


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * GIB), ("24 GB", 24 * 10**9), ("1.5gib", 3 * GIB // 2), ("7", 7)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 cards", "-1GiB"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(UserError, match="model.memory_budget"):
        parse_bytes(text)


RECORDED = {
    67.41: (16_384, {"resident": 28}),
    36.90: (8192, {"resident": 28, "offload_activations": 8}),
    36.47: (8192, {"resident": 13}),
    22.09: (8192, {"recompute": 1, "offload_activations": 10, "loss_chunk": 1664}),
    21.86: (4096, {"resident": 14, "offload_activations": 7, "loss_chunk": 1664}),
    14.76: (4096, {"recompute": 2, "offload_activations": 7, "loss_chunk": 1024}),
    7.44: (4096, {"recompute": 26, "loss_chunk": 512}),
    7.31: (4096, {"recompute": 20, "offload_activations": 7, "loss_chunk": 512}),
    7.25: (4096, {"recompute": 17, "offload_activations": 10, "loss_chunk": 512}),
    7.02: (
        32_000,
        {"recompute": 28, "offload_inputs": True, "offload_embedding": True, "mlp_piece": 1024, "loss_chunk": 128},
    ),
    4.96: (2048, {"recompute": 28, "offload_inputs": True, "offload_embedding": True, "loss_chunk": 128}),
}
"""Peaks in GiB of torch's allocator for Qwen2.5-7B on an H100, with tokens and policies; every token was
supervised."""


@pytest.mark.parametrize("recorded", RECORDED)
def test_estimates_are_within_2_percent_of_the_recorded_peaks_above_what_is_constant(recorded):
    """Weights, dequantised ones too, are left out of both sides, and optimizer states, whose paged memory is not
    torch's."""
    tokens, options = RECORDED[recorded]
    policies, memory = Policies.of_counts(28, **options), replace(SEVEN_WITH_EMBEDDING, state_bytes=0)
    weights = STATIC - memory.embedding * policies.offload_embedding
    weights += sum(memory.resident[number] for number in policies.resident)
    estimate = memory.peak(STATIC, tokens, policies) - weights
    assert abs(estimate / (recorded * GIB - weights) - 1) < 0.02


def test_the_sizes_are_those_of_the_model_itself():
    """By hand and read from a model without weights, all numbers are the same."""
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
    names = {name.removesuffix(".weight") for name in planned_weights(base.config, NF4, torch.device("cpu"))}
    assert len(names) == 7 * 28 and {"model.layers.0.self_attn.q_proj", "model.layers.27.mlp.down_proj"} <= names
    found = ModelMemory.of(model, 2, planned_weights(base.config, NF4, torch.device("cpu")))
    # Numbers of a layer, half a byte each, and a scale of a byte for each 64, one of 4 for each 256 of those.
    numbers = 2 * 3584 * (3584 + 512) + 3 * 3584 * 18_944
    assert set(found.blocks) == {found.blocks[0]} and len(found.blocks) == 28
    assert found.blocks[0] == pytest.approx(numbers * (1 / 2 + 1 / 64 + 4 / 64 / 256), rel=1e-4)
    assert asdict(found) == asdict(replace(SEVEN_WITH_EMBEDDING, blocks=found.blocks, head=found.embedding))
    assert not ModelMemory.of(model, 2).blocks


STREAMED = replace(SEVEN_WITH_EMBEDDING, blocks=(120 * 10**6,) * 28, head=SEVEN_WITH_EMBEDDING.embedding)
"""The same with layers that may be streamed."""


def test_a_card_with_memory_to_spare_streams_nothing_and_a_smaller_one_what_does_not_fit():
    assert not choose(STREAMED, STATIC, 80 * GIB, EIGHT).policies.streamed
    for budget in (2.6, 4, 6, 8, 12, 16, 24, 40):
        size = int(budget * GIB)
        plan = choose(STREAMED, STATIC, size, EIGHT)
        policies = plan.policies
        tokens = EIGHT[plan.micro_batches_at_once]
        assert plan.fits and plan.estimate == STREAMED.peak(STATIC, tokens, policies) <= limit(size)
        assert not (policies.streamed and policies.resident)
        # One layer less would not fit.
        fewer = STREAMED.streaming.steps[max(0, len(policies.streamed) - 1)]
        assert not policies.streamed or STREAMED.peak(STATIC, tokens, replace(policies, streamed=fewer)) > limit(size)
        without = choose(SEVEN_WITH_EMBEDDING, STATIC, size, EIGHT)
        assert not without.fits or time_of(plan, 2048, STREAMED) <= time_of(without, 2048, STREAMED)
    assert choose(STREAMED, STATIC, 8 * GIB, EIGHT).policies.recomputed < 20
    assert choose(SEVEN_WITH_EMBEDDING, STATIC, 8 * GIB, EIGHT).policies.recomputed >= 20


def test_more_memory_never_gives_a_slower_plan_where_layers_are_streamed_either():
    budgets = [budget * GIB // 4 for budget in range(3 * 4, 60 * 4)]
    plans = [choose(STREAMED, STATIC, budget, FOUR) for budget in budgets]
    costs = [time_of(plan, 2048, STREAMED) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert {len(plan.policies.streamed) for plan in plans} >= {0, 28}


def test_a_slow_link_is_waited_for_in_each_pass_so_more_tokens_go_together():
    counts = []
    for blocks in (78_000, 16_000):
        plan = choose(STREAMED, STATIC, 6 * GIB, EIGHT, HostProfile(blocks=blocks))
        counts.append((plan.micro_batches_at_once, time_of(plan, 2048, STREAMED, HostProfile(blocks=blocks))))
    assert counts[0][0] <= counts[1][0] and counts[0][1] < counts[1][1]
    # Twice the speed of the link is half of the time, where nothing else counts.
    policies = Policies.of_counts(28, 28, streamed=frozenset(range(28)))
    slow, slower = (Clock(STREAMED, HostProfile(blocks=blocks)).time(policies, 512) for blocks in (2000, 1000))
    assert slower == pytest.approx(2 * slow)


def test_streamed_layers_are_counted_as_their_slots_and_lm_head_at_the_end_of_forward_alone():
    plain = Policies.of_counts(28, 28)
    every = replace(plain, streamed=frozenset(range(28)))
    block, head = STREAMED.blocks[0], STREAMED.head
    before, after = (STREAMED.peak(STATIC, 2048, one) for one in (plain, every))
    assert before - after == (28 - 2) * block
    assert STREAMED.beside(STATIC, plain) - STREAMED.beside(STATIC, replace(plain, offload_head=True)) == head
    moments = STREAMED.moments(2048, replace(plain, offload_head=True))
    names = [moment.name for moment in moments if moment.fixed >= head]
    assert names == ["loss", "forward of the last layer"]
    # Where nothing is recomputed, backward begins with more than the head takes.
    kept = Policies.of_counts(28)
    saved = STREAMED.peak(STATIC, 8192, kept) - STREAMED.peak(STATIC, 8192, replace(kept, offload_head=True))
    assert 0 <= saved <= head


def test_layers_that_cannot_be_streamed_stay_and_the_others_are_spread():
    streaming = replace(STREAMED, blocks=(0, 10, 10, 10, 0, 10, 10)).streaming
    assert streaming.layers == (1, 2, 3, 5, 6) and streaming.chosen(5) == {1, 2, 3, 5, 6}
    assert streaming.chosen(2) <= {1, 2, 3, 5, 6} and len(streaming.chosen(2)) == 2
    assert [streaming.freed(step) for step in streaming.steps] == [0, 0, 0, 10, 20, 30]
    found = [streaming.least(short) for short in (-5, 0, 1, 10, 25, 30, 31)]
    assert [None if one is None else len(one) for one in found] == [0, 0, 3, 3, 5, 5, None]
    assert streaming.copied(streaming.chosen(1)) == 0


def test_host_memory_holds_one_copy_of_the_blocks_and_of_the_rest_one_for_each_process():
    policies = Policies.of_counts(28, 20, 8, streamed=frozenset(range(28)), offload_head=True, offload_embedding=True)
    one, four = (STREAMED.on_host(4096, policies, processes) for processes in (1, 4))
    assert one["blocks of streamed layers"] == four["blocks of streamed layers"] == 28 * STREAMED.blocks[0]
    assert all(four[name] == 4 * size for name, size in one.items() if name != "blocks of streamed layers")
    assert one["lm_head"] == one["embedding"] == STREAMED.head
    waiting = sum(STREAMED.layer(number).saved for number in policies.on_host)
    assert len(policies.on_host) == 8 and one["kept by layers"] == 4096 * waiting
    plan = choose(STREAMED, STATIC, 8 * GIB, EIGHT, HostProfile(0.25, processes=2))
    tokens = EIGHT[plan.micro_batches_at_once]
    assert plan.host == sum(STREAMED.on_host(tokens, plan.policies, 2).values()) > 28 * 10**8
    assert f"{plan.host / GIB:.2f} GiB of host memory" in str(plan) and "layers streamed" in str(plan)


def test_a_host_with_little_memory_keeps_less_of_it_for_activations_beside_streamed_layers():
    host = HostProfile(0.25, 4 * GIB)
    plan = choose(STREAMED, STATIC, 6 * GIB, EIGHT, host)
    own = EIGHT[plan.micro_batches_at_once] * STREAMED.waiting(plan.policies)
    assert plan.policies.streamed and host.has_room(STREAMED.streaming.held(plan.policies.streamed), own)
    free = choose(STREAMED, STATIC, 6 * GIB, EIGHT, replace(host, memory=2**40))
    assert not host.has_room(
        STREAMED.streaming.held(free.policies.streamed),
        EIGHT[free.micro_batches_at_once] * STREAMED.waiting(free.policies),
    )
    assert host.has_room(100 * GIB, 2 * GIB) and not host.has_room(100 * GIB, 2 * GIB + 1)
    assert host.has_room(0, 4 * GIB) and not host.has_room(0, 4 * GIB + 1)
    # Layers are read from their file where the host pins nothing.
    assert choose(STREAMED, STATIC, 4 * GIB, EIGHT, HostProfile(memory=0)).fits


def test_a_search_over_80_layers_and_64_micro_batches_is_made_of_few_walks(monkeypatch):
    layers = replace(SEVEN, layers=SEVEN.layers[:1] * 80)
    plain, walks = ModelMemory._walk, []
    monkeypatch.setattr(ModelMemory, "_walk", lambda *given: walks.append(1) or plain(*given))
    for budget in (24, 40, 80):
        assert choose(layers, STATIC, budget * GIB, {n: 256 * n for n in range(1, 65)}, HostProfile(0.25)).fits
    # One for each number of offloaded and of recomputed layers, whatever is asked.
    assert len(walks) < 2000


def test_offloading_is_planned_where_the_link_has_room_and_the_host_memory():
    memory = SEVEN_WITH_EMBEDDING
    for budget in (8, 12, 16, 24, 40):
        times = []
        for share in (0.0, 0.25, 0.5, 1.0):
            plan = choose(memory, STATIC, budget * GIB, EIGHT, HostProfile(share))
            assert plan.policies.offloaded <= share * 28 and plan.estimate < budget * GIB
            times.append(time_of(plan, 2048, SEVEN_WITH_EMBEDDING))
        assert times == sorted(times, reverse=True) and times[-1] < times[0]
    full = choose(memory, STATIC, 8 * GIB, EIGHT, HostProfile(1.0, 3 * GIB))
    assert 0 < full.policies.offloaded < choose(memory, STATIC, 8 * GIB, EIGHT, HostProfile(1.0)).policies.offloaded
    assert full.policies.offloaded * 2048 * full.micro_batches_at_once * SEVEN.saved <= 3 * GIB
    assert choose(memory, STATIC, 80 * GIB, EIGHT, HostProfile(1.0)).policies.offloaded == 0


def test_inputs_are_not_sent_to_a_host_without_the_memory_for_them():
    memory = SEVEN_WITH_EMBEDDING
    assert choose(memory, STATIC, int(5.5 * GIB), {1: 2048}, HostProfile()).policies.offload_inputs
    assert not choose(memory, STATIC, int(5.5 * GIB), {1: 2048}, HostProfile(memory=GIB // 4)).fits


def test_a_host_that_launches_slowly_is_given_larger_micro_batches():
    slow = HostProfile(launch=3500)
    plans = [choose(SEVEN, STATIC, 16 * GIB, EIGHT, host) for host in (HostProfile(), slow)]
    assert [plan.micro_batches_at_once for plan in plans] == [1, 2]
    assert time_of(plans[0], 2048, SEVEN, slow) > 1.1 * time_of(plans[1], 2048, SEVEN, slow)


def test_layers_that_go_to_the_host_are_spread_evenly():
    for layers in (6, 28, 36):
        for count in range(layers + 1):
            found = sorted(spread(layers, count))
            gaps = {two - one for one, two in pairwise(found)}
            assert len(found) == count and max(gaps, default=0) - min(gaps, default=0) <= 1


def test_very_little_memory_makes_the_pieces_smaller():
    memory = SEVEN_WITH_EMBEDDING
    plans = [choose(memory, STATIC, int(budget * GIB), {1: 32_000}) for budget in (10, 9, 8.7)]
    pieces = [plan.policies.mlp_piece for plan in plans]
    assert pieces == sorted(pieces, reverse=True) and pieces[0] == 8192 > pieces[-1] > 0
    assert all(plan.fits for plan in plans)


def test_a_budget_leaves_room_for_libraries_and_for_the_rounding_of_blocks():
    assert limit(8 * GIB) == int(0.96 * 8 * GIB) - GIB // 4 and limit(40 * GIB) == int(0.96 * 40 * GIB) - GIB // 4


@pytest.mark.parametrize("budget", [16, 20, 24])
def test_as_many_weights_are_held_as_leave_6_percent_of_the_activations_free(budget):
    plan = choose(SEVEN, STATIC, budget * GIB, {1: 2048})
    held, count = (sum(SEVEN.resident[number] for number in plan.policies.resident), len(plan.policies.resident))
    assert 0 < count < 28
    needed = plan.estimate + 0.06 * (plan.estimate - held - STATIC)
    assert needed <= limit(budget * GIB) < needed + SEVEN.resident[count]


def test_what_a_step_takes_however_many_tokens_it_has():
    assert SEVEN.constants == {
        "gradients of the adapter, float32": 4 * SEVEN.trained,
        "adapter in the dtype of the products": 2 * SEVEN.trained,
        "optimizer states": 2 * SEVEN.trained,
        "buffer for a dequantised weight": 2 * 18_944 * 3584,
        "workspaces of cuBLAS": 64 * 2**20,
    }
