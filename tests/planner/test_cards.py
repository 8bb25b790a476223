"""Which model trains on which card, by the planner's arithmetic: promised budgets, and the table of the page."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2Config

from qwen_lit.commands.plan import static_bytes
from qwen_lit.commands.plan_advice import Packed, advice
from qwen_lit.engine.policy import Policies
from qwen_lit.model.load import empty_model
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import GIB
from qwen_lit.planner.planner import possible_at_once
from qwen_lit.planner.search import choose
from qwen_lit.planner.speed import time_of
from qwen_lit.quantization import planned_weights

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
SHAPES = {
    "7B": (3584, 18944, 28, 28, 4),
    "14B": (5120, 13824, 48, 40, 8),
    "32B": (5120, 27648, 64, 40, 8),
    "72B": (8192, 29568, 80, 64, 8),
}
"""Of Qwen2.5: hidden and intermediate size, layers, heads of queries and of keys."""
SIZES = {count: 2048 * count for count in possible_at_once(8)}
"""16,384 tokens a step in rows of 2,048."""


@cache
def shape(name):
    """The memory and the weights of a model, with an adapter of rank 32 on q, k, v and o."""
    hidden, inner, layers, heads, key_heads = SHAPES[name]
    config = Qwen2Config(
        vocab_size=152_064,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        lora = LoraConfig(r=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        model = get_peft_model(empty_model(config, torch.bfloat16), lora)
    held = planned_weights(config, NF4, torch.device("cpu"))
    return ModelMemory.of(model, 2, held), static_bytes(model, held)


@pytest.mark.parametrize(
    ("name", "budget"), [("7B", 4), ("14B", 4), ("14B", 8), ("32B", 8), ("32B", 12), ("72B", 12), ("72B", 24)]
)
def test_models_that_are_larger_than_the_card_train_with_their_layers_streamed(name, budget):
    memory, static = shape(name)
    assert static > budget * GIB
    plan = choose(memory, static, budget * GIB, SIZES)
    assert plan.fits and len(plan.policies.streamed) > 0.6 * len(memory.layers) and not plan.policies.resident
    # A pass over the layers takes longer than their copies, so most of the time is computing.
    assert time_of(plan, 2048, memory) < 1.65
    least = min(memory.blocks) * len(plan.policies.streamed)
    assert least <= plan.host <= static + 16384 * memory.layers[0].hidden * 2 * len(memory.layers)


def test_the_least_memory_of_a_7b():
    """2,048 tokens within 2.6 GiB, of which the libraries and the allocator's rounding have their part."""
    memory, static = shape("7B")
    plan = choose(memory, static, int(2.6 * GIB), {1: 2048})
    assert plan.fits and plan.estimate < 2.3 * GIB and plan.policies.recomputed == 28


def test_what_streaming_gives_back_saves_recomputing_and_time_in_8_gib():
    memory, static = shape("7B")
    stays = choose(replace(memory, blocks=()), static, 8 * GIB, SIZES)
    plan = choose(memory, static, 8 * GIB, SIZES)
    assert plan.policies.recomputed < stays.policies.recomputed and plan.policies.streamed
    assert time_of(plan, 2048, memory) < 0.95 * time_of(stays, 2048, memory)


def test_keeping_gate_and_up_in_8_bits_takes_a_third_of_what_layers_keep_and_saves_time():
    memory, static = shape("7B")
    packed = replace(memory, kept="int8")
    assert packed.saved < 0.68 * memory.saved
    plain, plan = (choose(one, static, 12 * GIB, SIZES) for one in (memory, packed))
    assert plan.fits and plan.policies.kept == "int8" and plan.policies.recomputed < plain.policies.recomputed
    assert time_of(plan, 2048, packed) < 0.95 * time_of(plain, 2048, memory)
    away = Policies.of_counts(28, 4, 8)
    assert packed.waiting(away) < 0.68 * memory.waiting(away)
    # A layer that is recomputed goes backward in bf16.
    assert packed.layer(3).recompute == memory.layer(3).recompute
    # The matrix of the gradients is there beside what was kept.
    wide, narrow = (max(moment.per_token for moment in one.layer(3).backward) for one in (memory, packed))
    assert narrow - wide == packed.layer(3).saved - memory.layer(3).saved + 2 * 2 * 18944


