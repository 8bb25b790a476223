"""How near the LoRA gradient of a micro-batch is to the one with all products in bf16."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen_lit.data.batches import Batch, prefix
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.products import Products
from qwen_lit.model.precision import full_precision


@dataclass(frozen=True)
class Fidelity:
    """Of the whole gradient, all matrices together."""

    cosine: float
    """With the gradient in bf16, from -1 to 1; NaN where one in 8 bits is not finite."""
    error: float
    """Norm of the difference over that of the gradient in bf16."""

    def below(self, floor: float) -> bool:
        """Whether the cosine is lower, or no number."""
        return not self.cosine >= floor


class Measured(Protocol):
    """What is asked of a ``QwenModule`` here."""

    fast: FastEngine | None

    @property
    def device(self) -> torch.device:
        """On which it computes."""

    def loss_sum(self, batch: Batch) -> Tensor:
        """Summed loss of a batch."""


class Precision(Protocol):
    """Lightning's precision plugin."""

    def forward_context(self) -> AbstractContextManager[None]:
        """In which forward runs."""


SHARE = 0.002
"""Of the tokens between two checks, those that are compared at most: two passes over them, one of which is slower,
take half a per cent of the time."""
LEAST = 512
"""Tokens that are compared all the same: fewer say little."""


def compared(step: Sequence[Batch], every: int | None = None) -> Batch | None:
    """What is compared of an optimizer step: the first micro-batch that has supervised tokens, or its beginning.

    Args:
        step: its micro-batches, as the configuration cuts them.
        every: optimizer steps from one check to the next; None where what it takes does not matter.
    """
    one = next((one for one in step if one["targets"].numel()), None)
    if one is None or every is None:
        return one
    most = int(SHARE * every * sum(batch["input_ids"].numel() for batch in step))
    part = prefix(one, max(most, LEAST))
    # What a row trains may begin after that.
    return part if part["targets"].numel() else one


def measure(module: Measured, precision: Precision, batch: Batch) -> Fidelity | None:
    """Compare the engine's own products with bf16 by the gradient of one micro-batch.

    The trained parameters' ``grad`` and all random generators stay as they are. Both gradients are of one and the same
    dropout. At its peak this takes what a training step of the micro-batch takes: the gradient in bf16 waits on the
    host, in float32, while that of the engine's own products is computed, and the workspace is given up in between.

    Args:
        module: in training, with the fast engine.
        precision: of its trainer.
        batch: on the module's device, with supervised tokens.

    Returns:
        None where the gradient in bf16 is not finite either: the products are not to blame.
    """
    assert module.fast is not None
    wide = [one.float().cpu() for one in gradient(module, precision, batch, Products())]
    return compare(wide, gradient(module, precision, batch, module.fast.products))


def gradient(module: Measured, precision: Precision, batch: Batch, products: Products) -> tuple[Tensor, ...]:
    """The gradient of the summed loss by every trained parameter, on the device and in their dtype.

    Args:
        module: as of ``measure``.
        precision: as of ``measure``.
        batch: as of ``measure``.
        products: with which forward and backward compute.
    """
    engine, device = module.fast, module.device
    assert engine is not None
    own, engine.products = engine.products, products
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with precision.forward_context():
                loss = module.loss_sum(batch)
            with full_precision(device):
                return torch.autograd.grad(loss, [one for one in engine.trained if one.requires_grad])
    finally:
        engine.products = own
        engine.arena.workspace.clear()


def compare(wide: Sequence[Tensor], narrow: Sequence[Tensor]) -> Fidelity | None:
    """Cosine and error of a gradient.

    Args:
        wide: in bf16, matrix by matrix, on any device.
        narrow: in 8 bits, alike.

    Returns:
        None where ``wide`` is not finite.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=narrow[0].device)
    for known, found in zip(wide, narrow, strict=True):
        a, b = known.to(found.device).double().flatten(), found.double().flatten()
        sums += torch.stack([a @ b, a @ a, b @ b, (b - a) @ (b - a)])
    product, wanted, had, apart = sums.tolist()
    if not math.isfinite(wanted):
        return None
    if not math.isfinite(had):
        return Fidelity(math.nan, math.inf)
    if not wanted or not had:
        # B is zero at the start, and so is the gradient by A; two gradients of nothing are equal.
        return Fidelity(float(wanted == had), math.sqrt(apart / wanted) if wanted else 0.0 if not had else math.inf)
    return Fidelity(product / math.sqrt(wanted * had), math.sqrt(apart / wanted))


def worst(found: Sequence[Fidelity]) -> Fidelity:
    """The lowest cosine and the largest error of what ranks have found.

    Args:
        found: at least one.
    """
    lowest = min((one.cosine for one in found), key=lambda cosine: -math.inf if math.isnan(cosine) else cosine)
    return Fidelity(lowest, max(one.error for one in found))
