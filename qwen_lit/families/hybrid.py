"""What Qwen's hybrids share: gated attention in some layers, linear attention (a gated DeltaNet) in the others."""

from qwen_lit.families.layer import Config, Linear, Vector, value_of

Groups = tuple[tuple[Linear, ...], ...]


def is_linear(config: Config) -> list[bool]:
    """Of each layer, whether it has linear attention: ``layer_types``, or all but each fourth one."""
    kinds = value_of(config, "layer_types")
    if kinds is not None:
        return [kind == "linear_attention" for kind in kinds]
    interval = value_of(config, "full_attention_interval", 4)
    return [bool((number + 1) % interval) for number in range(value_of(config, "num_hidden_layers"))]


def head_size(config: Config) -> int:
    """Numbers of a head of gated attention."""
    return int(value_of(config, "head_dim", 256))


def gated_attention(config: Config) -> tuple[Groups, tuple[Vector, ...]]:
    """Attention whose output passes a gate, which comes out of ``q_proj`` beside each head's query."""
    hidden, size, heads = value_of(config, "hidden_size"), head_size(config), value_of(config, "num_attention_heads")
    key_heads, bias = value_of(config, "num_key_value_heads", heads), bool(value_of(config, "attention_bias", False))
    groups = (
        (
            Linear("self_attn.q_proj", hidden, 2 * heads * size, bias, gguf="attn_q"),
            Linear("self_attn.k_proj", hidden, key_heads * size, bias, gguf="attn_k"),
            Linear("self_attn.v_proj", hidden, key_heads * size, bias, gguf="attn_v"),
        ),
        (Linear("self_attn.o_proj", heads * size, hidden, bias, gguf="attn_output"),),
    )
    return groups, (
        Vector("self_attn.q_norm.weight", size, "attn_q_norm"),
        Vector("self_attn.k_norm.weight", size, "attn_k_norm"),
    )


def delta_net(config: Config, joined: bool) -> tuple[Groups, tuple[Vector, ...]]:
    """A gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a convolution, then a state that each token writes to.

    The two small projections that steer how fast the state decays and how much a token writes are never quantised.

    Args:
        config: of the model.
        joined: whether query, key, value and gate are one matrix, as in Qwen3-Next, and the two small ones another.
    """
    hidden = value_of(config, "hidden_size")
    heads, key_heads = value_of(config, "linear_num_value_heads", 32), value_of(config, "linear_num_key_heads", 16)
    value_size = value_of(config, "linear_value_head_dim", 128)
    values, keys = heads * value_size, key_heads * value_of(config, "linear_key_head_dim", 128)
    mixed = 2 * keys + values
    large = {"in_proj_qkvz": mixed + values} if joined else {"in_proj_qkv": mixed, "in_proj_z": values}
    small = {"in_proj_ba": 2 * heads} if joined else {"in_proj_b": heads, "in_proj_a": heads}
    groups = (
        (
            *(Linear(f"linear_attn.{name}", hidden, rows) for name, rows in large.items()),
            *(Linear(f"linear_attn.{name}", hidden, rows, quantized=False) for name, rows in small.items()),
        ),
        (Linear("linear_attn.out_proj", values, hidden),),
    )
    return groups, (
        Vector("linear_attn.conv1d.weight", mixed * value_of(config, "linear_conv_kernel_dim", 4)),
        Vector("linear_attn.A_log", heads),
        Vector("linear_attn.dt_bias", heads),
        Vector("linear_attn.norm.weight", value_size),
    )


def delta_state(config: Config) -> int:
    """Numbers of a gated DeltaNet's state: a matrix of key by value for each head."""
    size = value_of(config, "linear_key_head_dim", 128) * value_of(config, "linear_value_head_dim", 128)
    return int(value_of(config, "linear_num_value_heads", 32) * size)
