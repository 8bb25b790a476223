"""See before you spend: the heaviest real batch through every part of a run, or the arithmetic where no GPU is."""

import json
import tempfile
import textwrap
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from peft import get_peft_model

from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.callbacks.checkpoint_io import step_files
from qwen_lit.callbacks.export import Export
from qwen_lit.data.batches import Batch
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.engine.engine import unsupported_reason
from qwen_lit.errors import UserError
from qwen_lit.export.adapter import CHUNK_ELEMENTS
from qwen_lit.export.kquants import gguf_bytes
from qwen_lit.families.table import family_of
from qwen_lit.hub import is_folder, missing_bytes
from qwen_lit.lines import plural
from qwen_lit.model.duration import check_limits, epoch_share, epoch_steps, total_steps
from qwen_lit.model.load import empty_model
from qwen_lit.model.module import QwenModule
from qwen_lit.planner.flops import measured_flops, token_flops
from qwen_lit.planner.plan import GIB, Plan, Shape, choose, relative_time, time_of
from qwen_lit.planner.planner import possible_at_once
from qwen_lit.quantization import Held, base_name
from qwen_lit.run import Run

STEPS = 4
"""Optimizer steps that are measured; the first one warms up and is left out."""
CARDS = (8, 16, 24, 40, 80)
"""GiB for which the arithmetic answers when no budget is given."""
MOST = 192 * GIB
"""Bytes of a card up to which more memory is advised."""


def plan(trainer: L.Trainer, module: QwenModule, data: QwenDataModule, exporter: Export, as_json: bool) -> int:
    """Print the answer; returns the exit code, 1 where the run fits no card.

    Args:
        trainer: with the limits of the run; on a GPU it trains a few steps.
        module: that would be trained; its model is not loaded.
        data: it would be trained on; nothing of it is prepared yet.
        exporter: what would be exported.
        as_json: print JSON instead of lines.
    """
    data.prepare_data()
    data.setup()
    check_limits(trainer, data)
    on_gpu = trainer.strategy.root_device.type == "cuda"
    result = (measure if on_gpu else arithmetic)(trainer, module, data, exporter)
    for line in [json.dumps(result, indent=1)] if as_json else lines(result):
        print(line)
    return 1 if not result["measured"] and not result["fits"] else 0


class Probe(Callback):
    """Times each optimizer step and one validation batch, and takes the peak of memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.validation = 0.0
        self.peak = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: list[Batch], batch_idx: int) -> None:
        """A step begins."""
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: list[Batch], batch_idx: int
    ) -> None:
        """It ends with the update."""
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.tokens.append(sum(one["tokens"] for one in batch))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The heaviest validation micro-batches, without gradients."""
        module: Any = pl_module
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        for step in loader:
            moved = move_data_to_device(step, module.device)
            module.eval()
            module.on_validation_epoch_start()
            started = time.perf_counter()
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                module.validation_step(moved, 0)
            torch.cuda.synchronize()
            self.validation = (time.perf_counter() - started) * len(loader)
            break
        self.peak = torch.cuda.max_memory_allocated()


def arithmetic_model(module: Any) -> Any:
    """The PEFT model without weights, on the meta device."""
    base = empty_model(module.config, torch.bfloat16)
    with torch.device("meta"):
        return get_peft_model(base, module.lora_config)


def static_bytes(model: Any, held: Mapping[str, Held]) -> int:
    """Bytes of the weights as they will stand on the device.

    Args:
        model: the PEFT model without weights, of ``arithmetic_model``.
        held: how the base's quantised weights are held.
    """
    total = 0
    for name, parameter in model.named_parameters():
        count, own = parameter.numel(), base_name(name)
        if parameter.requires_grad:
            total += 4 * count
        elif own in held:
            total += held[own].bytes_of(count, parameter.shape[0])
        else:
            total += 2 * count
    return total


