"""Qwen3's mixtures of experts, such as Qwen3-30B-A3B: Qwen3's attention with experts behind it."""

from dataclasses import replace

from qwen_lit.families import qwen3
from qwen_lit.families.layer import Config, Family, Layer
from qwen_lit.families.mixtures import feed_forward


def layers(config: Config) -> tuple[Layer, ...]:
    """The decoder layers of a model."""
    found = []
    for number, layer in enumerate(qwen3.layers(config)):
        kind, groups = feed_forward(config, number)
        found.append(replace(layer, feed_forward=kind, groups=(*layer.groups[:2], *groups)))
    return tuple(found)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    releases=("Qwen3 A3B",),
    layers=layers,
    packs=True,
    float16=False,
)
