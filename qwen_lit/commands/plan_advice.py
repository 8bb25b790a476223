"""What would make a run faster or smaller: the advice of ``plan``."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from peft import PeftModel

from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.examples import RAW_TEXT
from qwen_lit.model.module import QwenModule
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import GIB, Plan
from qwen_lit.planner.search import choose
from qwen_lit.planner.speed import time_of
from qwen_lit.prequantized import own_quantization
from qwen_lit.quantization import Held

MOST = 192 * GIB
"""Bytes of a card up to which more memory is advised."""

STEP = GIB // 4
"""Bytes between two sizes of a card that are tried, or more where these are large."""

WORTH = 0.02
"""Share of time from which a gain is worth a line."""

WORTH_BYTES = GIB // 8
"""Bytes from which a saving by shorter rows is worth a line."""


def advice(
    memory: ModelMemory,
    static: int,
    plan: Plan,
    sizes: dict[int, int],
    mean: float,
    module: QwenModule,
    data: QwenDataModule,
    model: PeftModel,
    weights: Callable[[PeftModel, Mapping[str, Held]], int],
) -> list[str]:
    """What would make it faster or smaller, with the gain of each by the planner's own arithmetic.

    Args:
        memory: of the model.
        static: bytes of its weights.
        plan: that was chosen.
        sizes: as of ``choose``.
        mean: tokens of a micro-batch on average.
        module: with the settings.
        data: with its rows.
        model: of ``arithmetic_model``.
        weights: bytes of the model's weights, by how they are held.
    """
    policies = plan.policies
    found = []
    if policies.recomputed or policies.streamed:
        larger = [choose(memory, static, budget, sizes, mean=mean) for budget in _budgets(plan.budget)]
        goals = {
            "recomputed": [one for one in larger if not one.policies.recomputed] * bool(policies.recomputed),
            "streamed": [one for one in larger if not one.policies.streamed] * bool(policies.streamed),
        }
        for what, there in goals.items():
            gain = time_of(plan, mean, memory) / time_of(there[0], mean, memory) - 1 if there else 0.0
            if gain > WORTH:
                size = there[0].budget / GIB
                found.append(f"faster: with {size:.1f} GiB no layer is {what}, about {gain:.0%} faster")
        if memory.kept == "bf16":
            in_8_bits = replace(memory, kept="int8")
            packed = choose(in_8_bits, static, plan.budget, sizes, mean=mean)
            gain = time_of(plan, mean, memory) / time_of(packed, mean, in_8_bits) - 1
            if gain > WORTH:
                rounds = "rounds what the MLP keeps for backward"
                found.append(f"faster: model.kept: int8, which {rounds}: about {gain:.0%} faster")
    if not data.settings.packing:
        full = data.settings.batch_size * data.settings.max_length
        now, then = (time_of(plan, one, memory) for one in (mean, full))
        gain = now / then - 1
        if gain > WORTH:
            found.append(
                f"faster: data.packing: true fills micro-batches of {mean:,.0f} tokens up to {full:,}: about "
                f"{gain:.0%} faster (lower trainer.accumulate_grad_batches to keep the rows of a step)"
            )
    tokens = sizes[plan.micro_batches_at_once]
    whole, half = (memory.peak(static, share, policies) for share in (tokens, tokens // 2))
    if whole - half > WORTH_BYTES:
        shorter = max(8, sizes[1] // 2)
        assert data.train_rows is not None
        lengths, text = data.train_rows.column("length"), data.train_rows.of_kind(RAW_TEXT)
        longer = int(((lengths > shorter) & ~text).sum())
        counted = f"{longer:,} of {len(lengths):,} rows are longer and would be shortened or dropped"
        found.append(
            f"smaller: data.max_length {shorter} takes {(whole - half) / GIB:.1f} GiB less; "
            f"{counted if longer else 'no row is longer'}"
        )
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = lora // 2 * (8 + module.state_bytes)
    found.append(f"smaller: lora_config.r {module.lora_config.r // 2} takes {saved / GIB:.2f} GiB less")
    config = module.quantization_config
    if own_quantization(module.config) is not None:
        # The files hold the base in what it is held in.
        return found
    if config is None or not config.load_in_4bit:
        found.append("smaller: quantization_config nf4 takes about a quarter of the weights' memory")
    elif not config.bnb_4bit_use_double_quant:
        as_held = module.held_weights(torch.device("cpu"))
        double = {name: replace(one, double=True) for name, one in as_held.items()}
        less = weights(model, as_held) - weights(model, double)
        found.append(f"smaller: bnb_4bit_use_double_quant: true takes {less / GIB:.2f} GiB less")
    return found


def _budgets(least: int) -> Iterator[int]:
    """The sizes of a card that are tried."""
    while least < MOST:
        yield least
        least += max(STEP, least // 32)
