"""What a machine does, measured: how fast it computes, launches and copies, and the peak of one micro-batch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from peft import PeftModel

from qwen_lit.data.batches import Batch, collate
from qwen_lit.engine.ends import place_ends
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.offload import UNPINNED
from qwen_lit.frozen.ring import Ring, Slot
from qwen_lit.frozen.store import FrozenStore
from qwen_lit.hardware import host_memory
from qwen_lit.planner.flops import measured_flops
from qwen_lit.planner.host import STEPS, HostProfile, rounded
from qwen_lit.planner.link import LONG_WINDOW, WINDOW, LinkTimer, rate_of
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.speed import COSTS

PRODUCT = 4096
"""Rows and columns of the product that times the device."""

TIMES = 4
"""Runs of what is timed, of which the shortest counts; the first one compiles, allocates and wakes the device."""


def measure_host(
    engine: FastEngine, memory: ModelMemory, batch: Batch, processes: int, meet: Callable[[], None] = lambda: None
) -> HostProfile:
    """Time a product, the launching of a micro-batch, and copies, where there is memory for that.

    Args:
        engine: on a CUDA device; it recomputes nothing. All layers of its store get streamed, and where there is no
            memory beside embedding and lm_head, these wait on the host.
        memory: of its model.
        batch: of few tokens, on that device.
        processes: on this machine, which share its memory and the way to it.
        meet: returns when all ranks have called it; each calls it once, whatever becomes of its measurements.
    """
    left = [meet]

    def once() -> None:
        for one in [left.pop()] if left else []:
            one()

    # Half of the memory stays free: the export, the loader's workers and the page cache live there too.
    pinnable = host_memory() // 2 // processes
    for short in (False, True):
        try:
            if short:
                place_ends(engine.model.get_base_model(), True, True)
            found = _speeds(engine, memory, batch, once)
            break
        except RuntimeError as error:
            if not is_full(error):
                raise
    else:
        once()
        # With a share of 0, no layer is planned to be offloaded.
        return HostProfile(memory=pinnable, processes=processes)
    share, link, blocks = min(1.0, int(found.share * STEPS) / STEPS), rounded(found.link), rounded(found.blocks)
    return HostProfile(share, pinnable, int(found.launch), link, blocks, processes, int(found.rate))


class Speeds(NamedTuple):
    """What of a ``HostProfile`` is measured, not rounded yet."""

    share: float
    launch: float
    link: float
    blocks: float
    rate: float


def _speeds(engine: FastEngine, memory: ModelMemory, batch: Batch, meet: Callable[[], None]) -> Speeds:
    """Time the device alone, and then, together with the other ranks, the link."""
    device, store = batch["input_ids"].device, engine.store
    link = LinkTimer(device)
    with torch.random.fork_rng([device]):
        operations = measured_flops(device, PRODUCT)
    if store is not None:
        store.place(range(len(store.layers)))
        # It may read the layers' file, where there is memory to keep it.
        pass_seconds(store)
    with nullcontext() if store is None else without_copies(store):
        launch = _seconds(lambda: measure_peak(engine, batch), device)
    meet()
    out, back = link.rates()
    blocks = back if store is None else rate_of(lambda: _pass(store), WINDOW)
    # Products in a run take longer than in a burst: the share is on the safe side by that. Backward takes the input's
    # gradient alone, and so as long as forward.
    forward = 2 * memory.products / operations
    share = forward / COSTS.products / (memory.saved / out)
    launch /= 2 * forward * len(memory.layers)
    return Speeds(share, launch, back / operations * 1e9, blocks / operations * 1e9, min(out, back))


def pass_seconds(store: FrozenStore) -> float:
    """Seconds in which all streamed layers of a store come to the device, one after the other.

    Args:
        store: with streamed layers.
    """
    started = time.perf_counter()
    _pass(store)
    return time.perf_counter() - started


def _pass(store: FrozenStore) -> int:
    """Have all streamed layers of a store come to the device; returns their bytes."""
    store.begin(turns=False)
    for number in store.streamed:
        store.arrive(number)
    if store.device.type == "cuda":
        torch.cuda.synchronize(store.device)
    return sum(store.sizes[number] for number in store.streamed)


class NoCopies:
    """Copies that are not made: slots keep what they have."""

    def begin(self, number: int, slot: torch.Tensor, free: Any) -> Any:
        """Copy nothing."""

    def finish(self, copy: Any) -> None:
        """There is nothing to wait for."""

    def mark(self) -> Any:
        """There is nothing to wait for."""

    def close(self) -> None:
        """There is nothing to give up."""


@contextmanager
def without_copies(store: FrozenStore) -> Iterator[None]:
    """Let streamed layers compute with whatever their slots hold, so that what they take is the time of the rest.

    Args:
        store: with streamed layers.
    """
    ring = store.ring
    if ring is None:
        yield
        return
    # The slots keep what they hold, but from here on no layer is bound to them.
    ring.begin(ring.turns)
    slots = [Slot(one.memory) for one in ring.slots]
    store.ring = Ring(ring.sizes, slots, NoCopies(), ring.gives_up)
    try:
        yield
    finally:
        for slot in slots:
            if slot.holds is not None:
                ring.gives_up(slot.holds)
        store.ring = ring


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of ``TIMES`` runs of a function on the device."""
    best = float("inf")
    for _ in range(TIMES):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def measure_peak(engine: FastEngine, batch: Batch) -> int:
    """Bytes at the peak of a micro-batch's forward and backward, with all gradients there.

    Neither gradients nor random numbers are left behind, nor copies under way.

    Args:
        engine: on a CUDA device.
        batch: on that device.

    Raises:
        RuntimeError: one for which ``is_full`` holds, where it does not fit.
    """
    device = batch["input_ids"].device
    trained = [parameter for parameter in engine.trained if parameter.requires_grad]
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.random.fork_rng([device]):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            engine.loss_sum(batch).backward()
    finally:
        # Memory that is given up here may still be copied to the host, or from there.
        torch.cuda.synchronize(device)
        for parameter in trained:
            parameter.grad = None
    return torch.cuda.max_memory_allocated(device)


