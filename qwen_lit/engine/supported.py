"""Which models and adapters the fast engine computes, and which of their modules it reads."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qwen_lit.engine.lora_linear import read_linear
from qwen_lit.families.layer import Layer
from qwen_lit.families.table import FAMILIES, family_of
from qwen_lit.kernels.launch import HAS_TRITON


def unsupported_reason(model: PeftModel, device: torch.device) -> str | None:
    """Why the fast engine cannot run a model; None when it can.

    Args:
        model: a ``PeftModel`` around a Qwen2 or Qwen3 for causal language modelling.
        device: where it stands.
    """
    if device.type == "cuda" and not HAS_TRITON:
        return "Triton is not installed"
    base: Any = model.base_model.model
    config = base.config
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type} is not {' or '.join(FAMILIES)}"
    family = family_of(config)
    layers = family.layers(config)
    if foreign := without_kernels(layers):
        return foreign
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}"
    size = layers[0].head_size
    if size & (size - 1):
        return f"heads of {size} are not a power of two"
    lora = next(iter(model.peft_config.values()))
    for option in ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias"):
        if getattr(lora, option, None):
            return f"lora_config.{option} is set"
    if len(model.active_adapters) != 1:
        return "not exactly one adapter is active"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            return f"{name} is trained too"
    blocks = list(zip(base.get_submodule(family.decoder).layers, layers, strict=True))
    known = {id(one) for block, layer in blocks for one in linears_of(block, layer).values()}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and id(module) not in known:
            return f"{name} has an adapter"
        if getattr(module, "lora_variant", None):
            return f"{name} has a variant of LoRA"
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"{family.head} is a {type(head).__name__}"
    for block, layer in blocks:
        found = linears_of(block, layer)
        for group in layer.groups:
            rates = {m.dropout for m in (read_linear(found[one.name], True) for one in group) if m.a is not None}
            if len(rates) > 1:
                return f"{', '.join(one.name for one in group)} have different dropout rates"
        for name, module in found.items():
            kind = type(getattr(module, "base_layer", module)).__name__
            if kind not in ("Linear", "Linear4bit"):
                return f"{name} is a {kind}"
    return None


def without_kernels(layers: Sequence[Layer]) -> str | None:
    """What of a model's layers the fast engine has no kernels for, in words; None where it has all of them."""
    kinds = Counter(layer.mixer for layer in layers if layer.mixer != "attention")
    found = [f"{count} have {kind}" for kind, count in kinds.items()]
    experts = sum(layer.feed_forward == "experts" for layer in layers)
    found += [f"{experts} have experts"] * (experts > 0)
    if not found:
        return None
    return f"of {len(layers)} layers {' and '.join(found)}, for which the fast engine has no kernels"


def linears_of(block: nn.Module, layer: Layer) -> dict[str, nn.Module]:
    """The linears of a decoder layer by name, with their adapters around them.

    Args:
        block: transformers' module.
        layer: what it is.
    """
    return {linear.name: block.get_submodule(linear.path) for linear in layer.linears}