TRAINER = SimpleNamespace(micro_batches_per_step=8, world_size=2)


@pytest.mark.parametrize(
    ("size", "per_step", "mean", "batch_size", "accumulate", "rows"),
    [
        (1, 8, 146, 1, 1, 28),  # Even one micro-batch has more than the 16 rows of a step of two ranks.
        (8, 2, 8 * 256, 2, 1, 32),  # Eight rows of 256 tokens fill one of 2048.
        (2, 16, 2 * 512, 2, 4, 64),
        (1, 8, 2048, 1, 8, 16),
    ],
)
def test_packing_is_advised_with_the_rows_of_a_step_that_it_changes(
    size, per_step, mean, batch_size, accumulate, rows
):
    data = SimpleNamespace(settings=SimpleNamespace(batch_size=size, max_length=2048))
    found = Packed.of(data, mean, per_step, 2)
    assert (found.batch_size, found.accumulate, found.rows) == (batch_size, accumulate, rows)
    assert found.rows_before == size * per_step * 2 and found.tokens == batch_size * 2048
    said, typed = found.told(mean, 0.5, ["--config", "a b.yaml", "--data.batch_size=9", "--json", "true", "--x", "-1"])
    assert f"50% faster; a step has about {rows} rows instead of {found.rows_before}:" in said
    keys = f"--data.packing true --data.batch_size {batch_size} --trainer.accumulate_grad_batches {accumulate}"
    assert typed == f"qwen-lit fit --config 'a b.yaml' --x -1 {keys}"


def test_the_advice_names_the_card_on_which_nothing_is_streamed():
    memory, static = shape("7B")
    plan = choose(memory, static, 8 * GIB, SIZES)
    lora = SimpleNamespace(r=32)
    module = SimpleNamespace(lora_config=lora, state_bytes=2, quantization_config=None, config=SimpleNamespace())
    data = SimpleNamespace(settings=SimpleNamespace(packing=True), train_rows=rows_of([2048] * 8))
    lines = advice(TRAINER, memory, static, plan, SIZES, 2048, module, data, torch.nn.Linear(1, 1), static_bytes)
    told = re.search(r"faster: with ([\d.]+) GiB no layer is streamed, about \d+% faster", "\n".join(lines))
    size = float(told[1])
    assert 16 < size < 48
    streamed = [choose(memory, static, int(one * GIB), SIZES).policies.streamed for one in (size - 2, size + 0.1)]
    assert streamed[0] and not streamed[1]
    assert re.search(r"faster: model.kept: int8, which .*: about \d+% faster", "\n".join(lines))


def rows_of(lengths):
    """Rows of a data set, none of raw text."""
    return SimpleNamespace(column=lambda _: np.array(lengths), of_kind=lambda _: np.zeros(len(lengths), bool))


def cell(name, card):
    memory, static = shape(name)
    plan = choose(memory, static, card * GIB, SIZES)
    if not plan.fits:
        return "–"
    streamed = len(plan.policies.streamed)
    return f"{streamed} of {len(memory.layers)}, {plan.host / GIB:.1f}" if streamed else "0"


@pytest.mark.parametrize("page", ["docs/memory.md", "docs/memory.zh.md"])
def test_the_table_of_models_and_cards_is_what_plan_computes(page):
    lines = Path(page).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith(" 48 GiB | 80 GiB |"))
    cards = [int(one.split()[0]) for one in lines[start].split("|")[2:-1]]
    found = lines[start + 2 : start + 2 + len(SHAPES)]
    rows = [[one.strip() for one in line.split("|")[1:-1]] for line in found]
    assert [row[0].removeprefix("Qwen2.5-") for row in rows] == list(SHAPES)
    for model, *cells in rows:
        assert cells == [cell(model.removeprefix("Qwen2.5-"), card) for card in cards], model
