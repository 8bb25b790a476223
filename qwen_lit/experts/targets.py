"""What LoRA's targets mean in a mixture of experts, and what is left alone in every model."""

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft import LoraConfig

from qwen_lit.errors import UserError
from qwen_lit.families.table import family_of

log = logging.getLogger(__name__)
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""The parameters of a layer's experts, as ``lora_config.target_parameters`` names them."""
ROUTER = "mlp.gate"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ALL = "all-linear"


def resolve_all(config: Any, lora: LoraConfig) -> None:
    """Let ``all-linear`` be the linears that are quantised; routers and what steers gates and states are left out.

    Args:
        config: of the base.
        lora: changed in place.
    """
    if lora.target_modules != ALL:
        return
    linears = {one for layer in family_of(config).layers(config) for one in layer.linears}
    small = sorted({one.path.removesuffix(".weight") for one in linears if not one.quantized})
    if small:
        lora.target_modules = sorted({one.path for one in linears if one.linear and one.quantized})
        log.info("lora_config.target_modules: %s leaves out %s", ALL, ", ".join(small))


def check_experts(config: Any, lora: LoraConfig, names: Iterable[str]) -> None:
    """Refuse targets that would adapt a router, or that name experts as if they were linears.

    Args:
        config: of the base.
        lora: as configured.
        names: of the base's modules.

    Raises:
        UserError: with what to name instead.
    """
    layers = family_of(config).layers(config)
    mixture = any(layer.feed_forward == "experts" for layer in layers)
    _check_parameters(lora, mixture)
    if not mixture:
        return
    shared = any("shared_expert" in one.path for layer in layers for one in layer.linears)
    wanted = lora.target_modules or []
    for key, listed in (("target_modules", wanted), ("modules_to_save", lora.modules_to_save or [])):
        if isinstance(listed, str):
            matched = [name for name in names if listed != ALL and _matches(listed, name)]
        else:
            matched = [name for name in names if any(f".{name}".endswith(f".{one}") for one in listed)]
        if any(name.endswith("." + ROUTER) for name in matched):
            raise UserError(
                f"lora_config.{key} names the router ({ROUTER}), which is not trained: it says which experts a token "
                "passes, the experts were trained for its choice, and no loss here would keep their shares even; "
                "leave it out."
            )
        shares = [name for name in matched if name.rpartition(".")[2] in PROJECTIONS]
        if isinstance(listed, str) and shares:
            raise UserError(
                f"lora_config.{key}: the text {listed!r} matches {shares[0]}, which PEFT would take for experts when "
                "it reads the adapter; write the targets as a list."
            )
        every = [one.path for layer in layers for one in layer.linears if one.linear and one.quantized]
        _check_plain(lora, [one for one in every if listed == ALL and one.rpartition(".")[2] in PROJECTIONS] or shares)
    bare = [one for one in PROJECTIONS if not isinstance(wanted, str) and one in wanted]
    if bare:
        instead = [f"shared_expert.{one}" for one in bare]
        dense = [f"mlp.{one}" for one in bare] if any(layer.feed_forward == "mlp" for layer in layers) else []
        raise UserError(
            f"lora_config.target_modules names {', '.join(bare)}, which says nothing clear in a mixture of experts: "
            + (f"the shared expert's linears are [{', '.join(instead)}], and " if shared else "")
            + (f"those of layers without experts are [{', '.join(dense)}], and " if dense else "")
            + f"the experts are parameters; leave {'them' if len(bare) > 1 else 'it'} out, or adapt the experts with "
            f"lora_config.target_parameters: [{', '.join(EXPERTS)}]."
        )


def _check_plain(lora: LoraConfig, linears: Sequence[str]) -> None:
    """Refuse kinds of LoRA with which PEFT takes linears of an MLP for experts when it reads the adapter.

    Raises:
        UserError: with the remedy.
    """
    for key in ("use_dora", "lora_bias") if linears else ():
        if getattr(lora, key):
            raise UserError(
                f"lora_config.{key} is {getattr(lora, key)}, but with it PEFT could not read an adapter of "
                f"{linears[0]}, which it would take for experts; set it to false, or leave that out of target_modules."
            )


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _check_parameters(lora: LoraConfig, mixture: bool) -> None:
    """Refuse parameters that are no experts, and what LoRA on experts does not have.

    Raises:
        UserError: with the remedy.
    """
    wanted = sorted(lora.target_parameters or [])
    for one in wanted:
        if not mixture or not any(f".{own}".endswith(f".{one}") for own in EXPERTS):
            there = f"experts: [{', '.join(EXPERTS)}]" if mixture else "none, as the model has no experts"
            raise UserError(
                f"lora_config.target_parameters: {one!r} cannot be adapted; the parameters that can are {there}. "
                "Linears are named in target_modules."
            )
    if wanted and lora.layers_to_transform is not None:
        raise UserError(
            f"lora_config.layers_to_transform is {lora.layers_to_transform}, but PEFT adapts the experts of every "
            "layer all the same; leave it out, or leave target_parameters out."
        )
    plain = {"lora_dropout": "0", "use_dora": "false", "lora_bias": "false", "init_lora_weights": "true"}
    refused = {key for key in ("lora_dropout", "use_dora", "lora_bias") if getattr(lora, key)}
    if lora.init_lora_weights not in (True, False, "gaussian"):
        refused.add("init_lora_weights")
    for key in sorted(refused) if wanted else ():
        raise UserError(
            f"lora_config.{key} is {getattr(lora, key)}, but PEFT adapts parameters, as experts are, without it, and "
            f"could not read the adapter; set it to {plain[key]}, or leave target_parameters out."
        )
