"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from qwen_lit.families.dense import dense_fields, dense_layers
from qwen_lit.families.gguf import Gguf
from qwen_lit.families.layer import Config, Family, Layer, value_of


def layers(config: Config) -> tuple[Layer, ...]:
    """The decoder layers of a model."""
    size = value_of(config, "hidden_size") // value_of(config, "num_attention_heads")
    return dense_layers(config, value_of(config, "head_dim", size), bias=(True, False), query_key_norm=False)


QWEN2 = Family(
    model_type="qwen2",
    releases=("Qwen2", "Qwen2.5"),
    layers=layers,
    gguf=Gguf("qwen2", dense_fields),
)
