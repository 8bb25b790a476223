"""The choices of products that ``fidelity.py`` compares, and how they train."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from small import Bench
from torch import Tensor

from qwen_lit.data.batches import Batch
from qwen_lit.engine.lora_linear import size_of
from qwen_lit.engine.narrow import fitting
from qwen_lit.engine.products import Products, ProductsName
from qwen_lit.model.probe import probed
from qwen_lit.model.products import ProductsInUse

Order = list[tuple[int, int]]
"""Numbers of the layer and of the group of linears in it, the product that hurts most first."""
NAMES: tuple[ProductsName, ...] = get_args(ProductsName)
PEERS = ("peft", "unsloth")
EXACT = Products()
WARM = 0.05
"""Share of the steps in which the learning rate rises; then it falls by a cosine."""


@dataclass(frozen=True)
class Choice:
    """Products in 8 bits, but for the worst ones."""

    name: ProductsName
    wide: int = 0
    """Products that stay in bf16: the first of the order."""

    @staticmethod
    def of(text: str) -> "Choice":
        """As it is written: ``fp8``, or ``fp8+16`` with 16 products in bf16."""
        name, _, count = text.partition("+")
        if name not in NAMES or count and not count.isdigit():
            raise SystemExit(f"{text} is no choice; give one of {', '.join(NAMES)}, with +N for N products in bf16")
        return Choice(name, int(count or 0))

    def products(self, orders: dict[str, Order]) -> Products:
        """What the engine is given.

        Args:
            orders: by the name of the choice, as ``probe`` finds them.
        """
        if self.wide and self.name not in orders:
            raise SystemExit(f"{self}: which products are worst is not known; give --order, as probe writes it")
        return Products(self.name, frozenset(orders[self.name][: self.wide] if self.wide else ()))

    def of_run(self, orders: dict[str, Order], bench: Bench, batch: Batch) -> Products:
        """What the engine of a run is given that begins where the adapter stands.

        Args:
            orders: as of ``products``.
            bench: with the model.
            batch: that the run's probe looks at, on the CPU.
        """
        if self.wide:
            return self.products(orders)
        return probed(ProductsInUse.of(self.name, None), bench.engine, batch, lambda mine: mine).products

    def __str__(self) -> str:
        return f"{self.name}+{self.wide}" if self.wide else self.name


def every_product(bench: Bench) -> Order:
    """The products of a model."""
    return [(layer, group) for layer in range(bench.layers) for group in range(len(bench.engine.layers[layer].groups))]


def share_in_8_bits(bench: Bench, products: Products) -> float:
    """Share of the multiplications by frozen weights, in both passes, that are in 8 bits."""
    whole = narrow = 0.0
    for layer, group in every_product(bench):
        linears = bench.engine._linears(layer, False)
        mine = [linears[one.name] for one in bench.engine.layers[layer].groups[group]]
        work = sum(one.width * one.out for one in mine)
        whole += 2 * work
        passes = fitting(products.of(layer, group), [size_of(one) for one in mine])
        narrow += work * (passes.forward.narrow + passes.backward.narrow)
    return narrow / whole


def rates(steps: int, most: float) -> list[float]:
    """The learning rate of each step.

    Args:
        steps: their number.
        most: its highest value.
    """
    warm = max(1, round(WARM * steps))
    return [most * min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


def optimizer_of(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """AdamW with float32 states, without decay."""
    trained = list(parameters)
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=trained[0].is_cuda)


def train(bench: Bench, batches: Sequence[Batch], products: Products | None, lr: float) -> list[float]:
    """Train the adapter from where it stands, one micro-batch a step.

    Args:
        bench: with the adapter.
        batches: on the CPU.
        products: of the engine; None trains by transformers' and PEFT's own modules.
        lr: highest learning rate.

    Returns:
        The mean loss of each step, in nats.
    """
    optimizer, losses = optimizer_of(bench.trained.values()), []
    for batch, rate in zip(batches, rates(len(batches), lr), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        total = bench.peft_loss(batch) if products is None else bench.loss(batch, products)
        loss = total / max(1, len(batch["targets"]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(bench.trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def held_out(bench: Bench, judged: Sequence[Batch]) -> list[float]:
    """The summed loss of each held-out pack by exact bf16 products, in nats.

    Args:
        bench: with the adapter.
        judged: of ``Rows.judged``.
    """
    with torch.no_grad():
        return torch.stack([bench.loss(batch, EXACT) for batch in judged]).tolist()


def timed(work: Any, *arguments: Any) -> tuple[Any, float]:
    """What a function gives, and its seconds."""
    began = time.perf_counter()
    found = work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - began
