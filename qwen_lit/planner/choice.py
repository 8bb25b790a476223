"""Which engine trains: the fast one with its memory plan where it can run, PEFT's own path elsewhere."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.engine.engine import FastEngine, unsupported_reason
from qwen_lit.errors import UserError
from qwen_lit.families.table import family_of
from qwen_lit.planner.plan import GIB, Plan
from qwen_lit.planner.planner import planned_engine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What computes the loss."""

    told: str
    """As the start of a run says it."""
    fast: FastEngine | None = None
    """None for PEFT's own path."""
    plan: Plan | None = None
    """Of the fast engine on a GPU."""


def choose_engine(module: Any, trainer: Any, data: QwenDataModule, before: int | None) -> Choice:
    """The engine that ``model.engine`` allows.

    Args:
        module: ``QwenModule`` with its model on this rank's device.
        trainer: all of its ranks call this.
        data: its rows are prepared.
        before: micro-batches that the resumed run has computed at once; None for a new run.

    Raises:
        UserError: ``engine`` is fast, and the model or the device does not allow it.
        torch.OutOfMemoryError: no plan fits.
    """
    asked, device = module.engine_name, trainer.strategy.root_device
    reason = "the base is sharded" if module.shard_base else unsupported_reason(module.model, device)
    if asked == "auto" and device.type != "cuda":
        reason = reason or "there is no CUDA device"
    if asked == "fast" and reason:
        raise UserError(f"model.engine is fast, but {reason}; set it to auto.")
    if asked == "reference" or reason:
        return Choice("reference" + (f" ({reason})" if reason and asked == "auto" else ""))
    quantization = module.quantization_config
    if quantization and quantization.load_in_4bit and quantization.bnb_4bit_compute_dtype != torch.bfloat16:
        given = str(quantization.bnb_4bit_compute_dtype).removeprefix("torch.")
        log.info("the fast engine computes in bfloat16; bnb_4bit_compute_dtype %s is for the reference", given)
    if device.type != "cuda":
        layers = len(family_of(module.config).layers(module.config))
        engine = FastEngine(module.model, layers if module.gradient_checkpointing else 0)
        return Choice("fast, by the plain twins of its kernels", engine)
    engine, plan, peak = planned_engine(trainer, module.model, data, module.memory_budget, module.state_bytes, before)
    measured = "" if peak is None else f", measured {peak / GIB:.2f}"
    return Choice(f"fast, {plan}{measured}", engine, plan)
