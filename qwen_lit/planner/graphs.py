"""Up to how many tokens micro-batches are CUDA graphs, and the memory that these take."""

from qwen_lit.engine.policy import Policies, Policy
from qwen_lit.engine.shapes import most_tokens, tokens_of
from qwen_lit.planner.memory import MEMORY, ModelMemory
from qwen_lit.planner.speed import COSTS, Clock

MOST = 16_384
"""Tokens of a graph at most: beyond, what the arithmetic of large products says of small models is too far off."""


def can_record(policies: Policies) -> bool:
    """Whether the passes of an engine can be recorded: all is on the device, and nothing is computed twice."""
    in_place = not (policies.streamed or policies.mlp_piece or any(policies.ends_on_host))
    return in_place and policies.count(Policy.KEEP) == len(policies.layers)


def graph_tokens(clock: Clock, largest: int, usual: float) -> int:
    """The tokens up to which launching a micro-batch takes longer than computing it, filled up to its shape.

    Args:
        clock: of the model on the machine.
        largest: tokens of the largest micro-batch that is computed.
        usual: tokens of one on average.

    Returns:
        0 where most micro-batches are larger: graphs would take memory and gain little.
    """
    # The profile counts tokens by a layer's products alone, at their speed in a burst.
    launched = int(clock.launch * COSTS.products * (1 - clock.head_share))
    launched -= int(COSTS.launch_tokens + COSTS.dequantise_tokens)
    limit = min(most_tokens(max(0, launched)), tokens_of(largest), MOST)
    return limit if tokens_of(int(usual)) <= limit else 0


def graph_bytes(memory: ModelMemory, tokens: int, policies: Policies) -> int:
    """Bytes that graphs of up to so many tokens take: the activations of the largest, whose memory all others use.

    Args:
        memory: of the model.
        tokens: of the largest.
        policies: of the engine.
    """
    activations = memory.peak(0, tokens, policies) - memory.beside(0, policies)
    return int(activations * (1 + MEMORY.fragments)) + MEMORY.graphs
