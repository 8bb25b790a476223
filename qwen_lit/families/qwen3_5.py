"""Qwen3.5, 3.6 and 3.8, dense and mixtures of experts: linear attention, and gated attention in each fourth layer."""

from collections.abc import Callable
from dataclasses import replace

from qwen_lit.families.dense import mlp_groups
from qwen_lit.families.gguf import Field, Gguf, Stored
from qwen_lit.families.hybrid import (
    delta_net,
    delta_state,
    gated_attention,
    head_size,
    hybrid_cannot,
    hybrid_fields,
    is_linear,
)
from qwen_lit.families.layer import Config, Family, Layer, Vector, value_of
from qwen_lit.families.mixtures import expert_fields, experts_cannot, feed_forward
from qwen_lit.families.wrappers import wrapped

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj")


NORM = Stored("output_norm.weight", value="plus one")
SECTIONS = [11, 11, 10, 0]
"""Of the rotation, where a config says none: llama.cpp's converter writes these."""


def hybrid_layers(config: Config, joined: bool, experts: bool) -> tuple[Layer, ...]:
    """The decoder layers of a hybrid.

    Args:
        config: of the model.
        joined: as of ``delta_net``.
        experts: whether there are experts behind the mixers.
    """
    return tuple(
        hybrid_layer(config, number, linear, joined, experts) for number, linear in enumerate(is_linear(config))
    )


def hybrid_layer(config: Config, number: int, linear: bool, joined: bool, experts: bool) -> Layer:
    """A layer of a hybrid; see ``hybrid_layers``.

    Args:
        config: of the model.
        number: of the layer.
        linear: whether it has linear attention.
        joined: as of ``delta_net``.
        experts: whether there are experts behind its mixer.
    """
    hidden, heads = value_of(config, "hidden_size"), value_of(config, "num_attention_heads")
    norms = (
        Vector("input_layernorm.weight", hidden, Stored("attn_norm.weight", value="plus one")),
        Vector("post_attention_layernorm.weight", hidden, Stored("post_attention_norm.weight", value="plus one")),
    )
    mixer, vectors = delta_net(config, joined) if linear else gated_attention(config)
    kind, groups = (
        feed_forward(config, number) if experts else ("mlp", mlp_groups(hidden, value_of(config, "intermediate_size")))
    )
    layer = Layer("linear attention", kind, (*mixer, *groups), (*norms, *vectors), state=delta_state(config))
    if linear:
        return layer
    return replace(
        layer,
        mixer="gated attention",
        heads=heads,
        key_heads=value_of(config, "num_key_value_heads", heads),
        head_size=head_size(config),
        query_key_norm=True,
        state=0,
    )


def hybrid_form(arch: str, fields: Callable[[Config], dict[str, Field]], joined: bool, experts: bool) -> Gguf:
    """A hybrid in GGUF.

    Args:
        arch: llama.cpp's name of it.
        fields: its shape by GGUF's keys.
        joined: as of ``delta_net``.
        experts: whether there are experts behind the mixers.
    """

    def cannot(config: Config) -> str:
        if experts and (reason := experts_cannot(hybrid_layers(config, joined, experts), shares_sum_to_one(config))):
            return reason
        return hybrid_cannot(config)

    def ahead(config: Config) -> Layer:
        return hybrid_layer(config, value_of(config, "num_hidden_layers"), False, joined, experts)

    return Gguf(arch, fields, NORM, ahead, cannot=cannot)


def shares_sum_to_one(config: Config) -> bool:
    """Whether the chosen experts' shares are scaled to sum to one; Qwen3-Next's config alone can say no."""
    return bool(value_of(config, "norm_topk_prob", True))


def fields(config: Config) -> dict[str, Field]:
    """The shape of a Qwen3.5 by GGUF's keys."""
    return {"rope.dimension_sections": SECTIONS} | hybrid_fields(config)


def moe_fields(config: Config) -> dict[str, Field]:
    """The shape of a Qwen3.5 mixture of experts by GGUF's keys."""
    return fields(config) | expert_fields(config)


QWEN3_5_TEXT = Family(
    model_type="qwen3_5_text",
    releases=(),
    layers=lambda config: hybrid_layers(config, joined=False, experts=False),
    float16=False,
    targets=(*ATTENTION, "gate_proj", "up_proj", "down_proj"),
    gguf=hybrid_form("qwen35", fields, joined=False, experts=False),
)
QWEN3_5_MOE_TEXT = Family(
    model_type="qwen3_5_moe_text",
    releases=(),
    layers=lambda config: hybrid_layers(config, joined=False, experts=True),
    experts=True,
    float16=False,
    targets=(*ATTENTION, "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
    gguf=hybrid_form("qwen35moe", moe_fields, joined=False, experts=True),
)
QWEN3_5 = wrapped(QWEN3_5_TEXT, "qwen3_5", ("Qwen3.5", "Qwen3.6 and Qwen3.8 dense"))
QWEN3_5_MOE = wrapped(QWEN3_5_MOE_TEXT, "qwen3_5_moe", ("Qwen3.5 and 3.6 A3B",))
