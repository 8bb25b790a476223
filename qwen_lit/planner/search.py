"""The search for the fastest plan that fits, over the numbers of micro-batches, of recomputed and of offloaded
layers, and what else may wait on the host.

Only so many layers are streamed as a plan needs to fit; the others stay on the device.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, product
from typing import NamedTuple

from qwen_lit.engine.engine import PIECE
from qwen_lit.engine.offload import BLOCK
from qwen_lit.engine.policy import Policies
from qwen_lit.planner.host import HostProfile
from qwen_lit.planner.layer_memory import Ends
from qwen_lit.planner.memory import MEMORY, ModelMemory
from qwen_lit.planner.plan import Plan
from qwen_lit.planner.speed import Clock, Shares, relative_time

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
class Task:
    """What a plan is searched for."""

    memory: ModelMemory
    static: int
    budget: int
    sizes: Mapping[int, int]
    counts: list[int]
    """Of ``sizes``, those that may be chosen, from most to least."""
    clock: Clock
    usual: float
    """Tokens of a micro-batch of the configuration by which time is judged."""

    @property
    def host(self) -> HostProfile:
        """The machine that the plan is for."""
        return self.clock.host

    def time(self, plan: Plan) -> float:
        """``relative_time`` of a plan."""
        return self.clock.time(plan.policies, self.usual * plan.micro_batches_at_once)


def limit(budget: int) -> int:
    """Bytes that a plan may take of a budget by its estimate."""
    return int(budget * (1 - MEMORY.margin)) - MEMORY.libraries


def measured_limit(budget: int) -> int:
    """Bytes that a plan may take of a budget when it is run."""
    return int(budget * (1 - MEMORY.measured_margin)) - MEMORY.libraries


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
    every, clock = sorted(sizes, reverse=True), Clock(memory, host)
    usual, small = sizes[1] if mean is None else mean, list[Plan]()
    for counts in [[only], every] if only is not None and only in sizes else [every]:
        task = Task(memory, static, budget, sizes, counts, clock, usual)
        small = list(_small(task))
        plans = [plan for plan in (*_usual_plans(task), *small) if plan.fits]
        if plans:
            best = min(plans, key=lambda plan: (task.time(plan), plan.policies.offloaded, len(plan.policies.streamed)))
            break
    else:
        best = small[-1]
    tokens = sizes[best.micro_batches_at_once]
    return replace(best, host=sum(memory.on_host(tokens, best.policies, host.processes).values()))


class Candidate(NamedTuple):
    """A number of offloaded layers and one of recomputed ones."""

    offloaded: int
    recomputed: int
    policies: Policies
    ends: Ends
    """The end of forward."""
    other: int
    """Bytes a token at the largest other moment."""
    waiting: int
    """Bytes a token that wait on the host."""


@lru_cache(64)
def _candidates(memory: ModelMemory, most: int, ahead: bool) -> list[Candidate]:
    """Every number of offloaded layers up to ``most`` and of recomputed ones.

    Args:
        memory: of the model.
        most: offloaded layers at most.
        ahead: whether tensors come back a layer ahead where no layer is offloaded.
    """
    layers, found = len(memory.layers), []
    for offloaded, recomputed in product(range(most + 1), range(layers + 1)):
        if offloaded + recomputed <= layers:
            policies = Policies.of_counts(layers, recomputed, offloaded)
            ends, (other,) = memory.heights(policies.layers, ahead or offloaded > 0)
            waiting = memory.waiting(policies)
            found.append(Candidate(offloaded, recomputed, policies, ends, other.per_token, waiting))
    return found


@lru_cache(256)
def _least(memory: ModelMemory, inputs: bool, embedding: bool, head: bool, piece: int) -> Policies:
    """The policies that recompute every layer."""
    layers = len(memory.layers)
    return Policies.of_counts(
        layers,
        layers,
        offload_inputs=inputs,
        loss_chunk=FEW_LOGITS,
        offload_embedding=embedding,
        mlp_piece=piece,
        offload_head=head,
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


def _moved(memory: ModelMemory) -> list[tuple[bool, bool]]:
    """Whether the embedding waits on the host, and whether lm_head does, in all ways that the model has."""
    embeddings, heads = ((False, True) if size else (False,) for size in (memory.embedding, memory.head))
    return list(product(embeddings, heads))


def _usual_plans(task: Task) -> Iterator[Plan]:
    """The fastest plan that fits of each way to keep embedding and lm_head."""
    memory, layers = task.memory, len(task.memory.layers)
    logits = memory.vocabulary * memory.size
    chunk = int(LOGITS_SHARE * task.budget) // logits // FEW_LOGITS * FEW_LOGITS
    for embedding, head in _moved(memory):
        ends = Policies.of_counts(
            layers,
            loss_chunk=max(FEW_LOGITS, min(MOST_LOGITS, chunk)),
            offload_embedding=embedding,
            offload_head=head,
        )
        if (best := _usual(task, ends)) is not None:
            yield best


def _usual(task: Task, ends: Policies) -> Plan | None:
    """The fastest plan that fits and leaves everything where ``ends`` says, but the activations and the weights of
    some layers."""
    memory, clock, usable = task.memory, task.clock, limit(task.budget)
    layers, streaming, slowed = len(memory.layers), memory.streaming, clock.slowed(ends)
    # Weights are held from the first layer on; a layer that is not in 4 bits ends that.
    whole = memory.resident.index(0) if 0 in memory.resident else layers
    held = [0, *accumulate(memory.resident[:whole])]
    weights, constant = memory.weights(task.static, ends), sum(memory.constants.values())
    best: tuple[float, int, int] | None = None
    chosen: Plan | None = None
    for count in task.counts:
        tokens, usual = task.sizes[count], task.usual * count
        gaps = _gaps(task.sizes[1], tokens)
        # A layer takes whole blocks of the host's memory.
        most = max(0, min(int(task.host.share * layers), task.host.memory // (tokens * memory.saved + BLOCK)))
        for one in _candidates(memory, int(task.host.share * layers), tokens <= PIECE):
            if one.offloaded > most:
                break
            step = constant + max(memory.end(tokens, one.ends, ends), tokens * one.other)
            left = usable - weights - step - gaps * step
            streamed = streaming.least(-left)
            if streamed is None or not task.host.has_room(streaming.held(streamed), tokens * one.waiting):
                continue
            # What lies between activations of different sizes is lost to weights that stay.
            left = usable - weights - step - int(max(MEMORY.fragments, gaps) * step)
            resident = bisect_right(held, left) - 1 if left > 0 else 0
            shares = (one.recomputed, resident, one.waiting / memory.saved, len(streamed))
            traffic = clock.traffic(usual, streamed, one.waiting, ends.ends_on_host)
            of_all = Shares(*(share / layers for share in shares))
            time = relative_time(of_all, usual, clock.launch, traffic, slowed=slowed)
            if best is None or (time, one.offloaded, len(streamed)) < best:
                best = time, one.offloaded, len(streamed)
                policies = replace(
                    ends, layers=one.policies.layers, resident=frozenset(range(resident)), streamed=streamed
                )
                estimate = weights + step + held[resident] - streaming.freed(streamed)
                chosen = Plan(count, policies, estimate, task.budget)
    return chosen


def _small(task: Task) -> Iterator[Plan]:
    """Plans that recompute every layer, from what costs least time to what takes least memory."""
    memory, longest, counts, layers = task.memory, task.sizes[1], task.counts, len(task.memory.layers)
    input_bytes = layers * memory.layer(0).input
    ways = [
        (inputs, embedding, head, piece)
        for inputs in (False, True)[: 1 + (task.host.memory >= task.sizes[counts[-1]] * input_bytes)]
        for embedding, head in _moved(memory)
        for piece in ((0, PIECE) if longest > PIECE else (0,))
    ]
    if longest > PIECE:
        ways += [(*ways[-1][:3], PIECE // parts) for parts in SMALLER_PIECES]
    for (inputs, embedding, head, piece), count in product(ways, counts):
        tokens = task.sizes[count]
        policies = _least(memory, inputs, embedding, head, piece)
        estimate = memory.peak(task.static, tokens, policies)
        gaps = int(_gaps(longest, tokens) * (estimate - memory.weights(task.static, policies)))
        streamed = memory.streaming.least(estimate + gaps - limit(task.budget))
        # Where nothing fits, the smallest plan is told.
        fits, streamed = streamed is not None, memory.streaming.steps[-1] if streamed is None else streamed
        own = tokens * memory.waiting(policies)
        if inputs and not task.host.has_room(memory.streaming.held(streamed), own):
            continue
        estimate -= memory.streaming.freed(streamed)
        yield Plan(count, replace(policies, streamed=streamed), estimate, task.budget, fits)
