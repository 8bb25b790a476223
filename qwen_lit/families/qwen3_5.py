"""Qwen3.5, 3.6 and 3.8, dense and mixtures of experts: linear attention, and gated attention in each fourth layer."""

from dataclasses import replace

from qwen_lit.families.dense import mlp_groups
from qwen_lit.families.hybrid import delta_net, delta_state, gated_attention, head_size, is_linear
from qwen_lit.families.layer import Config, Family, Layer, Vector, value_of
from qwen_lit.families.mixtures import feed_forward
from qwen_lit.families.wrappers import wrapped

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj")


def hybrid_layers(config: Config, joined: bool, experts: bool) -> tuple[Layer, ...]:
    """The decoder layers of a hybrid.

    Args:
        config: of the model.
        joined: as of ``delta_net``.
        experts: whether there are experts behind the mixers.
    """
    hidden, heads = value_of(config, "hidden_size"), value_of(config, "num_attention_heads")
    norms = (
        Vector("input_layernorm.weight", hidden, "attn_norm"),
        Vector("post_attention_layernorm.weight", hidden, "post_attention_norm"),
    )
    found = []
    for number, linear in enumerate(is_linear(config)):
        mixer, vectors = delta_net(config, joined) if linear else gated_attention(config)
        kind, groups = (
            feed_forward(config, number)
            if experts
            else ("mlp", mlp_groups(hidden, value_of(config, "intermediate_size")))
        )
        layer = Layer("linear attention", kind, (*mixer, *groups), (*norms, *vectors), state=delta_state(config))
        if not linear:
            key_heads = value_of(config, "num_key_value_heads", heads)
            layer = replace(
                layer,
                mixer="gated attention",
                heads=heads,
                key_heads=key_heads,
                head_size=head_size(config),
                query_key_norm=True,
                state=0,
            )
        found.append(layer)
    return tuple(found)


QWEN3_5_TEXT = Family(
    model_type="qwen3_5_text",
    releases=(),
    layers=lambda config: hybrid_layers(config, joined=False, experts=False),
    packs=False,
    float16=False,
    targets=(*ATTENTION, "gate_proj", "up_proj", "down_proj"),
)
QWEN3_5_MOE_TEXT = Family(
    model_type="qwen3_5_moe_text",
    releases=(),
    layers=lambda config: hybrid_layers(config, joined=False, experts=True),
    packs=False,
    float16=False,
    targets=(*ATTENTION, "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
)
QWEN3_5 = wrapped(QWEN3_5_TEXT, "qwen3_5", ("Qwen3.5", "Qwen3.6 and Qwen3.8 dense"))
QWEN3_5_MOE = wrapped(QWEN3_5_MOE_TEXT, "qwen3_5_moe", ("Qwen3.5 and 3.6 A3B",))
