"""The memory plan of a run: what the machine measures, what the ranks agree on, and what the heaviest rows show."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from peft import PeftModel

from qwen_lit.data.batches import Batch
from qwen_lit.engine.ends import place_ends, waits
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.offload import UNPINNED
from qwen_lit.engine.policy import KeptName
from qwen_lit.engine.products import Products
from qwen_lit.frozen.store import store_of
from qwen_lit.planner.graphs import can_record, graph_bytes, graph_tokens
from qwen_lit.planner.host import STEPS, HostProfile
from qwen_lit.planner.measure import is_full
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import GIB, Plan
from qwen_lit.planner.search import choose, measured_limit
from qwen_lit.planner.speed import Clock, time_of

log = logging.getLogger(__name__)
NEVER = 2**62
"""Bytes that stand for a peak that did not fit, among ranks."""

TRIES = 4
"""Plans that are measured at most."""

SLOWER = 0.9
"""Share of the planned rate below which a link is worth another plan: the steps of ``rounded`` are as large."""


class Meter(Protocol):
    """The device that is planned for: ``measure.Gpu``."""

    def free(self) -> int:
        """Bytes that this process may use, those it holds already included."""

    def allocated(self) -> int:
        """Bytes that tensors take."""

    def empty_cache(self) -> None:
        """Give unused memory back to the device."""

    def profile(self, model: PeftModel, memory: ModelMemory, processes: int, meet: Callable[[], None]) -> HostProfile:
        """How fast the machine copies and launches; ``meet`` as of ``measure.measure_host``."""

    def rate(self, meet: Callable[[], None]) -> int:
        """The profile's ``rate``, measured anew; 0 where it cannot be."""

    def peak(self, engine: FastEngine, batch: Batch) -> int:
        """Bytes at the peak of a micro-batch.

        Raises:
            RuntimeError: one for which ``is_full`` holds, where it does not fit.
        """


@dataclass(frozen=True)
class Work:
    """The rows that a plan is made for."""

    sizes: Mapping[int, int]
    """Tokens of the largest micro-batches together, by how many may be computed as one; 1 is among them."""
    mean: float
    """Tokens of a micro-batch on average."""
    heaviest: Callable[[int], Batch]
    """The largest so many micro-batches as one, on the CPU."""


@dataclass(frozen=True)
class Planned:
    """A plan and the engine that runs it."""

    engine: FastEngine
    plan: Plan
    peak: int | None = None
    """Bytes at the peak of the heaviest micro-batch; None where nothing was measured."""


