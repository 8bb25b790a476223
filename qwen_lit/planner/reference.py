"""The memory of PEFT's own path, by the family's table: for models and adapters that the fast engine does not run.

It is an estimate: what autograd keeps of transformers' modules under autocast, counted by the sizes of a layer.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel

from qwen_lit.experts.products import GROUP_BYTES
from qwen_lit.families.layer import Layer, Linear
from qwen_lit.families.table import family_of
from qwen_lit.planner.memory import MEMORY
from qwen_lit.quantization import base_name

SIZE, FLOAT = 2, 4
"""Bytes of a number in products, and in what transformers computes in float32: norms, the delta rule, the loss."""
CHUNK = 64
"""Tokens of a chunk of transformers' delta rule."""
ROWS = 1024
"""Rows of logits at a time, as of ``model.loss.summed_loss``."""
LOSS = 3 * FLOAT
"""Bytes of a logit in the loss's backward: its log-probability, and two gradients."""


@dataclass(frozen=True)
class Adapted:
    """The adapter in a layer."""

    paths: Container[str]
    """Of the linears that have one."""
    rank: int
    dropout: bool


def layer_bytes(layer: Layer, hidden: int, adapted: Adapted) -> int:
    """Bytes a token that autograd keeps of a layer for its backward.

    Args:
        layer: what it is.
        hidden: width of the residual stream.
        adapted: linears with LoRA.
    """
    mixer = _delta_net(layer) if layer.state else _attention(layer)
    return 2 * FLOAT * hidden + mixer + _feed_forward(layer, hidden) + _lora(layer, adapted)


def _attention(layer: Layer) -> int:
    """Queries and keys in float32 at their norms; queries, keys, values and the result; the gate and what it takes."""
    query, key = layer.heads * layer.head_size, layer.key_heads * layer.head_size
    norms = FLOAT * (query + key) * layer.query_key_norm
    gate = 2 * SIZE * query * (layer.mixer == "gated attention")
    return norms + gate + SIZE * 4 * query


def _delta_net(layer: Layer) -> int:
    """The delta rule by chunks, in float32, with queries and keys repeated for each head of values."""
    sizes = {one.name: one.outputs for one in layer.linears}
    norm = next(one.size for one in layer.vectors if one.name == "linear_attn.norm.weight")
    heads = next(one.size for one in layer.vectors if one.name == "linear_attn.A_log")
    values, keys = heads * norm, layer.state // norm
    mixed = sizes["in_proj_qkv"] if "in_proj_qkv" in sizes else sizes["in_proj_qkvz"] - values
    rule = FLOAT * (3 * keys + 5 * keys + 3 * values + 5 * CHUNK * heads + 2 * layer.state // CHUNK)
    gated = 3 * FLOAT * values + SIZE * values
    return 2 * SIZE * mixed + rule + gated


def _feed_forward(layer: Layer, hidden: int) -> int:
    """The gate, its activation and what it takes; of experts as often as a token passes one, with its own result."""
    total = 0.0
    for one in layer.linears:
        if one.name == "gate_proj":
            total += SIZE * 3 * one.outputs
        elif one.name == "gate_up_proj":
            passed = one.tokens * one.count
            total += SIZE * passed * (1.5 * one.outputs + 2 * hidden)
        elif one.name == "shared_expert_gate":
            total += SIZE * hidden
    return int(total)


def _lora(layer: Layer, adapted: Adapted) -> int:
    """The input of each adapter, once for linears of one input where nothing is dropped of it."""
    total = 0
    for group in layer.groups:
        found = [one for one in group if one.path in adapted.paths]
        if found:
            width = found[0].inputs * (SIZE + 1) * len(found) if adapted.dropout else found[0].inputs * SIZE
            total += width + SIZE * adapted.rank * len(found)
    return total


@dataclass(frozen=True)
class ReferenceMemory:
    """What a step of the reference engine takes at its peak, in bytes by name."""

    parts: Mapping[str, int]

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def reference_memory(
    model: PeftModel, static: int, tokens: int, supervised: int, state_bytes: float, checkpointing: bool
) -> ReferenceMemory:
    """An estimate for one micro-batch.

    Args:
        model: with its adapter; its weights may stand on the meta device.
        static: bytes of all weights.
        tokens: that are computed, padding included.
        supervised: of them, those that have a loss.
        state_bytes: bytes of optimizer state for each trained parameter.
        checkpointing: a layer keeps its input alone, and computes the rest again in backward.
    """
    base: Any = model.base_model.model
    config = base.config
    lora: LoraConfig = next(iter(model.peft_config.values()))  # type: ignore[assignment]
    family, hidden = family_of(config), config.hidden_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {base_name(name).partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    layers = family.layers(config)
    kept = []
    for number, layer in enumerate(layers):
        block = family.block(number) + "."
        paths = {name.removeprefix(block) for name in found if name.startswith(block)}
        adapted = Adapted(paths, lora.r, lora.lora_dropout > 0)
        kept.append(layer_bytes(layer, hidden, adapted) * tokens)
    inputs = SIZE * hidden * tokens
    widest = max(one.outputs * max(1, one.tokens * one.count) for layer in layers for one in layer.linears)
    parts = {
        "weights": static,
        "gradients of the adapter, float32": 4 * trained,
        "optimizer states": int(state_bytes * trained),
        "workspaces of cuBLAS": MEMORY.cublas,
    }
    loss = min(ROWS, supervised) * config.vocab_size * LOSS
    if checkpointing:
        largest = max(kept)
        parts["inputs of the layers"] = inputs * len(layers)
    else:
        largest = kept[-1]
        parts["kept by the layers"] = sum(kept) - largest
    backward = largest + int(2 * SIZE * widest * tokens) + max(_dequantised(one) for one in _linears(layers))
    name = "the largest layer, computed again, and its backward" if checkpointing else "the last layer's backward"
    parts |= {name: backward} if backward > loss else {"logits and their loss": loss}
    return ReferenceMemory(parts)


def _linears(layers: tuple[Layer, ...]) -> list[Linear]:
    return [one for layer in dict.fromkeys(layers) for one in layer.linears]


def _dequantised(linear: Linear) -> int:
    """Bytes of what is dequantised for a product; experts are, a few at a time."""
    size = SIZE * linear.numbers
    return max(SIZE * linear.inputs * linear.outputs, min(size, GROUP_BYTES)) if linear.count > 1 else size