def common(trainer: Any, module: Any, data: Any, model: Any, largest_batch: int, exporter: Export) -> dict[str, Any]:
    """What is known without a GPU: steps, tokens, disk and memory for the export."""
    rows = data.train_rows
    lengths, supervised = rows.column("length"), rows.column("supervised")
    tokens, of_epoch = int(lengths.sum()), epoch_steps(trainer, data)
    steps = total_steps(trainer, data)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoint = trained * (4 + module.state_bytes)
    weights = 2 * sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    largest = max(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    gguf = exporter.gguf if exporter.merge else None
    file = gguf_bytes(gguf, weights // 2) if gguf else 0
    download = 0 if is_folder(module.name) else missing_bytes(module.folder, weights)
    keep = exporter.saver.keep
    share = float(supervised.sum() / max(1, tokens))
    length = float((lengths.astype(float) ** 2).sum() / max(1, tokens))
    return {
        "rows": len(rows),
        "tokens_per_epoch": tokens,
        "supervised_share": round(share, 4),
        "lost": data.losses(),
        "steps": steps,
        "epochs": round(steps / of_epoch, 2) if steps else None,
        "steps_per_epoch": of_epoch,
        "tokens_per_step": round(tokens * epoch_share(trainer, data) / max(1, of_epoch)),
        "heaviest_micro_batch_tokens": largest_batch,
        "flops_per_token": token_flops(model, length, share)[0],
        "checkpoint_mb": round(checkpoint / 1e6, 1),
        "disk_gb": round((checkpoint * (keep + 1) + 4 * trained + weights + file + download) / 1e9, 2),
        "download_gb": round(download / 1e9, 2),
        "export_gb": round(weights / 1e9, 2),
        "gguf_gb": round(file / 1e9, 2),
        # The tensor in the making, one block of it in float32, and the adapter.
        "export_ram_gib": round((2 * largest + 8 * min(largest, CHUNK_ELEMENTS) + 4 * trained) / GIB + 0.6, 2),
    }


def arithmetic(trainer: Any, module: Any, data: QwenDataModule, exporter: Export) -> dict[str, Any]:
    """Plans from the shapes alone, for one budget or for usual cards."""
    model, budget = arithmetic_model(module), module.memory_budget
    held = module.held_weights(trainer.strategy.root_device)
    static = static_bytes(model, held)
    sizes, mean = data.most_tokens(possible_at_once(trainer.micro_batches_per_step)), data.mean_tokens()
    result = common(trainer, module, data, model, sizes[1], exporter)
    reason = reference_because(module, model, held)
    if reason and module.engine_name == "fast":
        raise UserError(f"model.engine is fast, but {reason}; set it to auto.")
    engine = f"reference ({reason})" if reason else "fast"
    result |= {"measured": False, "engine": engine, "weights_gib": round(static / GIB, 2)}
    if reason:
        # The fast engine's arithmetic knows nothing of what PEFT's own path keeps for backward.
        return result | {"plans": [], "fits": budget is None or static <= budget, "advice": []}
    shape = Shape.of(model, module.state_bytes)
    plans = []
    for size in [budget] if budget else [card * GIB for card in CARDS]:
        plan = choose(shape, static, size, sizes, mean=mean)
        plans.append(_told(plan) | {"fits": plan.fits, "relative_time": round(time_of(plan, shape, mean), 3)})
    result |= {"plans": plans, "fits": any(one["fits"] for one in plans)}
    return result | {"advice": advice(shape, static, plan, sizes, mean, module, data, model)}


def reference_because(module: Any, model: Any, held: Mapping[str, Held]) -> str | None:
    """Why ``fit`` will run PEFT's own path on a GPU; None where the fast engine will run.

    Args:
        module: with the settings.
        model: of ``arithmetic_model``.
        held: how the base's weights will be held.
    """
    if module.engine_name == "reference":
        return "as model.engine says"
    if module.shard_base:
        return "the base is sharded"
    for name, one in held.items():
        if one.kind == "int8" or name.startswith(family_of(module.config).head):
            return f"{name.removesuffix('.weight')} is held in {one}"
    return unsupported_reason(model, torch.device("meta"))


def measure(trainer: Any, module: Any, data: QwenDataModule, exporter: Export) -> dict[str, Any]:
    """Forward, backward, update, validation and a checkpoint on the heaviest real batches, on the GPU.

    Raises:
        torch.OutOfMemoryError: it does not fit, in the first minute instead of the fifth hour.
    """
    device = trainer.strategy.root_device
    model = arithmetic_model(module)
    sizes, mean = data.most_tokens(possible_at_once(trainer.micro_batches_per_step)), data.mean_tokens()
    result = common(trainer, module, data, model, sizes[1], exporter)
    limit = measured_flops(device)
    probe, data.heaviest_first = Probe(), True
    trainer.fit_loop.epoch_loop.max_steps = min(STEPS, result["steps"] or STEPS)
    trainer.limit_val_batches = 0
    trainer.num_sanity_val_steps = 0
    trainer.loggers = []
    output_dir = exporter.run.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qwen_lit_plan_", dir=output_dir) as folder:
        # Not into the folder of the run, whose checkpoints of later steps it would set aside.
        checkpoint = RunCheckpoint(Run(Path(folder)), every_n_train_steps=10**9)
        trainer.callbacks = [probe, checkpoint]
        torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        trainer.fit(module, data)
        result["minutes_to_plan"] = round((time.perf_counter() - started) / 60, 2)
        result["checkpoint_mb"] = round(step_files(checkpoint.run.checkpoints)[0].stat().st_size / 1e6, 1)
    steady = sorted(
        n / s
        for n, s in list(zip(probe.tokens, probe.seconds, strict=True))[1:]
        or zip(probe.tokens, probe.seconds, strict=True)
    )
    speed = steady[len(steady) // 2]
    bound = limit / result["flops_per_token"]
    of_step = result["tokens_per_step"] / speed
    plan = module.plan
    result |= {
        "measured": True,
        "device": torch.cuda.get_device_name(device),
        "engine": module.engine_description,
        "measured_peak_gib": round(probe.peak / GIB, 2),
        "tokens_per_second": round(speed),
        "card_tflops": round(limit / 1e12),
        "limit_tokens_per_second": round(bound),
        "share_of_limit": round(speed / bound, 3),
        "first_step_seconds": round(probe.seconds[0], 2),
        "validation_seconds": round(probe.validation, 2),
        "checkpoint_stall_seconds": round(checkpoint.stalled, 3),
        "epoch_seconds": round(result["steps_per_epoch"] * of_step),
        "run_seconds": round(result["steps"] * of_step) if result["steps"] else None,
        "advice": [],
    }
    if plan is not None:
        shape = Shape.of(module.model, module.state_bytes)
        static = static_bytes(model, module.held_weights(device))
        result |= _told(plan) | {"advice": advice(shape, static, plan, sizes, mean, module, data, model)}
    return result


def _told(plan: Plan) -> dict[str, Any]:
    return {
        "budget_gib": round(plan.budget / GIB, 2),
        "estimated_peak_gib": round(plan.estimate / GIB, 2),
        "micro_batches_at_once": plan.micro_batches_at_once,
        "recomputed_layers": plan.recompute_layers,
        "embedding_on_cpu": plan.host_embedding,
        "inputs_offloaded": plan.offload,
        "layers_offloaded": plan.offload_layers,
        "mlp_piece_tokens": plan.piece,
        "layers_held_in_bf16": plan.resident_layers,
    }


def advice(
    shape: Shape, static: int, plan: Plan, sizes: dict[int, int], mean: float, module: Any, data: Any, model: Any
) -> list[str]:
    """What would make it faster or smaller, with the gain of each by the planner's own arithmetic."""
    found = []
    own, held = time_of(plan, shape, mean), plan.resident_layers / shape.layers
    if plan.recompute_layers:
        budgets = range(plan.budget, MOST, GIB // 4)
        larger = (choose(shape, static, budget, sizes, mean=mean) for budget in budgets)
        kept = next((one for one in larger if not one.recompute_layers), plan)
        gain, size = own / time_of(kept, shape, mean) - 1, kept.budget / GIB
        if gain > 0.02:
            found.append(f"faster: with {size:.1f} GiB no layer is recomputed, about {gain:.0%} faster")
    if not data.packing and family_of(module.config).packs:
        full = data.batch_size * data.max_length
        now, then = (relative_time(0.0, max(1, int(one * plan.micro_batches_at_once)), held) for one in (mean, full))
        gain = now / then - 1
        if gain > 0.02:
            found.append(
                f"faster: data.packing: true fills micro-batches of {mean:,.0f} tokens up to {full:,}: about "
                f"{gain:.0%} faster (lower trainer.accumulate_grad_batches to keep the rows of a step)"
            )
    whole, half = (
        shape.peak(
            static,
            share,
            plan.recompute_layers,
            plan.loss_chunk,
            plan.host_embedding,
            plan.offload,
            plan.piece,
            plan.offload_layers,
        )
        for share in (sizes[plan.micro_batches_at_once], sizes[plan.micro_batches_at_once] // 2)
    )
    if whole - half > GIB // 8:
        shorter = max(8, sizes[1] // 2)
        longer = int((data.train_rows.that_end().column("length") > shorter).sum())
        told = f"{longer:,} of {len(data.train_rows):,} rows are longer and would be shortened or dropped"
        found.append(
            f"smaller: data.max_length {shorter} takes {(whole - half) / GIB:.1f} GiB less; "
            f"{told if longer else 'no row is longer'}"
        )
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = lora // 2 * (8 + module.state_bytes)
    found.append(f"smaller: lora_config.r {module.lora_config.r // 2} takes {saved / GIB:.2f} GiB less")
    config = module.quantization_config
    if config is None or not config.load_in_4bit:
        found.append("smaller: quantization_config nf4 takes about a quarter of the weights' memory")
    elif not config.bnb_4bit_use_double_quant:
        held = module.held_weights(torch.device("cpu"))
        double = {name: replace(one, double=True) for name, one in held.items()}
        less = static_bytes(model, held) - static_bytes(model, double)
        found.append(f"smaller: bnb_4bit_use_double_quant: true takes {less / GIB:.2f} GiB less")
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """The answer in lines of at most 80 columns."""
    out = [
        f"data        {plural(result['rows'], 'row')}, {result['tokens_per_epoch']:,} tokens an epoch, "
        f"{result['supervised_share']:.0%} supervised",
        *(f"not trained {line}" for line in result["lost"]),
        f"run         {_steps(result)}, about {result['tokens_per_step']:,} tokens each",
    ]
    if result["measured"]:
        out.append(f"card        {result['device']}, {result['card_tflops']} TFLOP/s in a large product")
        out.append(f"engine      {result['engine']}")
        if "budget_gib" in result:
            out.append(
                f"memory      estimated {result['estimated_peak_gib']:.2f} GiB, measured "
                f"{result['measured_peak_gib']:.2f}, of {result['budget_gib']:.2f} GiB"
            )
        else:
            out.append(f"memory      measured {result['measured_peak_gib']:.2f} GiB")
        out += [
            f"speed       {result['tokens_per_second']:,} tokens/s, {result['share_of_limit']:.0%} of the "
            f"{result['limit_tokens_per_second']:,} this card can do",
            f"time        an epoch {_time(result['epoch_seconds'])}, the run {_time(result['run_seconds'])}, "
            f"a validation {_time(result['validation_seconds'])}",
            f"checkpoint  {result['checkpoint_mb']} MB, training waits {result['checkpoint_stall_seconds']:.3f} s",
        ]
    else:
        out.append("no GPU is seen: this is arithmetic from the shapes, not a measurement")
        out.append(f"engine      on a GPU {result['engine']}")
        if not result["plans"]:
            out.append(
                f"memory      weights {result['weights_gib']:.2f} GiB{', which do not fit' * (not result['fits'])}; "
                "what this engine needs beside them has no arithmetic: run plan on the GPU"
            )
        for plan in result["plans"]:
            how = f"{plan['micro_batches_at_once']} at once, {plan['recomputed_layers']} layers recomputed"
            how += ", embedding on the CPU" * plan["embedding_on_cpu"]
            how += ", inputs offloaded" * plan["inputs_offloaded"]
            how += f", {plan['layers_offloaded']} layers offloaded" * (plan["layers_offloaded"] > 0)
            how += f", MLP in pieces of {plan['mlp_piece_tokens']}" * (plan["mlp_piece_tokens"] > 0)
            fits = how if plan["fits"] else "does not fit"
            out.append(f"{plan['budget_gib']:>7.2f} GiB  peak {plan['estimated_peak_gib']:>6.2f}  {fits}")
        if result["plans"]:
            out.append(
                "            at once: micro-batches of a step computed together; recomputed: layers whose forward "
                "runs twice, to save memory; offloaded: kept in host memory until backward"
            )
    gguf = f", {result['gguf_gb']} GB to make the GGUF file" if result["gguf_gb"] else ""
    download = f", {result['download_gb']} GB to download the base" if result["download_gb"] else ""
    disk = f"{result['disk_gb']} GB for checkpoints and export, of it {result['export_gb']} GB merged"
    out.append(f"disk        {disk}{gguf}{download}")
    out.append(f"export      about {result['export_ram_gib']} GiB of RAM")
    out += result["advice"]
    return [part for line in out for part in textwrap.wrap(line, 80, subsequent_indent=" " * 12)]


def _steps(result: dict[str, Any]) -> str:
    if result["steps"] is None:
        return f"no known end, {result['steps_per_epoch']:,} optimizer steps an epoch"
    return plural(result["steps"], "optimizer step")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "as long as trainer.max_time"
    return str(timedelta(seconds=round(seconds))) if seconds >= 1 else f"{seconds:.2f} s"
