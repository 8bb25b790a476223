"""The time of a token under a plan, relative to one without costs: a few named costs and one sum."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qwen_lit.engine.policy import Policies
from qwen_lit.kernels.kinds import Kind
from qwen_lit.planner.host import HostProfile
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import Plan


@dataclass(frozen=True)
class Costs:
    """Costs of what a plan does, as benchmarks/README.md shows them on an H100 80 GB with the shape of Qwen2.5-7B.
    With them ``time_of`` gives the ratios of that table's speeds (tests/planner/test_speed.py).

    Packing gate and up is taken to cost nothing: beside the 16 bytes that SwiGLU moves for a number of each in both
    passes, forward writes 2 more and backward reads 2 less, in kernels that wait for the memory alone."""

    recompute: float = 0.30
    """Share of a layer's time that recomputing it adds: the row "limited to 8 GiB", with 20 of 28 layers."""
    offload: float = 0.045
    """Share of a layer's time that sending its saved tensors, unpacked, to the host adds, as copies take the memory's
    time from the products: the row "limited to 16 GiB", with 7 of 28 layers."""
    stream: float = 0.011
    """Share of a layer's time that streaming it adds by the same, where its copies hide: 0.3 to 1.1 % with all layers
    (28 copies of 120 MB a pass beside the 7B's computation)."""
    launch_tokens: float = 220
    """Tokens that a micro-batch costs beside those that it has: the row "the same, limited to 40 GiB"."""
    dequantise_tokens: float = 260
    """Tokens that dequantising all weights costs in each micro-batch: the rows "limited to 24 GiB", with half of them
    held, and "limited to 16 GiB", with none. Each piece of the MLP dequantises again."""
    logits: float = 250
    """Rows of logits whose products take as long as reading lm_head from the device's memory (705 TFLOP/s beside 3
    TB/s); fewer rows at a time wait for that."""
    products: float = 0.72
    """Share of a token's time that the products of frozen weights take at a large product's speed: 26.1 GFLOP at 702
    TFLOP/s of the 51.3 microseconds in the row "q,k,v,o, dropout 0"."""
    narrow: Mapping[Kind, float] = field(default_factory=lambda: {Kind.WIDE: 1.0, Kind.FP8: 0.55, Kind.INT8: 0.66})
    """Time of a product of each kind over that of one in bf16, what makes its operands included: the table
    "Products in 8 bits"."""
    recompute_launches: float = 0.5
    """Share of a micro-batch's launches on the host that recomputing all layers adds: forward launches half as much as
    backward."""


COSTS = Costs()


@dataclass(frozen=True)
class Traffic:
    """What a micro-batch brings over the link, in the tokens that the device computes in that time."""

    forward: float = 0.0
    """Beside the forward pass."""
    backward: float = 0.0
    """Beside the backward pass."""
    alone: float = 0.0
    """Beside nothing."""


@dataclass(frozen=True)
class Shares:
    """The layers with which a plan does something, as shares of all."""

    recomputed: float = 0.0
    """Their forward runs twice."""
    resident: float = 0.0
    """Their weights are held dequantised."""
    offloaded: float = 0.0
    """Their saved tensors go to the host; a layer that packs some counts by its bytes."""
    streamed: float = 0.0
    """Their weights come from the host."""


NOTHING = Traffic()


def relative_time(
    shares: Shares,
    tokens: float,
    launch: int = 0,
    traffic: Traffic = NOTHING,
    passes: int = 1,
    slowed: float = 1.0,
) -> float:
    """Time of a token, over that of one that keeps everything in an endless micro-batch.

    Each pass takes what the device computes, or, where that is more, what the link brings beside it. A micro-batch
    takes what its passes do, or, where that is more, what the host takes to launch it.

    Args:
        shares: of the layers.
        tokens: of a micro-batch.
        launch: as of ``HostProfile``.
        traffic: of the micro-batch.
        passes: times that weights are dequantised in a pass.
        slowed: factor of what the device computes.
    """
    more = slowed * (tokens + COSTS.launch_tokens + COSTS.dequantise_tokens * (1 - shares.resident) * passes)
    half = (1 + COSTS.stream * shares.streamed) / 2
    forward = max(half * more, traffic.forward)
    again = COSTS.recompute * shares.recomputed + COSTS.offload * shares.offloaded
    backward = max((half + again) * more, traffic.backward)
    launched = launch * (1 + COSTS.recompute_launches * shares.recomputed)
    return max(forward + backward + traffic.alone, launched) / tokens


