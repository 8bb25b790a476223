"""Qwen3, dense: queries and keys are normed, and heads have a size of their own."""

from qwen_lit.families.dense import dense_fields, dense_layers
from qwen_lit.families.gguf import Field, Gguf
from qwen_lit.families.layer import Config, Family, Layer, value_of

HEAD_SIZE = 128
"""Where the config has no ``head_dim``."""


def layers(config: Config) -> tuple[Layer, ...]:
    """The decoder layers of a model."""
    bias = bool(value_of(config, "attention_bias", False))
    return dense_layers(config, value_of(config, "head_dim", HEAD_SIZE), bias=(bias, bias), query_key_norm=True)


def fields(config: Config) -> dict[str, Field]:
    """A model's shape by GGUF's keys."""
    size = value_of(config, "head_dim", HEAD_SIZE)
    return dense_fields(config) | {"attention.key_length": size, "attention.value_length": size}


QWEN3 = Family(
    model_type="qwen3",
    releases=("Qwen3 dense",),
    layers=layers,
    gguf=Gguf("qwen3", fields),
)
