"""The memory plan of a run: what the machine measures, what the ranks agree on, and what the heaviest rows show."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from qwen_lit.data.batches import collate
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.distributed import least
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.lora_linear import WORKSPACE
from qwen_lit.engine.offload import UNPINNED
from qwen_lit.planner.measure import STEPS, is_full, measure_host, measure_peak, settle
from qwen_lit.planner.plan import HostProfile, Plan, Shape, apply, choose, free_memory

NEVER = 2**62


def planned_engine(
    trainer: Any, model: Any, data: QwenDataModule, budget: int | None, state_bytes: int, before: int | None = None
) -> tuple[FastEngine, Plan, int | None]:
    """The fast engine of the plan on which all ranks agree.

    Args:
        trainer: all of its ranks call this.
        model: a ``PeftModel`` on this rank's CUDA device.
        data: its rows are prepared.
        budget: bytes that may be used; None for all that is free.
        state_bytes: of optimizer state for a trained number.
        before: micro-batches that the resumed run has computed at once. It goes on so where that fits: masks of
            dropout and the order of sums depend on it.

    Returns:
        The engine, its plan, and the bytes at the peak of the heaviest micro-batch; None where nothing is trained.

    Raises:
        torch.OutOfMemoryError: no plan fits.
    """
    device = trainer.strategy.root_device
    sizes, mean = data.most_tokens(possible_at_once(trainer.micro_batches_per_step)), data.mean_tokens()
    free = free_memory(device)
    budget = least(trainer, min(budget or free, free))
    shape = Shape.of(model, state_bytes)
    static = -least(trainer, -torch.cuda.memory_allocated(device))
    trains = trainer.state.fn == "fit"
    machine = _machine(trainer, model, shape) if trains else HostProfile()
    # What the optimizer will hold is not there yet when the peak is measured.
    states = state_bytes * sum(one.numel() for one in model.parameters() if one.requires_grad)
    engine: FastEngine | None = None

    def plan_with(beside: int) -> Plan:
        if engine is not None:
            engine.release()
        torch.cuda.empty_cache()
        return choose(shape, static + beside, budget, sizes, machine, before, mean)

    def peak_of(plan: Plan) -> int | None:
        nonlocal engine, machine
        with torch.device("cpu"):
            heaviest = data.heaviest(plan.micro_batches_at_once)
        peak, pins = None, True
        try:
            with trainer.precision_plugin.forward_context():
                engine = apply(plan, model)
                peak = measure_peak(engine, move_data_to_device(heaviest, device))
        except RuntimeError as error:
            # A rank on which it does not fit tells the others, which wait for it.
            if not is_full(error):
                raise
            pins = UNPINNED not in str(error)
        if not least(trainer, int(pins)):
            machine = replace(machine, memory=0)
        most = -least(trainer, -(NEVER if peak is None else peak + states))
        return None if most == NEVER else most

    if not trains:
        plan = plan_with(0)
        return apply(plan, model), plan, None
    plan, peak = settle(plan_with, peak_of)
    if peak is None or engine is None:
        raise torch.OutOfMemoryError(f"the heaviest micro-batch does not fit: {plan}")
    return engine, plan, peak


def possible_at_once(per_step: int) -> list[int]:
    """How many of an optimizer step's micro-batches may be computed at once, from most to 1.

    Any number may. Those that are left out take as many passes as a smaller one: 7 of 8 and 4 of 8 both take two.

    Args:
        per_step: micro-batches of a step on each rank.
    """
    return sorted({math.ceil(per_step / passes) for passes in range(1, per_step + 1)}, reverse=True)


def _machine(trainer: Any, model: Any, shape: Shape) -> HostProfile:
    """What the slowest rank measures."""
    # Lightning would make tensors on the device here.
    with torch.device("cpu"):
        few = collate([(np.zeros(16), np.array([[0, 16]]))], 0)
    few = move_data_to_device(few, trainer.strategy.root_device)
    found = measure_host(FastEngine(model), shape, few, trainer.num_devices)
    WORKSPACE.buffers.clear()
    share, memory, launch = (least(trainer, one) for one in (int(found.share * STEPS), found.memory, found.launch))
    return HostProfile(share / STEPS, memory, launch)
