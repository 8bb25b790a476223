"""How near the gradient of each choice is to that of exact products, and which products hurt it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choices import EXACT, Choice, Order, every_product, share_in_8_bits, timed, train
from lightning.fabric.utilities import move_data_to_device
from peft import PeftModel
from small import Bench, Gradient, exact_copy, plain_loss, trained_of, unquantised_copy
from torch import Tensor

from qwen_lit.data.batches import Batch
from qwen_lit.engine.footprint import layer_sizes
from qwen_lit.engine.probe import damages, work_of, worst
from qwen_lit.engine.products import Products
from qwen_lit.model.products import GROUPS


@dataclass(frozen=True)
class Near:
    """How a gradient compares with another one of the same parameters."""

    shift: float
    """Loss above the other's, in nats."""
    error: float
    """Norm of the difference, as a share of the other's norm."""
    cosine: float
    parts: dict[str, tuple[float, float]]
    """Cosine and error of each matrix, by ``layer.linear.A`` or ``B``."""

    @staticmethod
    def of(found: Gradient, exact: Gradient) -> "Near":
        """Compare."""
        one, other = found.flat, exact.flat
        parts = {}
        for name, there in exact.parts.items():
            mine = found.parts[name]
            parts[_short(name)] = torch.stack([_cosine(mine, there), _error(mine, there)])
        figures = torch.stack(list(parts.values())).tolist()
        return Near(
            found.loss - exact.loss,
            _error(one, other).item(),
            _cosine(one, other).item(),
            {name: (pair[0], pair[1]) for name, pair in zip(parts, figures, strict=True)},
        )

    @staticmethod
    def mean(all_of: Sequence["Near"]) -> "Near":
        """Of several batches."""
        parts = {name: tuple(np.mean([one.parts[name] for one in all_of], 0).tolist()) for name in all_of[0].parts}
        shift, error, cosine = np.mean([(one.shift, one.error, one.cosine) for one in all_of], 0).tolist()
        return Near(shift, error, cosine, parts)

    def of_kind(self, kind: str) -> list[float]:
        """Cosines of every A or every B."""
        return [cosine for name, (cosine, _) in self.parts.items() if name.endswith(kind)]

    def row(self, title: str, share: float | None = None) -> str:
        """A line of the table ``HEAD``."""
        worst = min(self.parts, key=lambda name: self.parts[name][0])
        a, b = (f"{np.mean(self.of_kind(kind)):.4f}" for kind in "AB")
        return (
            f"| {title} | {'' if share is None else f'{share:.0%}'} | {self.shift:+.4f} | {self.error:.2%} | "
            f"{self.cosine:.5f} | {a} | {b} | {self.parts[worst][0]:.3f} d{worst} |"
        )


HEAD = (
    "| products | in 8 bits | loss | gradient's error | cosine | mean dA | mean dB | worst |\n"
    "|---|---|---|---|---|---|---|---|"
)


def _short(name: str) -> str:
    parts = name.split(".")
    layer = parts[parts.index("layers") + 1]
    kind = next(one for one in parts if one.startswith("lora_"))
    return f"{layer}.{parts[parts.index(kind) - 1]}.{kind[-1]}"


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    # Sums of tens of millions of float32 numbers would be 1.0005 of themselves.
    return torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), 0)


def _error(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).double().norm() / other.double().norm().clamp_min(1e-30)


