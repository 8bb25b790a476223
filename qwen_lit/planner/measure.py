"""What a machine does, measured: how fast it computes, launches and copies, and the peak of one micro-batch."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from qwen_lit.engine.offload import UNPINNED
from qwen_lit.planner.flops import measured_flops
from qwen_lit.planner.plan import GIB, HostProfile, Plan, Shape, limit

log = logging.getLogger(__name__)
COPIED = 2**26
"""Bytes that are copied to time the link."""

STEPS = 8
"""The share of the layers is a whole number of such parts, so that two runs on one machine plan alike."""

TRIES = 4
"""Plans that are measured at most."""

GROUPS = Path("/sys/fs/cgroup")
MINE = Path("/proc/self/cgroup")
"""Names the control group of this process."""


def host_memory() -> int:
    """Bytes of host memory that are free to this process: the machine's, or what its control groups leave."""
    free = int(psutil.virtual_memory().available)
    try:
        mine = next(line[3:] for line in MINE.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return free
    group = GROUPS / mine.strip("/")
    for one in (group, *group.parents):
        if one.is_relative_to(GROUPS):
            # A group without a limit says max, and the outermost has no such file.
            with suppress(OSError, ValueError):
                most, used = ((one / name).read_text().strip() for name in ("memory.max", "memory.current"))
                free = min(free, int(most) - int(used))
    return max(0, free)


def measure_host(engine: Any, shape: Shape, batch: Any, processes: int) -> HostProfile:
    """Time a copy to the host, a product, and the launching of a micro-batch, where there is memory for that.

    Args:
        engine: a ``FastEngine`` on a CUDA device that recomputes nothing.
        shape: of its model.
        batch: ``qwen_lit.data.batches.Batch`` of few tokens, on that device.
        processes: on this machine, which share its memory.
    """
    # Half of the memory stays free: the export, the loader's workers and the page cache live there too.
    memory = host_memory() // 2 // processes
    try:
        share, launch = _share_and_launch(engine, shape, batch)
    except RuntimeError as error:
        if not is_full(error):
            raise
        # The plans that fit then send no layer to the host.
        share = launch = 0.0
    return HostProfile(share=min(1.0, int(share * STEPS) / STEPS), memory=memory, launch=int(launch))


def _share_and_launch(engine: Any, shape: Shape, batch: Any) -> tuple[float, float]:
    """As of a ``HostProfile``."""
    device = batch["input_ids"].device
    there = torch.empty(COPIED, dtype=torch.uint8, device=device)
    here = torch.empty(COPIED, dtype=torch.uint8, device="cpu", pin_memory=True)
    copy = _seconds(lambda: here.copy_(there, non_blocking=True), device)
    # A layer takes longer than its products, and these longer than in a burst: both are room to spare.
    with torch.random.fork_rng([device]):
        forward = 2 * shape.products / measured_flops(device, 4096)
    launch = _seconds(lambda: measure_peak(engine, batch), device)
    # Backward takes the input's gradient alone, and so as long as forward.
    return forward / (shape.kept * copy / COPIED), launch / (2 * forward * shape.layers)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest of a few times; the first ones compile, allocate and wake the device."""
    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def measure_peak(engine: Any, batch: Any) -> int:
    """Bytes at the peak of a micro-batch's forward and backward, with all gradients there.

    Neither gradients nor random numbers are left behind, nor copies under way.

    Args:
        engine: a ``FastEngine`` on a CUDA device.
        batch: ``qwen_lit.data.batches.Batch`` on that device.

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
        # Memory that is given up now may still be copied to the host, or from there.
        torch.cuda.synchronize(device)
        for parameter in trained:
            parameter.grad = None
    return torch.cuda.max_memory_allocated(device)


def is_full(error: RuntimeError) -> bool:
    """Whether an error says that memory is short, of the device or the host, in the words of any library."""
    told = ("out of memory", "alloc_failed", UNPINNED)
    return isinstance(error, torch.OutOfMemoryError) or any(one in str(error).lower() for one in told)


def settle(plan_with: Callable[[int], Plan], peak_of: Callable[[Plan], int | None]) -> tuple[Plan, int | None]:
    """The first plan whose measured peak is within its budget.

    Args:
        plan_with: the plan when so many bytes are taken beside it; the smallest one where none fits beside them.
        peak_of: its measured peak; None where it did not fit.

    Returns:
        The plan, which ``fits`` where its peak does, and that peak. Where each of a few took too much it is the
        smallest plan there is, and the peak None if that did not fit either.
    """
    beside = 0
    for left in reversed(range(TRIES)):
        plan = plan_with(beside)
        peak = peak_of(plan)
        if not plan.fits or not left or (peak is not None and peak <= limit(plan.budget)):
            break
        log.warning("%s: %s; planning again", plan, "did not fit" if peak is None else f"took {peak / GIB:.2f} GiB")
        beside = max(2 * beside, plan.budget // 32) if peak is None else beside + max(peak - plan.estimate, GIB // 16)
        if left == 1:
            beside = plan.budget
    if beside == plan.budget:
        # Nothing is beside it; all of the budget only kept other plans out.
        plan = replace(plan, estimate=plan.estimate - beside)
    return (plan if peak is None else replace(plan, fits=peak <= limit(plan.budget))), peak
