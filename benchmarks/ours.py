"""Training steps of this project, planned and computed as ``fit`` does, in a process of their own for each case."""

# Before torch, whose allocator it sets.
# isort: off
import qwen_lit  # noqa: F401
import torch

# isort: on
import resource
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from cases import GIB, QKVO, documents, limit_memory
from lightning.fabric.utilities import move_data_to_device
from made import made_base
from peft import LoraConfig, PeftModel
from random_base import NF4

from qwen_lit.data.batches import Batch, collate
from qwen_lit.data.packing import best_fit
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.products import Products
from qwen_lit.engine.supported import unsupported_reason
from qwen_lit.frozen.loading import load_frozen
from qwen_lit.model.load import add_adapter
from qwen_lit.model.optim import OPTIMIZERS
from qwen_lit.planner.measure import Gpu
from qwen_lit.planner.planner import Planned, Planner, Work, possible_at_once

DEVICE = torch.device("cuda:0")
OPTIMIZER = OPTIMIZERS["paged_adamw_8bit"]
TOLD = ("share", "launch")
"""What a case may say of the machine instead of measuring it."""


@dataclass(frozen=True)
class Rows:
    """The micro-batches that a case trains."""

    packs: list[list[tuple[Any, Any]]]
    """Documents of each."""
    per_step: int
    steps: int

    @staticmethod
    def of(case: dict[str, Any]) -> "Rows":
        """As many as the steps of a case take."""
        longest, steps = case.get("longest", 2048), case.get("steps", 6)
        per_step = case.get("tokens", 16_384) // longest
        docs = documents(case, 4096 if case.get("mix") else steps * per_step, longest)
        packs = (
            best_fit([len(ids) for ids, _ in docs], longest) if case.get("mix") else [[n] for n in range(len(docs))]
        )
        return Rows([[docs[n] for n in pack] for pack in packs[: steps * per_step]], per_step, steps)

    def tokens(self, number: int) -> int:
        """Of one micro-batch."""
        return sum(len(ids) for ids, _ in self.packs[number])

    def work(self) -> Work:
        """What the planner is asked to plan for."""
        heaviest = sorted(range(len(self.packs)), key=self.tokens, reverse=True)
        most = self.tokens(heaviest[0])
        return Work(
            {count: count * most for count in possible_at_once(self.per_step)},
            sum(map(self.tokens, heaviest)) / len(heaviest),
            lambda count: collate(sum((self.packs[number] for number in heaviest[:count]), []), 0),
        )

    def batches(self, step: int, at_once: int) -> list[Batch]:
        """Of one optimizer step, on the CPU."""
        packs = self.packs[step * self.per_step : (step + 1) * self.per_step]
        return [collate(sum(packs[at : at + at_once], []), 0) for at in range(0, len(packs), at_once)]


class ToldGpu(Gpu):
    """A GPU whose profile a case may know better."""

    def __init__(self, device: torch.device, told: dict[str, Any]) -> None:
        super().__init__(device)
        self.told = told

    def profile(self, *of: Any) -> Any:
        """As measured, but for what is told."""
        return replace(super().profile(*of), **self.told)


def ours(model_path: str, case: dict[str, Any]) -> dict[str, Any]:
    """Steps of the fast engine with the plan it makes for the memory it has."""
    limit_memory(case)
    began = time.perf_counter()
    model = adapted(model_path, case, DEVICE)
    loaded = {"load_s": round(time.perf_counter() - began, 1), "load_gib": gib(torch.cuda.max_memory_allocated())}
    rows = Rows.of(case)
    planned = plan(model, case, rows, DEVICE)
    return {**measured(planned, model, case, rows, DEVICE), **loaded, **described(planned), **host_memory(model)}


def adapted(model_path: str, case: dict[str, Any], device: torch.device) -> PeftModel:
    """The base in NF4 with a new adapter.

    Args:
        model_path: a checkpoint's folder, or a shape of ``random_base.py``.
        case: what is trained.
        device: where.
    """
    there = Path(model_path).is_dir()
    if there:
        base = load_frozen(Path(model_path), NF4, device, case.get("base_cache", "auto"), limit_of(case))
    else:
        base = made_base(model_path, NF4, device, case.get("layers"))
    lora = LoraConfig(
        r=32, lora_alpha=64, lora_dropout=case.get("dropout", 0.0), target_modules=case.get("targets", QKVO)
    )
    model = add_adapter(base, lora, False)
    if reason := unsupported_reason(model, device):
        raise SystemExit(reason)
    return model


