"""Which products of frozen weights are hurt most by 8 bits, as a forward pass of real rows shows it.

Each layer is computed in bf16 from what the layers before it, in bf16, have made; then again for each group of its
linears, with the product of that group alone in 8 bits. With r_t the residual stream behind the layer at token t, and
r'_t the same of the second time::

    damage = sqrt((0.2 + 0.8 above) · mean over t of |r'_t - r_t|² / |r_t|²)

That is how far the stream moves, as a share of itself, which is all that the layers above see of a product's error:
their norms divide by the size of the stream. A mean of shares keeps the few tokens whose activations are massive from
standing for all. ``above`` is the share of the model's layers from this one on: they compute their part of the
gradient from the moved stream. 0.2 stands for the loss, which sees it behind the last layer too: of a small model's
products, those of its last layer hurt a gradient half as much as the first ones that move the stream as far.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.lora_linear import LoraLinear, size_of
from qwen_lit.engine.narrow import fitting
from qwen_lit.engine.products import Passes, Product, Products
from qwen_lit.kernels.footprint import LayerSize

AT_LOSS = 0.2
"""Weight of a moved stream where no layer is above it."""

NOTHING = 1e-30
"""Stands for the squared size of a stream of zeros."""


def damages(engine: FastEngine, batch: Any, products: Products) -> dict[Product, float]:
    """What 8 bits do to each product that has them in forward, as of the module; infinite where it is not finite.

    Nothing is kept from layer to layer but the stream, so this takes the memory of one layer's forward. Streamed
    layers come once, and the generators of random numbers stay as they are.

    Args:
        engine: whose own products do not matter.
        batch: ``qwen_lit.data.batches.Batch`` on the model's device, documents end to end.
        products: whose kinds are tried.
    """
    found, device = {}, batch["input_ids"].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        for one, stream, change in _changes(engine, batch, products):
            above = 1 - one[0] / len(engine.layers)
            found[one] = _share(stream, change) * math.sqrt(AT_LOSS + (1 - AT_LOSS) * above)
    engine.arena.workspace.clear()
    return {one: damage if math.isfinite(damage) else math.inf for one, damage in _numbers(found).items()}


def _share(stream: Tensor, change: Tensor) -> Tensor:
    """How far a stream moves as a share of itself, a scalar; both are float32 ``[tokens, hidden]``."""
    return (change.square().sum(-1) / stream.square().sum(-1).clamp_min(NOTHING)).mean().sqrt()


def _numbers(found: dict[Product, Tensor]) -> dict[Product, float]:
    """Scalars of the device, which is waited for once."""
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}


def _changes(engine: FastEngine, batch: Any, products: Products) -> Iterator[tuple[Product, Tensor, Tensor]]:
    """Each product with the residual stream behind its layer, and what that changes by with the product in 8 bits;
    float32 ``[tokens, hidden]``."""
    stream, cos, sin = engine._embedded(batch)
    engine._cast_adapters(stream.dtype)
    if engine.store is not None:
        engine.store.begin(turns=False)
    for number, block in enumerate(engine.decoder.layers):
        layer, linears = engine.layers[number], engine._linears(number, False)
        # Without a dropout there is no seed, and without a backward no LoRA columns for its gradients.
        arguments = (stream, None, block, layer, linears, cos, sin, batch, 0, None, 0, False)
        with torch.autocast(stream.device.type, enabled=False):
            residual, delta = engine._layer(*arguments)
            stream = residual + delta
            for place, names in enumerate(layer.groups):
                group = [linears[one.name] for one in names]
                kind = fitting(products.of(number, place), [size_of(linear) for linear in group]).forward
                if kind.narrow:
                    _compute_in(group, Passes(forward=kind), engine)
                    moved, other = engine._layer(*arguments)
                    # Of the parts: their sum in bf16 is rounded by more than some products are off.
                    change = (moved.float() - residual.float()) + (other.float() - delta.float())
                    yield (number, place), stream.float(), change
                    _compute_in(group, Passes(), engine)


def _compute_in(group: list[LoraLinear], passes: Passes, engine: FastEngine) -> None:
    for linear in group:
        linear.passes, linear.scales = passes, engine.scales


def work_of(layers: Sequence[LayerSize]) -> dict[Product, int]:
    """Multiplications a token of each product's forward.

    Args:
        layers: sizes of all layers, as of ``footprint.layer_sizes``.
    """
    return {
        (number, place): sum(linear.inputs * linear.outputs for linear in group)
        for number, layer in enumerate(layers)
        for place, group in enumerate(layer.groups)
    }


def worst(damage: dict[Product, float], work: dict[Product, int], share: float) -> tuple[Product, ...]:
    """The products that are best left in bf16, the best of them first.

    Errors of different products add in squares, so the order is that of squared damage for each multiplication. One
    that is too large for what is left of the share is passed over.

    Args:
        damage: of the products that have 8 bits.
        work: as of ``work_of``.
        share: of all multiplications, those that may be in bf16.
    """
    return _within(sorted(damage, key=lambda one: (-(damage[one] ** 2) / work[one], one)), work, share)


def expected(work: dict[Product, int], share: float) -> tuple[Product, ...]:
    """The products that memory and time are estimated with before rows have shown the worst: those of the first
    layers. Wherever they are, they are as large a share, and the largest of them has a buffer.

    Args:
        work: as of ``work_of``.
        share: as of ``worst``.
    """
    return _within(sorted(work), work, share)


def _within(order: Sequence[Product], work: dict[Product, int], share: float) -> tuple[Product, ...]:
    """Of products in an order, those that fit the share, one after the other."""
    found, left = [], share * sum(work.values())
    for one in order:
        if work[one] <= left:
            found.append(one)
            left -= work[one]
    return tuple(found)
