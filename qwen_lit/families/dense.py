"""What Qwen's dense families share: grouped-query attention and a gated MLP, each behind its norm."""

from qwen_lit.families.gguf import Field, Stored, as_is, rope_fields
from qwen_lit.families.layer import Config, Layer, Linear, Mixer, Vector, rope_of, value_of


def dense_layers(config: Config, size: int, bias: tuple[bool, bool], query_key_norm: bool) -> tuple[Layer, ...]:
    """The layers of a dense model.

    Args:
        config: of the model.
        size: numbers of a head of attention.
        bias: whether queries, keys and values have one, and whether attention's output has.
        query_key_norm: whether queries and keys are normed.
    """
    hidden, heads = value_of(config, "hidden_size"), value_of(config, "num_attention_heads")
    key_heads = value_of(config, "num_key_value_heads", heads)
    groups = (
        (
            Linear("self_attn.q_proj", hidden, heads * size, bias[0], gguf=as_is("attn_q")),
            Linear("self_attn.k_proj", hidden, key_heads * size, bias[0], gguf=as_is("attn_k")),
            Linear("self_attn.v_proj", hidden, key_heads * size, bias[0], gguf=as_is("attn_v")),
        ),
        (Linear("self_attn.o_proj", heads * size, hidden, bias[1], gguf=as_is("attn_output")),),
        *mlp_groups(hidden, value_of(config, "intermediate_size")),
    )
    vectors = [
        Vector("input_layernorm.weight", hidden, Stored("attn_norm.weight")),
        Vector("post_attention_layernorm.weight", hidden, Stored("ffn_norm.weight")),
    ]
    if query_key_norm:
        vectors += [
            Vector("self_attn.q_norm.weight", size, Stored("attn_q_norm.weight")),
            Vector("self_attn.k_norm.weight", size, Stored("attn_k_norm.weight")),
        ]
    return tuple(
        Layer(mixer, "mlp", groups, tuple(vectors), heads, key_heads, size, query_key_norm)
        for mixer in attention_mixers(config)
    )


def mlp_groups(hidden: int, inner: int, path: str = "mlp", ending: str = "") -> tuple[tuple[Linear, ...], ...]:
    """The linears of a gated MLP.

    Args:
        hidden: numbers that go in and out.
        inner: numbers between.
        path: of its module in the layer.
        ending: of its names in a GGUF file.
    """
    return (
        (
            Linear(f"{path}.gate_proj", hidden, inner, gguf=as_is(f"ffn_gate{ending}")),
            Linear(f"{path}.up_proj", hidden, inner, gguf=as_is(f"ffn_up{ending}")),
        ),
        (Linear(f"{path}.down_proj", inner, hidden, gguf=as_is(f"ffn_down{ending}")),),
    )


def attention_mixers(config: Config) -> list[Mixer]:
    """Of each layer, as transformers reads them: ``layer_types``, or a window from ``max_window_layers`` on."""
    count = value_of(config, "num_hidden_layers")
    kinds = value_of(config, "layer_types")
    if kinds is None:
        windowed = value_of(config, "use_sliding_window", False) and value_of(config, "sliding_window", 4096)
        first = value_of(config, "max_window_layers", 28) if windowed else count
        kinds = ["sliding_attention" if number >= first else "full_attention" for number in range(count)]
    return ["sliding-window attention" if kind == "sliding_attention" else "attention" for kind in kinds]


def dense_fields(config: Config) -> dict[str, Field]:
    """A dense model's shape by GGUF's keys."""
    rope = rope_of(config)
    heads = value_of(config, "num_attention_heads")
    return {
        "context_length": value_of(config, "max_position_embeddings"),
        "embedding_length": value_of(config, "hidden_size"),
        "block_count": value_of(config, "num_hidden_layers"),
        "feed_forward_length": value_of(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": value_of(config, "num_key_value_heads", heads),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(value_of(config, "rms_norm_eps")),
        **rope_fields(rope),
    }
