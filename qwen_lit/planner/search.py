"""The search for the fastest plan that fits, over the numbers of micro-batches, of recomputed and of offloaded
layers."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product

from qwen_lit.engine.engine import PIECE
from qwen_lit.engine.offload import BLOCK
from qwen_lit.engine.policy import Policies
from qwen_lit.planner.memory import MEMORY, ModelMemory
from qwen_lit.planner.plan import Plan
from qwen_lit.planner.speed import relative_time, time_of

FEW_LOGITS = 128
"""Rows of logits at a time of a plan that takes the least memory; those of others are a multiple of it."""

MOST_LOGITS = 2048
"""Rows of logits at a time beyond which the product with lm_head gains nothing."""

LOGITS_SHARE = 0.02
"""Share of the budget that logits may take."""

SMALLER_PIECES = (2, 4)
"""Parts of ``PIECE`` to which the pieces of the MLP are cut where memory is shortest; each part dequantises the MLP's
weights again."""


@dataclass(frozen=True)
class HostProfile:
    """What is measured of a machine before a plan is made; the defaults are safe on any machine."""

    share: float = 0.0
    """Share of the layers whose saved tensors can be copied to the host while all layers compute."""
    memory: int = 2**62
    """Bytes of the host's memory that may be pinned."""
    launch: int = 0
    """Tokens that the device computes in the time in which the host launches a micro-batch."""


def limit(budget: int) -> int:
    """Bytes that a plan may take of a budget."""
    return int(budget * (1 - MEMORY.margin)) - MEMORY.libraries


def choose(
    memory: ModelMemory,
    static: int,
    budget: int,
    sizes: Mapping[int, int],
    host: HostProfile = HostProfile(),  # noqa: B008
    only: int | None = None,
    mean: float | None = None,
) -> Plan:
    """The fastest plan that fits.

    Args:
        memory: of the model.
        static: bytes allocated before the first step.
        budget: bytes that may be used.
        sizes: tokens of the largest micro-batches of the configuration together, by how many may be computed as one;
            1 is among them.
        host: the machine that the plan is for.
        only: so many are computed as one, if that fits.
        mean: tokens of a micro-batch of the configuration on average, by which time is judged; those of the largest
            where it is not given.

    Returns:
        The plan; the smallest one when none fits.
    """
    usual = sizes[1] if mean is None else mean
    every = sorted(sizes, reverse=True)
    small: list[Plan] = []
    for counts in [[only], every] if only is not None and only in sizes else [every]:
        small = _small(memory, static, budget, sizes, counts, host)
        plans = [plan for plan in small if plan.fits]
        if (best := _usual(memory, static, budget, sizes, counts, host, usual)) is not None:
            plans.insert(0, best)
        if plans:
            return min(plans, key=lambda plan: (time_of(plan, usual, host.launch), plan.policies.offloaded))
    return small[-1]


@lru_cache(64)
def _candidates(memory: ModelMemory, most: int, ahead: bool) -> list[tuple[int, int, Policies, int, int]]:
    """Every number of offloaded layers up to ``most`` and of recomputed ones, with their bytes a token: at the loss,
    and at the largest other moment.

    Args:
        memory: of the model.
        most: offloaded layers at most.
        ahead: whether tensors come back a layer ahead where no layer is offloaded.
    """
    layers, found = len(memory.layers), []
    for offloaded, recompute in product(range(most + 1), range(layers + 1)):
        if offloaded + recompute <= layers:
            policies = Policies.of_counts(layers, recompute, offloaded)
            at_loss, (other,) = memory.heights(policies.layers, ahead or offloaded > 0)
            found.append((offloaded, recompute, policies, at_loss, other.per_token))
    return found


@lru_cache(256)
def _least(memory: ModelMemory, inputs: bool, embedding: bool, piece: int) -> Policies:
    """The policies that recompute every layer."""
    layers = len(memory.layers)
    return Policies.of_counts(
        layers, layers, offload_inputs=inputs, loss_chunk=FEW_LOGITS, offload_embedding=embedding, mlp_piece=piece
    )


