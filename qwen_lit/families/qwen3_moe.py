"""Qwen3's mixtures of experts, such as Qwen3-30B-A3B: Qwen3's attention with experts behind it."""

from dataclasses import replace

from qwen_lit.families import qwen3
from qwen_lit.families.gguf import Field, Gguf
from qwen_lit.families.layer import Config, Family, Layer, value_of
from qwen_lit.families.mixtures import expert_fields, experts_cannot, feed_forward


def layers(config: Config) -> tuple[Layer, ...]:
    """The decoder layers of a model."""
    found = []
    for number, layer in enumerate(qwen3.layers(config)):
        kind, groups = feed_forward(config, number)
        found.append(replace(layer, feed_forward=kind, groups=(*layer.groups[:2], *groups)))
    return tuple(found)


def fields(config: Config) -> dict[str, Field]:
    """A model's shape by GGUF's keys."""
    return qwen3.fields(config) | expert_fields(config)


def cannot(config: Config) -> str:
    """Why llama.cpp would compute something else; empty where it computes the same."""
    return experts_cannot(layers(config), bool(value_of(config, "norm_topk_prob", False)))


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    releases=("Qwen3 A3B",),
    layers=layers,
    experts=True,
    float16=False,
    gguf=Gguf("qwen3moe", fields, cannot=cannot),
)
