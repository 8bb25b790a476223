"""What Qwen's mixtures of experts share: a router, experts of which a token passes a few, at times a shared one."""

from qwen_lit.families.dense import mlp_groups
from qwen_lit.families.layer import Config, FeedForward, Linear, value_of

Groups = tuple[tuple[Linear, ...], ...]


def feed_forward(config: Config, number: int) -> tuple[FeedForward, Groups]:
    """What a layer has behind its mixer, and its matrices.

    Args:
        config: of the model.
        number: of the layer; ``mlp_only_layers`` and ``decoder_sparse_step`` give some of them an MLP.
    """
    hidden, experts = value_of(config, "hidden_size"), count_experts(config)
    step = value_of(config, "decoder_sparse_step", 1)
    if number in value_of(config, "mlp_only_layers", []) or not experts or (number + 1) % step:
        return "mlp", mlp_groups(hidden, value_of(config, "intermediate_size"))
    return "experts", expert_groups(config)


def count_experts(config: Config) -> int:
    """Experts of a layer, the shared one left out."""
    return int(value_of(config, "num_experts", value_of(config, "num_local_experts", 0)))


def expert_groups(config: Config) -> Groups:
    """Router, experts and shared expert of a layer.

    A file has the experts' matrices by themselves or as the two parameters that transformers holds.

    Args:
        config: of the model; without a ``shared_expert_intermediate_size`` no expert is shared.
    """
    hidden, inner, count = (
        value_of(config, "hidden_size"),
        value_of(config, "moe_intermediate_size"),
        count_experts(config),
    )
    share = value_of(config, "num_experts_per_tok") / count

    def each(*names: str) -> tuple[str, ...]:
        return tuple(f"mlp.experts.{number}.{name}.weight" for number in range(count) for name in names)

    router = Linear("mlp.gate.weight", hidden, count, linear=False, quantized=False)
    gate_up = Linear(
        "mlp.experts.gate_up_proj",
        hidden,
        2 * inner,
        count=count,
        linear=False,
        tokens=share,
        parts=each("gate_proj", "up_proj"),
    )
    down = Linear(
        "mlp.experts.down_proj", inner, hidden, count=count, linear=False, tokens=share, parts=each("down_proj")
    )
    groups: Groups = ((router,), (gate_up,), (down,))
    shared = value_of(config, "shared_expert_intermediate_size")
    if not shared:
        return groups
    gate = Linear("mlp.shared_expert_gate", hidden, 1, quantized=False)
    return (*groups, (gate,), *mlp_groups(hidden, shared, "mlp.shared_expert", "_shexp"))
