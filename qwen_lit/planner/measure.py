"""What a machine does, measured: how fast it computes, launches and copies, and the peak of one micro-batch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

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
from qwen_lit.planner.host import HostProfile
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.speed import COSTS

COPIED = 2**26
"""Bytes that are copied to time the link."""

STEPS = 8
"""The share of the layers is rounded down to a multiple of 1/8, so that two runs on one machine plan alike."""

PRODUCT = 4096
"""Rows and columns of the product that times the device."""

TIMES = 4
"""Runs of what is timed, of which the shortest counts; the first one compiles, allocates and wakes the device."""


def measure_host(engine: FastEngine, memory: ModelMemory, batch: Batch, processes: int) -> HostProfile:
    """Time copies, a product, and the launching of a micro-batch, where there is memory for that.

    Args:
        engine: on a CUDA device; it recomputes nothing. All layers of its store get streamed, and where there is no
            memory beside embedding and lm_head, these wait on the host.
        memory: of its model.
        batch: of few tokens, on that device.
        processes: on this machine, which share its memory.
    """
    # Half of the memory stays free: the export, the loader's workers and the page cache live there too.
    pinnable = host_memory() // 2 // processes
    for short in (False, True):
        try:
            if short:
                place_ends(engine.model.get_base_model(), True, True)
            share, launch, link, blocks = _speeds(engine, memory, batch)
            break
        except RuntimeError as error:
            if not is_full(error):
                raise
    else:
        # With a share of 0, no layer is planned to be offloaded.
        return HostProfile(memory=pinnable, processes=processes)
    share = min(1.0, int(share * STEPS) / STEPS)
    return HostProfile(share, pinnable, int(launch), rounded(link), rounded(blocks), processes)


def rounded(rate: float) -> int:
    """A rate rounded down to one of the eight steps between two powers of two, so that two runs on one machine plan
    alike."""
    step = 2 ** max(0, int(rate).bit_length() - 4)
    return int(rate) // step * step


def _speeds(engine: FastEngine, memory: ModelMemory, batch: Batch) -> tuple[float, float, float, float]:
    """``share``, ``launch``, ``link`` and ``blocks`` of a ``HostProfile``, not rounded yet."""
    device, store = batch["input_ids"].device, engine.store
    there = torch.empty(COPIED, dtype=torch.uint8, device=device)
    here = torch.empty(COPIED, dtype=torch.uint8, device="cpu", pin_memory=True)
    out = _seconds(lambda: here.copy_(there, non_blocking=True), device)
    back = _seconds(lambda: there.copy_(here, non_blocking=True), device)
    with torch.random.fork_rng([device]):
        operations = measured_flops(device, PRODUCT)
    link = blocks = COPIED / back / operations * 1e9
    if store is not None:
        store.place(range(len(store.layers)))
        blocks = sum(store.sizes) / pass_seconds(store) / operations * 1e9
    with nullcontext() if store is None else without_copies(store):
        launch = _seconds(lambda: measure_peak(engine, batch), device)
    # Products in a run take longer than in a burst: the share is on the safe side by that. Backward takes the input's
    # gradient alone, and so as long as forward.
    forward = 2 * memory.products / operations
    share = forward / COSTS.products / (memory.saved * out / COPIED)
    return share, launch / (2 * forward * len(memory.layers)), link, blocks


def pass_seconds(store: FrozenStore, passes: int = 2) -> float:
    """Seconds in which all streamed layers of a store come to the device, one after the other.

    Args:
        store: with streamed layers.
        passes: of which the last is timed; the first may read their file, where there is memory to keep it.
    """
    took = 0.0
    for _ in range(passes):
        store.begin(turns=False)
        started = time.perf_counter()
        for number in store.streamed:
            store.arrive(number)
        if store.device.type == "cuda":
            torch.cuda.synchronize(store.device)
        took = time.perf_counter() - started
    return took


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

    def profile(self, model: PeftModel, memory: ModelMemory, processes: int) -> HostProfile:
        """Measure the machine as ``measure_host`` does, with an engine of its own."""
        # Lightning makes new tensors on the device while it builds a model.
        with torch.device("cpu"):
            few = collate([(np.zeros(FEW), np.array([[0, FEW]]))], 0)
        engine = FastEngine(model)
        try:
            return measure_host(engine, memory, move_data_to_device(few, self.device), processes)
        finally:
            engine.arena.workspace.clear()

    def peak(self, engine: FastEngine, batch: Batch) -> int:
        """Measure the peak of a batch on the CPU as ``measure_peak`` does."""
        return measure_peak(engine, move_data_to_device(batch, self.device))


def free_memory(device: torch.device) -> int:
    """Bytes of the device that this process may use, those it holds already included."""
    free, total = torch.cuda.mem_get_info(device)
    most = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), most))
