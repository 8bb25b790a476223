"""Traps for products in 8 bits: a spike, a very long row, a large rank, rows of padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from choices import EXACT, Choice, Order
from gradients import Near
from small import Bench, Gradient, adapted
from torch import Tensor

from qwen_lit.data.batches import Batch, collate

SPIKE = 1000.0
"""Times which a channel is as large."""
LARGE_RANK = 256


def traps(bench: Bench, choices: Sequence[Choice], orders: dict[str, Order], longest: int) -> list[dict[str, Any]]:
    """Print for each trap and choice whether loss and gradient are finite, and how far they are from those of bf16.

    How far PEFT's own path in bf16 is from them stands beside: a trap may leave bf16 itself no digits.

    Args:
        bench: at a trained point.
        choices: that are compared.
        orders: as of ``Choice.products``.
        longest: tokens of the long row.
    """
    real = bench.rows.steps(1, 1, 1)[0]
    packs = bench.rows.packs
    ids = np.concatenate([ids for pack in packs for ids, _ in pack])
    long = np.resize(ids, longest)
    nothing = (np.zeros(bench.rows.longest, dtype=np.int64), np.zeros((0, 2), dtype=np.int64))
    print(
        "| trap | products | loss | of bf16 | finite | gradient's error against bf16 | cosine | |\n" + "|---" * 8 + "|"
    )
    found: list[dict[str, Any]] = []

    def set_trap(title: str, one: Bench, batch: Batch) -> None:
        wide = one.gradient(batch, EXACT)
        for choice in choices:
            found.append(_caught(title, str(choice), one.gradient(batch, choice.of_run(orders, one, real)), wide))
        peft = Gradient.of(one.peft_loss(batch), batch, one.trained)
        found.append(_caught(title, "yardstick: PEFT, bf16", peft, wide))

    set_trap("none", bench, real)
    set_trap(f"one row of {longest:,} tokens", bench, collate([(long, np.array([[0, longest]]))], 0))
    set_trap("rows of padding alone", bench, collate([nothing] * 2, 0))
    set_trap("rows of padding beside a real one", bench, collate([*packs[0], nothing, nothing], 0))
    for place in ("input_layernorm", "post_attention_layernorm"):
        layer = bench.layers // 2
        weight = bench.engine.decoder.layers[layer].get_submodule(place).weight
        with _spiked(weight):
            set_trap(f"a channel of layer {layer}'s {place} x {SPIKE:,.0f}", bench, real)
    set_trap(f"r={LARGE_RANK}", _with_rank(bench, LARGE_RANK), real)
    return found


class _spiked:
    """A context in which the largest channel of a norm's weight is ``SPIKE`` times as large."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.before = weight, weight.detach().clone()

    def __enter__(self) -> None:
        with torch.no_grad():
            self.weight[self.weight.abs().argmax()] *= SPIKE

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            self.weight.copy_(self.before)


def _with_rank(bench: Bench, rank: int) -> Bench:
    """The same base with another adapter, whose B is not zero; it takes the place of the one that is there."""
    base: Any = bench.model.unload()
    made = Bench(adapted(base, rank), bench.rows, bench.device)
    made.begin(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, one in made.trained.items():
            if ".lora_B." in name:
                one.copy_(torch.randn(one.shape, generator=generator) * 0.01)
    return made


def _caught(title: str, choice: str, mine: Gradient, wide: Gradient) -> dict[str, Any]:
    """A line of the table: a gradient is bounded where it is nearer to that of bf16 than zero is."""
    near = Near.of(mine, wide)
    finite = bool(np.isfinite(mine.loss)) and bool(mine.flat.isfinite().all())
    none = not wide.flat.any()
    held = finite and (not mine.flat.any() if none else near.error < 1)
    cosine = "" if none else f"{near.cosine:.4f}"
    error = "both are zero" if none and held else f"{near.error:.2%}"
    verdict = "bounded" if held else "NOT bounded"
    losses = f"{mine.loss:.4f} | {wide.loss:.4f}"
    told = "yes" if finite else "NO"
    print(f"| {title} | {choice} | {losses} | {told} | {error} | {cosine} | {verdict} |", flush=True)
    return {
        "trap": title,
        "products": choice,
        "loss": mine.loss,
        "loss_bf16": wide.loss,
        "finite": finite,
        "error": near.error,
        "cosine": near.cosine,
        "bounded": held,
    }