def pace_of(memory: ModelMemory) -> float:
    """Time of a token over that of one whose products are all in bf16.

    Args:
        memory: of the model.
    """
    time, most = 0.0, 0.0
    for group in (group for layer in memory.layers for group in layer.groups):
        size, passes = sum(linear.inputs * linear.outputs for linear in group), group[0].passes
        time += size * (COSTS.narrow[passes.forward] + COSTS.narrow[passes.backward]) / 2
        most += size
    return 1 - COSTS.products * (1 - time / most)


class Clock:
    """The time of plans for one model on one machine."""

    def __init__(self, memory: ModelMemory, host: HostProfile) -> None:
        self.memory, self.host = memory, host
        head, layers = memory.vocabulary * memory.layers[0].hidden, memory.products * len(memory.layers)
        self.head_share = head / (head + layers)
        self.pace = pace_of(memory)
        # Billions of operations in whose time a token is computed; a frozen weight has 2 forward and 2 backward.
        self.token = 4e-9 * layers / COSTS.products * self.pace
        # What is told in tokens of bf16 products takes as long as more tokens of faster ones.
        self.launch = int(host.launch / self.pace)
        # Bytes a token that a layer saves where it packs nothing, as ``COSTS.offload`` takes it.
        self.saved = sum((one.unpacked or one).saved for one in memory.table()) // len(memory.layers)

    def traffic(self, tokens: float, streamed: frozenset[int], waiting: int, ends: tuple[bool, bool]) -> Traffic:
        """What a micro-batch brings over the link.

        Args:
            tokens: of the micro-batch.
            streamed: as of ``Policies``.
            waiting: bytes a token that wait on the host for backward.
            ends: whether the embedding and lm_head wait on the host.
        """
        if not (streamed or waiting or ends != (False, False)):
            return NOTHING
        memory, link, (embedding, head) = self.memory, self.host.link * self.token, ends
        weights = memory.streaming.copied(streamed) / (self.host.blocks * self.token)
        # The link carries both ways at once: what goes to the host in forward comes back in backward.
        kept = waiting * tokens / link
        # The head comes beside the last layer, rows of the embedding beside nothing.
        alone = max(0.0, memory.head * head / link - tokens / 2 / len(memory.layers))
        alone += embedding * tokens * memory.layers[0].hidden * memory.size / link
        return Traffic(max(weights, kept), weights + kept, alone)

    def slowed(self, policies: Policies) -> float:
        """The factor of time that few logits at a time cost."""
        return 1 + self.head_share * max(0.0, COSTS.logits / policies.loss_chunk - 1)

    def time(self, policies: Policies, tokens: float) -> float:
        """``relative_time`` of policies.

        Args:
            policies: of the engine.
            tokens: of a micro-batch that is computed.
        """
        layers, waiting = len(policies.layers), self.memory.waiting(policies)
        shares = Shares(
            policies.recomputed / layers,
            len(policies.resident) / layers,
            waiting / layers / self.saved,
            len(policies.streamed) / layers,
        )
        traffic = self.traffic(tokens, policies.streamed, waiting, policies.ends_on_host)
        passes = math.ceil(tokens / policies.mlp_piece) if policies.mlp_piece else 1
        return relative_time(shares, tokens, self.launch, traffic, passes, self.slowed(policies))


def time_of(plan: Plan, tokens: float, memory: ModelMemory, host: HostProfile = HostProfile()) -> float:  # noqa: B008
    """``relative_time`` of a plan.

    Args:
        plan: as chosen.
        tokens: of a micro-batch of the configuration, on average.
        memory: of the model.
        host: the machine that the plan is for.
    """
    return Clock(memory, host).time(plan.policies, tokens * plan.micro_batches_at_once)