class Planner:
    """Plans for a model on one device, together with the other ranks of the run."""

    def __init__(
        self,
        model: PeftModel,
        meter: Meter,
        agree: Callable[[int], int],
        forward_context: Callable[[], AbstractContextManager[None]],
        state_bytes: float,
        budget: int | None = None,
        only: int | None = None,
        processes: int = 1,
        products: Products | None = None,
        kept: KeptName = "bf16",
        probe: Callable[[FastEngine], Products] | None = None,
        graphs: int | None = 0,
        reserved: int = 0,
    ) -> None:
        """Reads the memory that is there.

        Args:
            model: a ``PeftModel`` on the device.
            meter: of the device.
            agree: the smallest of what all ranks give; every rank calls it as often as the others.
            forward_context: in which forward runs, such as that of Lightning's precision plugin.
            state_bytes: bytes of optimizer state for each trained parameter.
            budget: bytes that may be used; None for all that is free.
            only: micro-batches that the resumed run computed as one. It goes on so where that fits, because dropout
                masks and the order of sums depend on it.
            processes: on this machine, which share its memory.
            products: as of ``FastEngine``.
            kept: as of ``Policies``, in every plan.
            probe: the products to plan with, by an engine whose layers are placed; None where they are known.
            graphs: tokens up to which micro-batches are CUDA graphs where they have room, as in the run that is
                resumed, because what they are filled up to changes the order of sums; None for what the machine
                gains by, 0 for none.
            reserved: bytes that the run takes on the device later, beside its plan.
        """
        self.graphs = graphs
        self.model, self.meter, self.agree, self.forward_context = model, meter, agree, forward_context
        self.only, self.processes, self.products, self.probe = only, processes, products, probe
        self.state_bytes, self.kept = state_bytes, kept
        free = meter.free()
        self.budget = agree(min(budget or free, free)) - reserved
        self.memory = self._memory()
        self.static = -agree(-meter.allocated() - away(model, self.memory))
        self.host = HostProfile()
        self.beside = 0
        """Bytes that a plan counts as taken by others, found by measuring."""
        self.engine: FastEngine | None = None

    def plan(self, work: Work) -> Planned:
        """The engine of the fastest plan whose measured peak is within its budget.

        Raises:
            torch.OutOfMemoryError: the heaviest micro-batch fits with no plan.
        """
        self.host = self._profile()
        planned = self._plan(work)
        if self.probe is None:
            return planned
        # Only now layers are where a pass finds them; sizes and times follow the products that it leaves in bf16.
        self.products = self.probe(planned.engine)
        self.memory = self._memory()
        return self._plan(work)

    def _memory(self) -> ModelMemory:
        return ModelMemory.of(self.model, self.state_bytes, products=self.products, kept=self.kept)

    def _plan(self, work: Work) -> Planned:
        """``plan`` with the products that are known."""
        self.beside = 0
        for left in reversed(range(TRIES)):
            plan = self._choose(work)
            peak = self._measure(plan, work)
            if not plan.fits or not left or (peak is not None and peak <= measured_limit(plan.budget)):
                break
            took = "did not fit" if peak is None else f"took {peak / GIB:.2f} GiB"
            log.warning("%s: %s; planning again", plan, took)
            # The last try is the smallest plan: all of the budget is said to be taken.
            self.beside = plan.budget if left == 1 else more_beside(self.beside, plan, peak)
        if self.beside == plan.budget:
            # Nothing is beside it, so its estimate is without what was said to be.
            plan = replace(plan, estimate=plan.estimate - self.beside)
        if peak is None or self.engine is None:
            raise torch.OutOfMemoryError(f"the heaviest micro-batch does not fit: {plan}")
        return Planned(self.engine, replace(plan, fits=peak <= measured_limit(plan.budget)), peak)

    def plan_unmeasured(self, work: Work) -> Planned:
        """The engine of the plan by arithmetic alone, for a command that trains nothing."""
        plan = self._choose(work)
        return Planned(apply(plan, self.model, self.products), plan)

    def waiting(self, work: Work, plan: Plan) -> float:
        """The share of its time for which a plan lets the device wait for copies, by arithmetic.

        Args:
            work: that it is for.
            plan: as chosen.
        """
        free = replace(self.host, link=NEVER, blocks=NEVER)
        without, whole = (time_of(plan, work.mean, self.memory, host) for host in (free, self.host))
        return 1 - without / whole

    def again(self, work: Work, planned: Planned) -> Planned:
        """The plan for the link as it is, which computes the same bits; the given one where the link is as fast as it
        was planned for, or no other plan is faster. All ranks call this between two steps.

        Args:
            work: as the plan was made for.
            planned: the plan in use.
        """
        rate = self.agree(self.meter.rate(self._meet))
        if not 0 < rate < SLOWER * self.host.rate:
            return planned
        self.host = self.host.at(rate / self.host.rate)
        plan, before = self._best(work, planned.plan.micro_batches_at_once), planned.plan
        if not plan.fits or not same_bits(plan, before) or plan.policies == before.policies:
            return planned
        self.engine, self.products = planned.engine, planned.engine.products
        self._release()
        peak = self._measure(plan, work)
        if peak is None or peak > measured_limit(plan.budget):
            self._release()
            return replace(planned, engine=apply(before, self.model, self.products))
        assert self.engine is not None
        return Planned(self.engine, plan, peak)

    def _meet(self) -> None:
        """Return when all ranks have called it."""
        self.agree(0)

    def _profile(self) -> HostProfile:
        """The profile of the slowest rank, whose link is measured while those of all others are."""
        found = self.meter.profile(self.model, self.memory, self.processes, self._meet)
        numbers = (int(found.share * STEPS), found.memory, found.launch, found.link, found.blocks, found.rate)
        share, memory, launch, link, blocks, rate = (self.agree(one) for one in numbers)
        return HostProfile(share / STEPS, memory, launch, link, blocks, self.processes, rate)

    def _release(self) -> None:
        """Make room for another engine."""
        if self.engine is not None:
            self.engine.release()
        self.meter.empty_cache()

    def _choose(self, work: Work) -> Plan:
        """The fastest plan by arithmetic, with room for its engine."""
        self._release()
        plan = self._best(work, self.only)
        # Ranks add their gradients up by hand where they have graphs, so all of them have or none.
        limit = self.agree(self._graph_tokens(plan, work))
        if not limit:
            return plan
        size = graph_bytes(self.memory, limit, plan.policies)
        other = self._best(work, self.only, size)
        same = other.micro_batches_at_once == plan.micro_batches_at_once
        if not (other.fits and same and can_record(other.policies)):
            return plan
        return replace(other, graph_tokens=limit, graph_bytes=size)

    def _best(self, work: Work, only: int | None, beside: int = 0) -> Plan:
        """The fastest plan by arithmetic.

        Args:
            work: that it is for.
            only: as of ``choose``.
            beside: bytes that are taken beside it, and beside what measuring has found so.
        """
        static = self.static + self.beside + beside
        return choose(self.memory, static, self.budget, work.sizes, self.host, only, work.mean)

    def _graph_tokens(self, plan: Plan, work: Work) -> int:
        """Tokens up to which micro-batches of a plan are to be CUDA graphs; 0 for none."""
        if self.graphs == 0 or not (plan.fits and can_record(plan.policies)):
            return 0
        if self.graphs is not None:
            return self.graphs
        count = plan.micro_batches_at_once
        return graph_tokens(Clock(self.memory, self.host), work.sizes[count], work.mean * count)

    def _measure(self, plan: Plan, work: Work) -> int | None:
        """Bytes at the peak of the rank that takes most, optimizer states included; None where one has no room."""
        # Lightning makes new tensors on the device while it builds a model.
        with torch.device("cpu"):
            heaviest = work.heaviest(plan.micro_batches_at_once)
        peak, pins = NEVER, True
        try:
            with self.forward_context():
                self.engine = apply(plan, self.model, self.products)
                # The optimizer's states are made at the first step, so they are not measured here; some have none.
                peak = self.meter.peak(self.engine, heaviest) + self.memory.constants.get("optimizer states", 0)
                # Graphs are recorded later, beside what the largest micro-batch takes.
                peak += plan.graph_bytes
        except RuntimeError as error:
            # A rank on which it does not fit tells the others, which wait for it.
            if not is_full(error):
                raise
            pins = UNPINNED not in str(error)
        if not self.agree(int(pins)):
            self.host = replace(self.host, memory=0)
        most = -self.agree(-peak)
        return None if most == NEVER else most