def trained_point(bench: Bench, steps: int, per_step: int, lr: float, adapter: Path | None) -> list[Batch]:
    """Bring the adapter to a point that is trained, in bf16 from seed 0.

    Args:
        bench: whose adapter it is.
        steps: that are trained.
        per_step: packs of each.
        lr: highest learning rate.
        adapter: a file that is read where it is there, and written else.

    Returns:
        Batches of the steps that would come next, as many as are asked for by ``gradients`` at most.
    """
    batches = bench.rows.steps(0, steps + 8, per_step)
    bench.begin(0)
    if adapter is not None and adapter.is_file():
        bench.set(torch.load(adapter))
    else:
        losses = train(bench, batches[:steps], EXACT, lr) or [float("nan")]
        print(f"{steps} steps in bf16: loss {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)
        if adapter is not None:
            torch.save(bench.taken(), adapter)
    return batches[steps:]


def _told(title: str, pairs: Sequence[tuple[Gradient, Gradient]], share: float | None = None) -> dict[str, Any]:
    near = Near.mean([Near.of(*pair) for pair in pairs])
    print(near.row(title, share), flush=True)
    return {"products": title, "in_8_bits": share, **vars(near)}


def exact_gradients(model: PeftModel, batches: Sequence[Batch], device: torch.device) -> list[Gradient]:
    """By transformers' own modules in the dtype of the model.

    Args:
        model: in float32.
        batches: on the CPU.
        device: of the model.
    """
    return [Gradient.of(plain_loss(model, batch, device), batch, trained_of(model)) for batch in batches]


def gradients(
    bench: Bench, choices: Sequence[Choice], orders: dict[str, Order], batches: Sequence[Batch], original: Path | None
) -> list[dict[str, Any]]:
    """Print the table of every choice against float32 products of the same weights, with yardsticks; its figures.

    Args:
        bench: at a trained point.
        choices: that are compared.
        orders: as of ``Choice.products``.
        batches: of which gradients are taken; the figures are their means.
        original: folder of the checkpoint before it was quantised; None leaves out what NF4 does.
    """
    model = exact_copy(bench)
    exact = exact_gradients(model, batches, bench.device)
    del model
    print(HEAD)
    found = []
    for choice in choices:
        products = choice.of_run(orders, bench, batches[0])
        mine = [bench.gradient(batch, products) for batch in batches]
        found.append(_told(str(choice), list(zip(mine, exact, strict=True)), share_in_8_bits(bench, products)))
    peft = [Gradient.of(bench.peft_loss(batch), batch, bench.trained) for batch in batches]
    found.append(_told("yardstick: PEFT's own path, bf16", list(zip(peft, exact, strict=True))))
    if original is not None:
        whole = exact_gradients(unquantised_copy(bench, original), batches, bench.device)
        found.append(_told("yardstick: NF4, against the base before it", list(zip(exact, whole, strict=True))))
    if len(exact) > 1:
        turned = [*exact[1:], exact[0]]
        found.append(_told("yardstick: the next batch", list(zip(turned, exact, strict=True))))
    return found


def probe(
    bench: Bench,
    names: Sequence[str],
    batches: Sequence[Batch],
    counts: Sequence[int],
    by_work: bool,
    shares: Sequence[float] = (),
) -> list[dict[str, Any]]:
    """Find which products hurt a gradient most, one at a time in 8 bits, and how it heals as they are left in bf16.

    Args:
        bench: at a trained point.
        names: of the choices.
        batches: the error of a product alone is that of the first of them; how it heals is a mean of all.
        counts: numbers of products that are left in bf16.
        by_work: the order is that of squared error for each multiplication, and not of error: what a product hurts
            beside what it would cost in bf16.
        shares: of the forward's multiplications that are left in bf16 instead, by the order of the package's own
            probe; it is quick, so none is tried alone.
    """
    if shares:
        return [quick_probe(bench, name, batches, shares) for name in names]
    every = every_product(bench)
    exact = exact_gradients(exact_copy(bench), batches, bench.device)
    found = []
    for name in names:
        choice = Choice.of(name)
        # Backward is in 8 bits in all of them, so that what differs is the forward of one product.
        rest, errors = bench.gradient(batches[0], Products(choice.name, frozenset(every))), {}
        for one in every:
            alone = Products(choice.name, frozenset(every) - {one})
            mine = bench.gradient(batches[0], alone)
            errors[one] = _error(mine.flat, rest.flat).item()
            cost = share_in_8_bits(bench, alone) or 1.0
            errors[one] = errors[one] if not by_work else errors[one] ** 2 / cost
        order = sorted(every, key=lambda one: -errors[one])
        print(f"{name}: worst alone, against none: " + ", ".join(_product(one, errors[one]) for one in order[:12]))
        print(HEAD)
        heals = []
        for count in sorted({min(count, len(every)) for count in counts}):
            products = Choice(choice.name, count).products({choice.name: order})
            mine = [bench.gradient(batch, products) for batch in batches]
            pairs, share = list(zip(mine, exact, strict=True)), share_in_8_bits(bench, products)
            heals.append(_told(f"{choice.name}+{count}", pairs, share))
        alone = [[*one, errors[one]] for one in order]
        found.append({"name": choice.name, "by_work": by_work, "order": order, "alone": alone, "heals": heals})
    return found


def quick_probe(bench: Bench, name: str, batches: Sequence[Batch], shares: Sequence[float]) -> dict[str, Any]:
    """How a gradient heals as the products that a run would find worst are left in bf16.

    Args:
        bench: at a trained point.
        name: of the choice.
        batches: the first of them is looked at; how it heals is a mean of all.
        shares: of the forward's multiplications that stay in bf16.
    """
    choice = Choice.of(name)
    exact = exact_gradients(exact_copy(bench), batches, bench.device)
    work = work_of(layer_sizes(bench.model))
    damage, seconds = timed(
        damages, bench.engine, move_data_to_device(batches[0], bench.device), Products(choice.name)
    )
    order = worst(damage, work, 1.0)
    print(f"{name}: found in {seconds:.1f} s: " + ", ".join(_product(one, damage[one]) for one in order[:12]))
    print(HEAD)
    heals = []
    for share in shares:
        products = Products(choice.name, frozenset(worst(damage, work, share)))
        mine = [bench.gradient(batch, products) for batch in batches]
        title, pairs = f"{name}, {share:.0%} left: {len(products.wide)}", list(zip(mine, exact, strict=True))
        heals.append(_told(title, pairs, share_in_8_bits(bench, products)) | {"share": share})
    alone = [[*one, damage[one]] for one in order]
    return {"name": choice.name, "quick": True, "order": order, "alone": alone, "heals": heals}


def _product(one: tuple[int, int], error: float) -> str:
    return f"{one[0]} {GROUPS[one[1]]} {error:.2g}"
