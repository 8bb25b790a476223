"""The products that a run asks for, the ones that it computes, and where the two differ."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PretrainedConfig

from qwen_lit.engine.engine import unsupported_reason
from qwen_lit.engine.products import NAMED, Product, Products, ProductsName
from qwen_lit.errors import UserError
from qwen_lit.model.load import empty_model, put_adapter
from qwen_lit.model.settings import ModelSettings

FLOORS: dict[ProductsName, float] = {"fp8_backward": 0.98, "mixed8": 0.95, "int8": 0.95, "fp8": 0.80}
"""``model.products_floor`` where it is null, by ``model.products``."""

LEFT: dict[ProductsName, float] = {"mixed8": 0.25}
"""Share of the forward's multiplications that stay in bf16 all the same, by ``model.products``: those of the products
that a probe finds worst. As shipped a quarter adds 5 % to a step's time on an H200, and takes a fifth off the
gradient's error on a 135M model (20.4 to 16.0 %), whose held-out loss is then nearer to bf16's than another seed's."""
GROUPS = ("q|k|v", "o", "gate|up", "down")
"""The groups of linears of a layer in words."""


@dataclass(frozen=True)
class ProductsInUse:
    """What a run's products of frozen weights are computed in; part of every checkpoint."""

    asked: ProductsName
    """``model.products``."""
    used: ProductsName
    """bf16 where the run has left what was asked for."""
    why: str = ""
    """Why it has; empty where it has not."""
    since: int | None = None
    """The first optimizer step in bf16, counted from 1, where a check of the gradient led to it."""
    checked: tuple[int, float, float] | None = None
    """Optimizer step of the last check, with the gradient's cosine and error; None before there is one."""
    wide: tuple[Product, ...] | None = None
    """The products that stay in bf16, the worst first; None where none were looked for."""
    among: int = 0
    """The products that they are of; 0 where none were looked for."""

    @classmethod
    def of(cls, asked: ProductsName, then: dict[str, Any] | None) -> "ProductsInUse":
        """That of a run which begins, or goes on.

        Args:
            asked: ``model.products``.
            then: as ``plain`` has stored it in the checkpoint; None where there is none.
        """
        if not then or then["asked"] != asked:
            return cls(asked, asked)
        found = then.get("wide")
        wide = None if found is None else tuple((layer, group) for layer, group in found)
        return cls(**{**then, "checked": tuple(then["checked"]) if then["checked"] else None, "wide": wide})

    @property
    def products(self) -> Products:
        """What the engine is given."""
        return Products(self.used, frozenset(self.wide or ()))

    @property
    def share_left(self) -> float:
        """The share of ``LEFT`` whose products are yet to be found; 0 where they are, or none stays in bf16."""
        return LEFT.get(self.used, 0.0) if self.wide is None else 0.0

    @property
    def in_words(self) -> str:
        """What was asked for, with what it leaves in bf16."""
        left = (
            f", but for {len(self.wide)} of {self.among} products in bf16 ({places(self.wide)})" if self.wide else ""
        )
        return self.asked + left

    def plain(self) -> dict[str, Any]:
        """Its fields as plain values."""
        return asdict(self)

    def left(self, why: str, since: int | None = None) -> "ProductsInUse":
        """The same in bf16.

        Args:
            why: what speaks against 8 bits.
            since: as of the class.
        """
        return replace(self, used="bf16", why=why, since=since)

    def __str__(self) -> str:
        """In words: what was asked for, what came of it, and the last check."""
        if self.used != self.asked and self.since is None:
            return f"bf16; {self.asked} is not used: {self.why}"
        if self.used != self.asked:
            return f"{self.asked} before step {self.since:,}, bf16 from there on: {self.why}"
        if self.checked is None:
            return self.in_words
        step, cosine, error = self.checked
        return f"{self.in_words}; at step {step:,} the gradient had {in_words(cosine, error)}"

    @property
    def told(self) -> str | None:
        """The words, or None where bf16 was asked for and there is nothing to tell."""
        return None if self.asked == "bf16" else str(self)


def places(products: Sequence[Product]) -> str:
    """Products in words, by layers: neighbours of which the same groups are named are told together."""
    groups: dict[int, list[int]] = {}
    for layer, group in sorted(products):
        groups.setdefault(layer, []).append(group)
    runs: list[tuple[int, int, list[int]]] = []
    for layer, mine in groups.items():
        first, last, before = runs[-1] if runs else (0, -2, [])
        if last == layer - 1 and before == mine:
            runs[-1] = first, layer, mine
        else:
            runs.append((layer, layer, mine))
    told = []
    for first, last, mine in runs:
        which = f"layers {first} to {last}" if last > first else f"layer {first}"
        names = ", ".join(GROUPS[one] for one in mine)
        told.append(which if len(mine) == len(GROUPS) else f"{names} of {which}")
    return "; ".join(told)


def in_words(cosine: float, error: float) -> str:
    """How near a gradient is to that with products in bf16."""
    return f"cosine {cosine:.4f} with that in bf16 and error {error:.1%}"


def floor_of(settings: ModelSettings) -> float:
    """The cosine below which a run with products in 8 bits goes on in bf16."""
    given = settings.products_floor
    return FLOORS[settings.products] if given is None else given


class Asking(Protocol):
    """What is asked of a ``QwenModule`` here."""

    settings: ModelSettings
    config: PretrainedConfig
    lora_config: LoraConfig
    quantization_config: BitsAndBytesConfig | None


def check_products(module: Asking, device: torch.device, command: str) -> None:
    """Refuse products in 8 bits, before anything is loaded, where the run could not have them.

    Whether the device computes them rightly is asked once the engine is chosen.

    Args:
        module: with the settings.
        device: of the run.
        command: ``plan`` without a GPU answers for one.

    Raises:
        UserError: the base is not held in 4 bits, or PEFT's own path would train.
    """
    asked, engine, quantization = module.settings.products, module.settings.engine, module.quantization_config
    if not NAMED[asked].narrow:
        return
    if quantization is None or not quantization.load_in_4bit:
        held = "bf16" if quantization is None else "int8"
        raise UserError(
            f"model.products is {asked}, but the base is held in {held}, and 8-bit products are made from 4-bit "
            "weights; set load_in_4bit in model.quantization_config, or model.products to bf16."
        )
    if engine == "reference":
        raise refused(asked, "model.engine is reference", "model.engine to auto")
    if engine == "auto" and device.type != "cuda" and command != "plan":
        raise refused(asked, "there is no CUDA device", "model.engine to fast")
    with torch.device("meta"):
        model = put_adapter(empty_model(module.config), replace(module.lora_config))
    if reason := unsupported_reason(model, torch.device("meta")):
        raise refused(asked, reason)


def refused(asked: ProductsName, reason: str, remedy: str = "") -> UserError:
    """The error of a run that PEFT's own path would train.

    Args:
        asked: ``model.products``.
        reason: why it would.
        remedy: a key and its value with which it would not.
    """
    other = f"{remedy}, or " * bool(remedy)
    return UserError(
        f"model.products is {asked}, but {reason}, and the reference engine computes its products in bf16; set "
        f"{other}model.products to bf16."
    )