def same_bits(one: Plan, other: Plan) -> bool:
    """Whether two plans of one run train the same: dropout masks and the order of sums depend on some of it, and what
    is kept in 8 bits on which layers are recomputed."""

    def decisive(plan: Plan) -> tuple[object, ...]:
        policies = plan.policies
        packed = [policies.packs(number) for number in range(len(policies.layers))]
        return plan.micro_batches_at_once, policies.mlp_piece, policies.loss_chunk, packed

    return decisive(one) == decisive(other)


def more_beside(beside: int, plan: Plan, peak: int | None) -> int:
    """Bytes that the next plan counts as taken by others, after a plan that took too much.

    Args:
        beside: what this plan counted so.
        plan: as it was tried.
        peak: its measured peak; None where it did not fit.
    """
    if peak is None:
        return max(2 * beside, plan.budget // 32)
    return beside + max(peak - plan.estimate, GIB // 16)


def apply(plan: Plan, model: PeftModel, products: Products | None = None) -> FastEngine:
    """The engine of a plan; moves what the plan moves to the host, and back what it does not.

    Args:
        plan: as chosen.
        model: on the device.
        products: as of ``FastEngine``.

    Raises:
        torch.OutOfMemoryError: the device has no room for what is to be on it.
    """
    base: Any = model.base_model.model
    policies, store = plan.policies, store_of(base)
    before = waits(base.get_input_embeddings()), waits(base.get_output_embeddings())
    # What leaves makes room for what comes.
    place_ends(base, *(one or other for one, other in zip(before, policies.ends_on_host, strict=True)))
    if store is not None:
        store.place(policies.streamed)
    place_ends(base, *policies.ends_on_host)
    return FastEngine(model, policies, products)


def away(model: PeftModel, memory: ModelMemory) -> int:
    """Bytes that the device would take more if all that may wait on the host were on it.

    Args:
        model: on the device.
        memory: of it.
    """
    base: Any = model.base_model.model
    store = store_of(base)
    ends = memory.embedding * waits(base.get_input_embeddings()) + memory.head * waits(base.get_output_embeddings())
    return ends + (0 if store is None else store.away)


def possible_at_once(per_step: int) -> list[int]:
    """How many of an optimizer step's micro-batches may be computed at once, from most to 1.

    Any number may. Those that are left out take as many passes as a smaller one: 7 of 8 and 4 of 8 both take two.

    Args:
        per_step: micro-batches of a step on each rank.
    """
    return sorted({math.ceil(per_step / passes) for passes in range(1, per_step + 1)}, reverse=True)
