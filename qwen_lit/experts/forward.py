"""What the experts of a layer compute, as a function in transformers' registry."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qwen_lit.experts.products import Rows, frozen_product, grouped, taken
from qwen_lit.experts.stacked import held_4bit, stacks

NAME = "qwen_lit"
"""Of the function in transformers' registry."""


class Factors(NamedTuple):
    """LoRA on the experts of one parameter."""

    a: Tensor
    """``[experts, r, in]``"""
    b: Tensor
    """``[experts, out, r]``"""
    scaling: float


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: Mapping[str, Factors] | None = None,
) -> Tensor:
    """The experts of a layer: of each token, the weighted sum of what its experts make of it.

    Matrices that no token passes are neither dequantised nor read.

    Args:
        module: transformers' experts module, its parameters as they are or as ``Stacked4bit`` holds them.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: ``[tokens, k]``, the experts of each token.
        top_k_weights: ``[tokens, k]``, how much each counts.
        lora: by the parameter's name in the module.

    Returns:
        ``[tokens, hidden]`` in the dtype of ``hidden_states``.
    """
    tokens, fan = top_k_index.shape
    experts = top_k_index.reshape(-1)
    order = experts.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    shape = Rows(torch.bincount(experts, minlength=module.num_experts))
    rows = taken(hidden_states, order, back, fan)
    made = _linear(module, "gate_up_proj", rows, shape, lora or {})
    made = _linear(module, "down_proj", module._apply_gate(made), shape, lora or {})
    made = taken(made, back, order).view(tokens, fan, -1)
    return (made * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _linear(module: Any, name: str, rows: Tensor, shape: Rows, lora: Mapping[str, Factors]) -> Tensor:
    """What one parameter's matrices make of the rows, LoRA beside them."""
    made = frozen_product(rows, getattr(module, name), held_4bit(module).get(name), shape)
    if name not in lora or not shape.hit:
        return made
    a, b, scaling = lora[name]
    kind = rows.device.type
    # As PEFT's layers: in the dtype of autocast, or in that of the factors.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
    every = range(len(shape.counts))
    low = grouped(rows.to(dtype), a.to(dtype).mT, shape, every)
    added = grouped(low, b.to(dtype).mT.contiguous(), shape, every)
    return made + (added * scaling).to(made.dtype)


def use_own_function(model: Any) -> None:
    """Let a model's experts be computed by ``experts_forward``; a model without experts stays as it is."""
    for _, module in stacks(model):
        module.config._experts_implementation = NAME


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