def limit_of(case: dict[str, Any]) -> int | None:
    """Bytes of the device that a case may use; None for all."""
    return int(case["memory"] * GIB) if "memory" in case else None


def plan(model: PeftModel, case: dict[str, Any], rows: Rows, device: torch.device) -> Planned:
    """What the planner chooses, and the engine that runs it."""
    budget = 1 if case.get("least") else limit_of(case)
    planner = Planner(
        model,
        ToldGpu(device, {key: case[key] for key in TOLD if key in case}),
        int,
        partial(torch.autocast, "cuda", dtype=torch.bfloat16),
        OPTIMIZER.state_bytes,
        budget,
        products=Products(case.get("products", "bf16")),
        kept=case.get("kept", "bf16"),
    )
    return planner.plan(rows.work())


def measured(
    planned: Planned, model: PeftModel, case: dict[str, Any], rows: Rows, device: torch.device
) -> dict[str, Any]:
    """Train the steps: their speed, losses and peak."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZER.build([{"params": trained, "lr": 2e-4}], (0.9, 0.999))
    seconds, losses, tokens = [], [], []
    for number in range(rows.steps):
        batches = rows.batches(number, planned.plan.micro_batches_at_once)
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = step(planned.engine, batches, optimizer, trained, device)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        losses.append(round(float(loss), 4))
        tokens.append(sum(batch["tokens"] for batch in batches))
        if number == 0 and rows.steps > 1:
            torch.cuda.reset_peak_memory_stats()
        if case.get("profile") and number == rows.steps - 2:
            profile(partial(step, planned.engine, batches, optimizer, trained, device))
    first = 1 if rows.steps > 1 else 0
    rates = sorted(n / s for n, s in zip(tokens[first:], seconds[first:], strict=True))
    return {
        "tokens_per_second": round(rates[len(rates) // 2]),
        "first_step_s": round(seconds[0], 1),
        "losses": losses[:3],
        "peak_gib": gib(torch.cuda.max_memory_allocated()),
        "reserved_gib": gib(torch.cuda.max_memory_reserved()),
    }


def step(
    engine: FastEngine, batches: list[Batch], optimizer: Any, trained: list[torch.nn.Parameter], device: torch.device
) -> torch.Tensor:
    """One optimizer step.

    Args:
        engine: of the plan.
        batches: on the CPU.
        optimizer: of the trained parameters.
        trained: parameters of the adapter.
        device: of the model.

    Returns:
        The loss of the step, a mean over its supervised tokens.
    """
    total, supervised = torch.zeros((), device=device), sum(batch["targets"].numel() for batch in batches)
    for batch in batches:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = engine.loss_sum(move_data_to_device(batch, device)) / supervised
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def described(planned: Planned) -> dict[str, Any]:
    """The plan in figures."""
    plan, policies = planned.plan, planned.plan.policies
    return {
        "estimate_gib": gib(plan.estimate),
        "measured_gib": None if planned.peak is None else gib(planned.peak),
        "plan": str(plan),
        "micro_batches_at_once": plan.micro_batches_at_once,
        "recompute": policies.recomputed,
        "chunk": policies.loss_chunk,
        "offload_embedding": policies.offload_embedding,
        "offload_head": policies.offload_head,
        "offload_inputs": policies.offload_inputs,
        "piece": policies.mlp_piece,
        "offload_activations": policies.offloaded,
        "resident": len(policies.resident),
        "streamed": len(policies.streamed),
    }


def host_memory(model: PeftModel) -> dict[str, Any]:
    """Memory of the host: all that this process has mapped and touched, and what of it torch holds pinned."""
    store = getattr(model.base_model.model, "frozen", None)
    return {
        "host_gib": gib(psutil.Process().memory_info().rss),
        "host_peak_gib": gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        "pinned_by_torch_gib": gib(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)),
        "blocks_gib": 0.0 if store is None else gib(store.blocks.memory.numel()),
    }


def gib(size: int) -> float:
    """Bytes in GiB, with two digits."""
    return round(size / GIB, 2)


def profile(step: Any) -> None:
    """Print the kernels of one optimizer step by their time on the device, and how long it had nothing to do."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    spans = sorted((one.time_range.start, one.time_range.end) for one in found.events() if one.device_index >= 0)
    idle, end = 0.0, spans[0][0]
    for start, stop in spans:
        idle, end = idle + max(0.0, start - end), max(end, stop)
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=90))
    whole = (end - spans[0][0]) / 1000
    print(f"from the first kernel to the last {whole:.0f} ms, idle {idle / 1000:.0f} ms", flush=True)
