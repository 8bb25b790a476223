"""Floating-point operations that a token takes, and that a card can do."""

import time
from typing import Any

import torch
from peft import PeftModel

from qwen_lit.families.table import family_of
from qwen_lit.quantization import base_name

PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "5090": 210e12,
    "4090": 165e12,
    "4080": 97e12,
    "4070": 58e12,
    "4060": 30e12,
    "3090": 71e12,
    "3080": 60e12,
    "3060": 26e12,
}
"""Dense bf16 operations a second with fp32 accumulation, from the makers' sheets, by a part of the name."""


def peak_flops(name: str) -> float | None:
    """The sheet's peak of a card; None for one that is not known. The longest name that fits is taken."""
    found = [part for part in PEAKS if part in name]
    return PEAKS[max(found, key=len)] if found else None


def token_flops(model: PeftModel, length: float, supervised: float) -> tuple[float, float]:
    """Floating-point operations of a trained token on frozen weights.

    A frozen weight costs 4 a parameter: forward, and the gradient of its input; its own gradient is not computed. A
    LoRA weight costs 6. The head works on supervised tokens alone, an expert on its share of the tokens. Attention
    counts where it is; linear attention reads its state twice and writes it once, however that is computed.

    Args:
        model: a PEFT model; its weights may stand on the meta device.
        length: mean tokens of a document.
        supervised: share of the tokens that have a loss.

    Returns:
        The operations of a trained token, and those of its forward pass through the decoder, which recomputing adds.
    """
    base: Any = model.base_model.model
    config = base.config
    layers = family_of(config).layers(config)
    linear = sum(one.numbers * one.tokens for layer in layers for one in layer.linears)
    shares = expert_shares(config)
    lora = sum(
        p.numel() * shares.get(base_name(name).partition(".lora_")[0], 1.0)
        for name, p in model.named_parameters()
        if "lora_" in name and p.ndim == 2
    )
    # A causal token sees half of its document; two products forward, four backward.
    attention = 2 * length * sum(layer.heads * layer.head_size for layer in layers if layer.attends)
    mixing = attention + 2 * 3 * sum(layer.state for layer in layers)
    head = config.vocab_size * config.hidden_size * supervised
    return 4 * (linear + head) + 6 * lora + 3 * mixing, 2 * (linear + lora) + mixing


def expert_shares(config: Any) -> dict[str, float]:
    """Share of the tokens that pass one expert, by the place of the experts in transformers' model.

    Args:
        config: of the base model.
    """
    family = family_of(config)
    return {
        f"{family.block(number)}.{one.path}".rpartition(".")[0]: one.tokens
        for number, layer in enumerate(family.layers(config))
        for one in layer.linears
        if one.count > 1
    }


def measured_flops(device: torch.device, size: int = 8192) -> float:
    """Operations a second that a large bf16 matrix product reaches on a device."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(6):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