def is_full(error: RuntimeError) -> bool:
    """Whether an error says that memory is short, of the device or the host, in the words of any library."""
    words = ("out of memory", "alloc_failed", UNPINNED)
    return isinstance(error, torch.OutOfMemoryError) or any(one in str(error).lower() for one in words)


FEW = 16
"""Tokens of the micro-batch that times what the host takes to launch one."""


class Gpu:
    """A CUDA device, as the planner asks it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """Bytes of the device that this process may use, those it holds already included."""
        return free_memory(self.device)

    def allocated(self) -> int:
        """Bytes that tensors take."""
        return torch.cuda.memory_allocated(self.device)

    def empty_cache(self) -> None:
        """Give unused memory back to the device."""
        torch.cuda.empty_cache()

    def profile(self, model: PeftModel, memory: ModelMemory, processes: int, meet: Callable[[], None]) -> HostProfile:
        """Measure the machine as ``measure_host`` does, with an engine of its own."""
        # Lightning makes new tensors on the device while it builds a model.
        with torch.device("cpu"):
            few = collate([(np.zeros(FEW), np.array([[0, FEW]]))], 0)
        engine = FastEngine(model)
        try:
            return measure_host(engine, memory, move_data_to_device(few, self.device), processes, meet)
        finally:
            engine.arena.workspace.clear()

    def rate(self, meet: Callable[[], None]) -> int:
        """Bytes a second over the link, of the slower of its directions; 0 where there is no memory to measure it.

        Args:
            meet: as of ``measure_host``.
        """
        try:
            timer = LinkTimer(self.device)
        except RuntimeError as error:
            if not is_full(error):
                raise
            meet()
            return 0
        meet()
        return int(min(timer.rates(LONG_WINDOW)))

    def peak(self, engine: FastEngine, batch: Batch) -> int:
        """Measure the peak of a batch on the CPU as ``measure_peak`` does."""
        return measure_peak(engine, move_data_to_device(batch, self.device))


def free_memory(device: torch.device) -> int:
    """Bytes of the device that this process may use, those it holds already included."""
    free, total = torch.cuda.mem_get_info(device)
    most = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), most))
