"""Qwen3-Next: the first hybrid, with experts in every layer."""

from qwen_lit.families.gguf import Field
from qwen_lit.families.hybrid import hybrid_fields
from qwen_lit.families.layer import Config, Family
from qwen_lit.families.mixtures import expert_fields
from qwen_lit.families.qwen3_5 import hybrid_form, hybrid_layers


def fields(config: Config) -> dict[str, Field]:
    """A model's shape by GGUF's keys."""
    return hybrid_fields(config) | expert_fields(config)


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    releases=("Qwen3-Next",),
    layers=lambda config: hybrid_layers(config, joined=True, experts=True),
    experts=True,
    targets=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "out_proj"),
        *("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
    ),
    gguf=hybrid_form("qwen3next", fields, joined=True, experts=True),
)
