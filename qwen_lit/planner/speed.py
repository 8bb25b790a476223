"""The time of a token under a plan, relative to one without costs: a few named costs and one sum."""

from dataclasses import dataclass

from qwen_lit.planner.plan import Plan


@dataclass(frozen=True)
class Costs:
    """Costs of what a plan does, as benchmarks/README.md shows them on an H100 80 GB with the shape of Qwen2.5-7B.
    With them ``time_of`` gives the ratios of that table's speeds (tests/planner/test_speed.py)."""

    recompute: float = 0.30
    """Share of a layer's time that recomputing it adds: the row "limited to 8 GiB", with 20 of 28 layers."""
    offload: float = 0.045
    """Share of a layer's time that sending its saved tensors to the host adds, as copies take the memory's time from
    the products: the row "limited to 16 GiB", with 7 of 28 layers."""
    launch_tokens: float = 220
    """Tokens that a micro-batch costs beside those that it has: the row "the same, limited to 40 GiB"."""
    dequantise_tokens: float = 260
    """Tokens that dequantising all weights costs in each micro-batch: the rows "limited to 24 GiB", with half of them
    held, and "limited to 16 GiB", with none."""
    scarce: float = 1.3
    """Factor of a plan that moves the embedding or inputs, or does the MLP in pieces, and so has few logits at a time:
    the row "least memory, 2,048 tokens"."""
    recompute_launches: float = 0.5
    """Share of a micro-batch's launches on the host that recomputing all layers adds: forward launches half as much as
    backward."""


COSTS = Costs()


def relative_time(
    recomputed: float, tokens: float, resident: float = 0.0, launch: int = 0, offloaded: float = 0.0
) -> float:
    """Time of a token, over that of one that keeps everything in an endless micro-batch.

    It is what the device takes, or, where that is more, what the host takes to launch the micro-batch.

    Args:
        recomputed: share of the layers that are recomputed.
        tokens: of a micro-batch.
        resident: share of the layers whose weights are held dequantised.
        launch: as of ``HostProfile``.
        offloaded: share of the layers whose saved tensors go to the host.
    """
    layers = 1 + COSTS.recompute * recomputed + COSTS.offload * offloaded
    device = layers * (1 + (COSTS.launch_tokens + COSTS.dequantise_tokens * (1 - resident)) / tokens)
    return max(device, launch * (1 + COSTS.recompute_launches * recomputed) / tokens)


def time_of(plan: Plan, tokens: float, launch: int = 0) -> float:
    """``relative_time`` of a plan.

    Args:
        plan: as chosen.
        tokens: of a micro-batch of the configuration, on average.
        launch: as of ``HostProfile``.
    """
    policies, layers = plan.policies, len(plan.policies.layers)
    shares = (count / layers for count in (policies.recomputed, len(policies.resident), policies.offloaded))
    recomputed, resident, offloaded = shares
    scarce = policies.offload_embedding or policies.offload_inputs or policies.mlp_piece > 0
    time = relative_time(recomputed, tokens * plan.micro_batches_at_once, resident, launch, offloaded)
    return time * (COSTS.scarce if scarce else 1.0)
