"""What Qwen's hybrids share: gated attention in some layers, linear attention (a gated DeltaNet) in the others."""

from qwen_lit.families.dense import dense_fields
from qwen_lit.families.gguf import Field, Runs, Stored, as_is
from qwen_lit.families.layer import Config, Linear, Vector, rope_of, value_of

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
            Linear("self_attn.q_proj", hidden, 2 * heads * size, bias, gguf=as_is("attn_q")),
            Linear("self_attn.k_proj", hidden, key_heads * size, bias, gguf=as_is("attn_k")),
            Linear("self_attn.v_proj", hidden, key_heads * size, bias, gguf=as_is("attn_v")),
        ),
        (Linear("self_attn.o_proj", heads * size, hidden, bias, gguf=as_is("attn_output")),),
    )
    return groups, (
        Vector("self_attn.q_norm.weight", size, Stored("attn_q_norm.weight", value="plus one")),
        Vector("self_attn.k_norm.weight", size, Stored("attn_k_norm.weight", value="plus one")),
    )


def delta_net(config: Config, joined: bool) -> tuple[Groups, tuple[Vector, ...]]:
    """A gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a convolution, then a state that each token writes to.

    The two small projections that steer how fast the state decays and how much a token writes are never quantised.

    Args:
        config: of the model.
        joined: whether query, key, value and gate are one matrix, as in Qwen3-Next, and the two small ones another.
    """
    hidden = value_of(config, "hidden_size")
    heads, key_heads, key_size, value_size = delta_sizes(config)
    values, keys = heads * value_size, key_heads * key_size
    mixed = 2 * keys + values
    large = {"in_proj_qkvz": mixed + values} if joined else {"in_proj_qkv": mixed, "in_proj_z": values}
    small = {"in_proj_ba": 2 * heads} if joined else {"in_proj_b": heads, "in_proj_a": heads}
    stored = joined_form(config) if joined else parted_form(config)
    groups = (
        (
            *(Linear(f"linear_attn.{name}", hidden, rows, gguf=stored[name]) for name, rows in large.items()),
            *(
                Linear(f"linear_attn.{name}", hidden, rows, quantized=False, gguf=stored[name])
                for name, rows in small.items()
            ),
        ),
        (Linear("linear_attn.out_proj", values, hidden, gguf=stored["out_proj"]),),
    )
    kernel = mixed * value_of(config, "linear_conv_kernel_dim", 4)
    sizes = {"conv1d.weight": kernel, "A_log": heads, "dt_bias": heads, "norm.weight": value_size}
    return groups, tuple(Vector(f"linear_attn.{name}", size, stored[name][0]) for name, size in sizes.items())


def delta_sizes(config: Config) -> tuple[int, int, int, int]:
    """Heads of values, heads of keys and queries, numbers of a key's and of a value's head."""
    return (
        value_of(config, "linear_num_value_heads", 32),
        value_of(config, "linear_num_key_heads", 16),
        value_of(config, "linear_key_head_dim", 128),
        value_of(config, "linear_value_head_dim", 128),
    )


def parted_form(config: Config) -> dict[str, tuple[Stored, ...]]:
    """A gated DeltaNet of Qwen3.5 in a GGUF file.

    transformers has the values' heads that share a key's head side by side; llama.cpp repeats all keys one after the
    other, so it wants the first value head of each key, then the second of each. That holds for all that has a value
    head's numbers in a row or a column.
    """
    heads, key_heads, key_size, value_size = delta_sizes(config)
    each = heads // key_heads

    def tiled(size: int, first: int = 0) -> Runs:
        """Value heads of ``size`` rows in llama.cpp's order, behind ``first`` rows that stay as they are."""
        if each == 1:
            return ()
        order = [key * each + number for number in range(each) for key in range(key_heads)]
        moved = tuple(range(first + head * size, first + (head + 1) * size) for head in order)
        return (range(first), *moved) if first else moved

    rows, single, mixed = tiled(value_size), tiled(1), tiled(value_size, 2 * key_heads * key_size)
    return {
        "in_proj_qkv": (Stored("attn_qkv.weight", rows=mixed),),
        "in_proj_z": (Stored("attn_gate.weight", rows=rows),),
        "in_proj_b": (Stored("ssm_beta.weight", rows=single),),
        "in_proj_a": (Stored("ssm_alpha.weight", rows=single),),
        "out_proj": (Stored("ssm_out.weight", columns=rows),),
        "conv1d.weight": (Stored("ssm_conv1d.weight", rows=mixed, exact=True),),
        "A_log": (Stored("ssm_a", rows=single, value="minus exp"),),
        "dt_bias": (Stored("ssm_dt.bias", rows=single),),
        "norm.weight": as_is("ssm_norm"),
    }


def joined_form(config: Config) -> dict[str, tuple[Stored, ...]]:
    """A gated DeltaNet of Qwen3-Next in a GGUF file.

    transformers has one matrix with each key head's query, key, values and gates; llama.cpp wants all queries, all
    keys and all values as one matrix, and the gates as another.
    """
    heads, key_heads, key_size, value_size = delta_sizes(config)
    values = heads // key_heads * value_size

    def of_each(start: int, size: int) -> Runs:
        whole = 2 * key_size + 2 * values
        return tuple(range(head * whole + start, head * whole + start + size) for head in range(key_heads))

    mixed = (*of_each(0, key_size), *of_each(key_size, key_size), *of_each(2 * key_size, values))
    return {
        "in_proj_qkvz": (
            Stored("attn_qkv.weight", rows=mixed),
            Stored("attn_gate.weight", rows=of_each(2 * key_size + values, values)),
        ),
        "in_proj_ba": as_is("ssm_ba"),
        "out_proj": as_is("ssm_out"),
        "conv1d.weight": (Stored("ssm_conv1d.weight", exact=True),),
        "A_log": (Stored("ssm_a", value="minus exp"),),
        "dt_bias": (Stored("ssm_dt.bias"),),
        "norm.weight": as_is("ssm_norm"),
    }


def delta_state(config: Config) -> int:
    """Numbers of a gated DeltaNet's state: a matrix of key by value for each head."""
    heads, _, key_size, value_size = delta_sizes(config)
    return heads * key_size * value_size


def hybrid_fields(config: Config) -> dict[str, Field]:
    """A hybrid's shape by GGUF's keys; without an MLP's width where there is no MLP."""
    heads, key_heads, key_size, value_size = delta_sizes(config)
    size = head_size(config)
    fields = dense_fields(config) | {
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": int(size * rope_of(config).get("partial_rotary_factor", 0.25)),
        "ssm.conv_kernel": value_of(config, "linear_conv_kernel_dim", 4),
        "ssm.state_size": key_size,
        "ssm.group_count": key_heads,
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * value_size,
        "full_attention_interval": value_of(config, "full_attention_interval", 4),
        "attention.recurrent_layers": is_linear(config),
    }
    return {key: value for key, value in fields.items() if value is not None}


def hybrid_cannot(config: Config) -> str:
    """Why llama.cpp would compute something else for a hybrid; empty where it computes the same."""
    _, _, key_size, value_size = delta_sizes(config)
    if key_size != value_size:
        return f"linear_key_head_dim {key_size} is not linear_value_head_dim {value_size}, as llama.cpp wants it"
    return ""