def _gaps(longest: int, tokens: int) -> float:
    """Share of the activations that is left free beside them.

    Blocks of a long row are large, and fit ill into the gaps that earlier ones leave; twice as many tokens of shorter
    rows still do without.

    Args:
        longest: tokens of the largest micro-batch of the configuration.
        tokens: of those that are computed as one.
    """
    return MEMORY.long_fragments if longest > PIECE or tokens > 2 * PIECE else 0.0


def _usual(
    memory: ModelMemory,
    static: int,
    budget: int,
    sizes: Mapping[int, int],
    counts: list[int],
    host: HostProfile,
    usual: float,
) -> Plan | None:
    """The fastest plan that fits and leaves everything where it is but the activations of some layers."""
    usable, layers = limit(budget), len(memory.layers)
    logits = memory.vocabulary * memory.size
    chunk = max(FEW_LOGITS, min(MOST_LOGITS, int(LOGITS_SHARE * budget) // logits // FEW_LOGITS * FEW_LOGITS))
    # Weights are held from the first layer on; a layer that is not in 4 bits ends that.
    whole = memory.resident.index(0) if 0 in memory.resident else layers
    held = [0, *accumulate(memory.resident[:whole])]
    beside = memory.beside(static, Policies.keep_all(layers))
    best: tuple[float, int] | None = None
    chosen: Plan | None = None
    for count in counts:
        tokens = sizes[count]
        gaps = _gaps(sizes[1], tokens)
        # A layer takes whole blocks of the host's memory.
        most = max(0, min(int(host.share * layers), host.memory // (tokens * memory.saved + BLOCK)))
        for offloaded, recompute, policies, at_loss, other in _candidates(memory, most, tokens <= PIECE):
            estimate = beside + max(tokens * at_loss + min(chunk, tokens) * logits, tokens * other)
            if estimate + gaps * (estimate - static) > usable:
                continue
            # What lies between activations of different sizes is lost to weights that stay.
            left = usable - estimate - int(max(MEMORY.fragments, gaps) * (estimate - static))
            resident = bisect_right(held, left) - 1 if left > 0 else 0
            time = relative_time(recompute / layers, usual * count, resident / layers, host.launch, offloaded / layers)
            if best is None or (time, offloaded) < best:
                best = time, offloaded
                policies = Policies(policies.layers, frozenset(range(resident)), chunk)
                chosen = Plan(count, policies, estimate + held[resident], budget)
    return chosen


def _small(
    memory: ModelMemory, static: int, budget: int, sizes: Mapping[int, int], counts: list[int], host: HostProfile
) -> list[Plan]:
    """Plans that recompute every layer, from what costs least time to what takes least memory."""
    longest, layers = sizes[1], len(memory.layers)
    input_bytes = layers * memory.layer(0).input
    ways = [
        (embedding, piece, inputs)
        for inputs in (False, True)[: 1 + (host.memory >= sizes[counts[-1]] * input_bytes)]
        for embedding in ((False, True) if memory.embedding else (False,))
        for piece in ((0, PIECE) if longest > PIECE else (0,))
    ]
    if longest > PIECE:
        ways += [(bool(memory.embedding), PIECE // parts, ways[-1][2]) for parts in SMALLER_PIECES]
    plans = []
    for (embedding, piece, inputs), count in product(ways, counts):
        tokens = sizes[count]
        if inputs and count > counts[-1] and host.memory < tokens * input_bytes:
            continue
        policies = _least(memory, inputs, embedding, piece)
        estimate = memory.peak(static, tokens, policies)
        gaps = int(_gaps(longest, tokens) * (estimate - static + memory.embedding * embedding))
        plans.append(Plan(count, policies, estimate, budget, fits=estimate + gaps <= limit(budget)))
    return plans
