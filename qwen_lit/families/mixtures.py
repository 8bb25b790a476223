"""What Qwen's mixtures of experts share: a router, experts of which a token passes a few, at times a shared one."""

import re
from typing import Any

from qwen_lit.families.dense import mlp_groups
from qwen_lit.families.gguf import Field, Stored, as_is
from qwen_lit.families.layer import Config, FeedForward, Layer, Linear, value_of

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

    router_stored = Stored("ffn_gate_inp.weight", exact=True)
    router = Linear("mlp.gate.weight", hidden, count, linear=False, quantized=False, gguf=(router_stored,))
    gate_up = Linear(
        "mlp.experts.gate_up_proj",
        hidden,
        2 * inner,
        count=count,
        linear=False,
        tokens=share,
        parts=each("gate_proj", "up_proj"),
        gguf=(
            Stored("ffn_gate_exps.weight", rows=(range(inner),)),
            Stored("ffn_up_exps.weight", rows=(range(inner, 2 * inner),)),
        ),
    )
    down = Linear(
        "mlp.experts.down_proj",
        inner,
        hidden,
        count=count,
        linear=False,
        tokens=share,
        parts=each("down_proj"),
        gguf=as_is("ffn_down_exps"),
    )
    groups: Groups = ((router,), (gate_up,), (down,))
    shared = value_of(config, "shared_expert_intermediate_size")
    if not shared:
        return groups
    gate_stored = Stored("ffn_gate_inp_shexp.weight", exact=True)
    gate = Linear("mlp.shared_expert_gate", hidden, 1, quantized=False, gguf=(gate_stored,))
    return (*groups, (gate,), *mlp_groups(hidden, shared, "mlp.shared_expert", "_shexp"))


def expert_fields(config: Config) -> dict[str, Field]:
    """The experts' numbers and sizes by GGUF's keys."""
    fields: dict[str, Field] = {
        "expert_count": count_experts(config),
        "expert_used_count": value_of(config, "num_experts_per_tok"),
        "expert_feed_forward_length": value_of(config, "moe_intermediate_size"),
    }
    shared = value_of(config, "shared_expert_intermediate_size")
    return fields | ({"expert_shared_feed_forward_length": shared} if shared else {})


def experts_cannot(layers: tuple[Layer, ...], shares_sum_to_one: bool) -> str:
    """Why llama.cpp would compute something else for a mixture of experts; empty where it computes the same.

    Args:
        layers: of the model.
        shares_sum_to_one: whether the chosen experts' shares are scaled to sum to one.
    """
    if not shares_sum_to_one:
        return "norm_topk_prob is false, and llama.cpp always scales the experts' shares to sum to one"
    dense = [number for number, layer in enumerate(layers) if layer.feed_forward == "mlp"]
    return f"layer {dense[0]} has no experts, and llama.cpp wants them in every layer" if dense else ""


LINEARS = re.compile(r"(?:.*\.)?(?:mlp|shared_expert)\.(?:gate|up|down)_proj")
"""Of a shared expert, or of a layer without experts, as targets name them."""
WEIGHT = r"\.weight"


def for_peft(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter's config with the linears of MLPs and shared experts named as the parameters that they have.

    In a mixture of experts PEFT takes ``gate_proj``, ``up_proj`` and ``down_proj`` in ``target_modules``, whatever
    stands before them, for the experts of its earlier versions: it would put fresh weights on these, and none of the
    file's on the linear that is meant. Parameters are taken as they are written, and have the same names in the file.

    Args:
        config: of a mixture's adapter_config.json; unchanged where no such linear is adapted, or by what parameters
            have not.
    """
    wanted = config.get("target_modules") or []
    linears = [] if isinstance(wanted, str) else sorted(one for one in wanted if LINEARS.fullmatch(one))
    if not linears or config.get("use_dora") or config.get("lora_bias"):
        return config
    parameters = [*(config.get("target_parameters") or []), *(f"{one}.weight" for one in linears)]
    # PEFT drops out nothing of parameters, and refuses to read a config that says so; it is of training alone.
    found = config | {"target_parameters": parameters, "lora_dropout": 0.0}
    found["target_modules"] = [one for one in wanted if one not in linears]
    for key in ("rank_pattern", "alpha_pattern"):
        given = config.get(key) or {}
        found[key] = given | {f"(?:{name}){WEIGHT}": value for name, value in given.items()}
    return found


def from_peft(config: dict[str, Any]) -> dict[str, Any]:
    """What ``for_peft`` was given, its dropout aside.

    Args:
        config: of an adapter_config.json, of whichever model.
    """
    parameters = config.get("target_parameters") or []
    linears = [one for one in parameters if LINEARS.fullmatch(one.removesuffix(".weight"))]
    if not linears or isinstance(config.get("target_modules"), str):
        return config
    found = config | {"target_parameters": [one for one in parameters if one not in linears] or None}
    found["target_modules"] = [
        *(config.get("target_modules") or []),
        *(one.removesuffix(".weight") for one in linears),
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        given = config.get(key) or {}
        found[key] = {name: value for name, value in given.items() if not name.endswith(WEIGHT)}
    return found
