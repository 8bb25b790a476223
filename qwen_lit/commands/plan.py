"""See before you spend: the heaviest real batch through every part of a run, or the arithmetic where no GPU is."""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import PeftModel

from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.callbacks.checkpoint_io import step_files
from qwen_lit.callbacks.export import Export
from qwen_lit.callbacks.metrics import per_card
from qwen_lit.commands.plan_advice import advice
from qwen_lit.commands.plan_reference import reference
from qwen_lit.commands.plan_text import lines
from qwen_lit.commands.plan_trial import NEVER, STEPS, StepTimer, products_told, trial
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.distributed import gathered
from qwen_lit.engine.footprint import layer_sizes
from qwen_lit.engine.supported import unsupported_reason
from qwen_lit.errors import UserError
from qwen_lit.export.adapter import CHUNK_ELEMENTS, RESIDUAL_INITS
from qwen_lit.export.kquants import gguf_bytes
from qwen_lit.families.table import family_of
from qwen_lit.frozen.loading import BESIDE
from qwen_lit.frozen.quantize import layouts_of
from qwen_lit.hub import is_folder, missing_bytes, stored_bytes
from qwen_lit.model.coverage import coverage, left_out
from qwen_lit.model.duration import check_limits, epoch_share, epoch_steps, total_steps
from qwen_lit.model.load import empty_model, put_adapter
from qwen_lit.model.module import QwenModule
from qwen_lit.model.probe import estimated
from qwen_lit.planner.explain import explain
from qwen_lit.planner.flops import measured_flops, token_flops
from qwen_lit.planner.host import HostProfile
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import GIB, Plan
from qwen_lit.planner.planner import possible_at_once
from qwen_lit.planner.search import choose
from qwen_lit.planner.speed import time_of
from qwen_lit.prequantized import own_quantization
from qwen_lit.quantization import Held, base_name
from qwen_lit.run import Run
from qwen_lit.seams import options_of

CARDS = (4, 8, 12, 16, 24, 40, 80)
"""GiB for which the arithmetic answers when no budget is given."""


def plan(
    trainer: L.Trainer,
    module: QwenModule,
    data: QwenDataModule,
    exporter: Export,
    as_json: bool,
    explained: bool = False,
) -> int:
    """Print the answer; returns the exit code, 1 where the run fits no card.

    Args:
        trainer: with the limits of the run; on a GPU it trains a few steps.
        module: that would be trained; its model is not loaded.
        data: it would be trained on; nothing of it is prepared yet.
        exporter: what would be exported.
        as_json: print JSON instead of lines.
        explained: add the table behind the plan.
    """
    data.prepare_data()
    data.setup()
    check_limits(trainer, data)
    on_gpu = trainer.strategy.root_device.type == "cuda"
    result = (measure if on_gpu else arithmetic)(trainer, module, data, exporter, explained)
    # Every rank has come to the same.
    if trainer.is_global_zero:
        print("\n".join([json.dumps(result, indent=1)] if as_json else lines(result)))
    return 1 if not result["measured"] and not result["fits"] else 0


def arithmetic_model(module: QwenModule) -> PeftModel:
    """The PEFT model without weights, on the meta device."""
    base = empty_model(module.config, torch.bfloat16)
    with torch.device("meta"):
        return put_adapter(base, module.lora_config)


def static_bytes(model: PeftModel, held: Mapping[str, Held]) -> int:
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


def common(
    trainer: L.Trainer,
    module: QwenModule,
    data: QwenDataModule,
    model: PeftModel,
    largest_batch: int,
    exporter: Export,
) -> dict[str, Any]:
    """What is known without a GPU: steps, tokens, disk and memory for the export."""
    rows = data.train_rows
    assert rows is not None
    lengths, supervised = rows.column("length"), rows.column("supervised")
    tokens, of_epoch = int(lengths.sum()), epoch_steps(trainer, data)
    steps = total_steps(trainer, data)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoint = trained * (4 + module.state_bytes)
    weights = 2 * sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    # Beside the language model the files may hold a vision tower and more, which is written back with it.
    merged = max(weights, stored_bytes(module.folder))
    largest = max(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    gguf = exporter.gguf if exporter.merge else None
    file = gguf_bytes(gguf, weights // 2) if gguf else 0
    held = module.held_weights(trainer.strategy.root_device)
    stored = weights if own_quantization(module.config) is None else static_bytes(model, held) - 4 * trained
    download = 0 if is_folder(module.name) else missing_bytes(module.folder, stored)
    download += exporter.original_bytes(weights, module)
    kept = kept_bytes(module, held, trainer.strategy.root_device)
    keep = exporter.saver.keep
    share = float(supervised.sum() / max(1, tokens))
    length = float((lengths.astype(float) ** 2).sum() / max(1, tokens))
    return {
        "adapter": str(coverage(model)),
        "left_out": left_out(model, module.lora_config),
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
        "disk_gb": round((checkpoint * (keep + 1) + 4 * trained + merged + file + download + kept) / 1e9, 2),
        "base_cache_gb": round(kept / 1e9, 2),
        "download_gb": round(download / 1e9, 2),
        "export_gb": round(merged / 1e9, 2),
        "gguf_gb": round(file / 1e9, 2),
        # The tensor in the making, one block of it in float32, and the adapter.
        "export_ram_gib": round((2 * largest + 8 * min(largest, CHUNK_ELEMENTS) + 4 * trained) / GIB + 0.6, 2),
    }


def kept_bytes(module: QwenModule, held: Mapping[str, Held], device: torch.device) -> int:
    """Bytes of the file that keeps the base quantised.

    Args:
        module: with the settings.
        held: how the base's weights will be held.
        device: of the run.
    """
    cache = module.settings.base_cache
    if cache is None or (cache == "auto" and device.type != "cuda") or own_quantization(module.config) is not None:
        return 0
    return sum(layout.size for layout in layouts_of(module.config, held) or ())


def arithmetic(
    trainer: L.Trainer, module: QwenModule, data: QwenDataModule, exporter: Export, explained: bool = False
) -> dict[str, Any]:
    """Plans from the shapes alone, for one budget or for usual cards.

    Args:
        trainer: of the run.
        module: that would be trained.
        data: that it would be trained on, prepared.
        exporter: what would be exported.
        explained: add the table behind each plan that fits.

    Raises:
        UserError: ``model.engine`` is fast, and the model does not allow it.
    """
    model, budget = arithmetic_model(module), module.memory_budget
    held = module.held_weights(trainer.strategy.root_device)
    static = static_bytes(model, held)
    sizes, mean = data.most_tokens(possible_at_once(options_of(trainer).micro_batches_per_step)), data.mean_tokens()
    result = common(trainer, module, data, model, sizes[1], exporter)
    reason = reference_because(module, model, held)
    if reason and module.settings.engine == "fast":
        raise UserError(f"model.engine is fast, but {reason}; set it to auto.")
    engine = f"reference ({reason})" if reason else "fast"
    result |= {"measured": False, "engine": engine, "weights_gib": round(static / GIB, 2)}
    if reason:
        return result | {"plans": [], "advice": []} | reference(module, data, model, static, CARDS)
    planned = planned_memory(module, model, held)
    plans = []
    for size in [budget] if budget else [card * GIB for card in CARDS]:
        # Without a cache, a base for which there is room is loaded as a whole, where one rank alone reads it.
        alone = module.settings.base_cache is None and trainer.num_devices == 1
        whole = alone and static + BESIDE <= size
        memory = replace(planned, blocks=()) if whole else planned
        plan = choose(memory, static, size, sizes, HostProfile(processes=trainer.num_devices), mean=mean)
        plans.append(as_dict(plan) | {"fits": plan.fits, "relative_time": round(time_of(plan, mean, memory), 3)})
        if explained and plan.fits:
            plans[-1]["explained"] = explain(
                memory, plan, static, sizes[plan.micro_batches_at_once], trainer.num_devices
            )
    result |= {"plans": plans, "fits": any(one["fits"] for one in plans)}
    return result | {"advice": advice(trainer, memory, static, plan, sizes, mean, module, data, model, static_bytes)}


def planned_memory(module: QwenModule, model: PeftModel, held: Mapping[str, Held]) -> ModelMemory:
    """What the model takes while it trains, by how its weights will be held.

    Args:
        module: with the settings.
        model: of ``arithmetic_model``.
        held: how the base's weights will be held.
    """
    products = estimated(module.products, layer_sizes(model))
    memory = ModelMemory.of(model, module.state_bytes, held, products, module.settings.kept)
    start = str(module.lora_config.init_lora_weights).lower()
    # A base that is quantised in its files is held as they are; one that the adapter's start changes, as it is then.
    streams = own_quantization(module.config) is None and not start.startswith(RESIDUAL_INITS)
    return memory if streams else replace(memory, blocks=())


def reference_because(module: QwenModule, model: PeftModel, held: Mapping[str, Held]) -> str | None:
    """Why ``fit`` will run PEFT's own path on a GPU; None where the fast engine will run.

    Args:
        module: with the settings.
        model: of ``arithmetic_model``.
        held: how the base's weights will be held.
    """
    if module.settings.engine == "reference":
        return "as model.engine says"
    for name, one in held.items():
        if one.kind == "int8" or name.startswith(family_of(module.config).head):
            return f"{name.removesuffix('.weight')} is held in {one}"
    return unsupported_reason(model, torch.device("meta"))


def measure(
    trainer: L.Trainer, module: QwenModule, data: QwenDataModule, exporter: Export, explained: bool = False
) -> dict[str, Any]:
    """Forward, backward, update, validation and a checkpoint on the heaviest real batches, on the GPU.

    Args:
        trainer: of the run.
        module: that would be trained.
        data: that it would be trained on, prepared.
        exporter: what would be exported.
        explained: add the table behind the plan.

    Raises:
        torch.OutOfMemoryError: it does not fit, in the first minute instead of the fifth hour.
    """
    device = trainer.strategy.root_device
    model = arithmetic_model(module)
    sizes, mean = data.most_tokens(possible_at_once(options_of(trainer).micro_batches_per_step)), data.mean_tokens()
    result = common(trainer, module, data, model, sizes[1], exporter)
    limit = measured_flops(device)
    timer = StepTimer()
    # Beside the run's own checkpoints, so that it is their disk that is timed.
    home = exporter.run.output_dir
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qwen_lit_plan_", dir=home) as folder:
        checkpoint = RunCheckpoint(Run(Path(folder)), every_n_train_steps=NEVER)
        torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        trial(trainer, [timer, checkpoint], min(STEPS, result["steps"] or STEPS)).fit(module, data.largest_first())
        result["minutes_to_plan"] = round((time.perf_counter() - started) / 60, 2)
        # Rank 0 alone writes one; elsewhere its size is known from the shapes.
        for file in step_files(checkpoint.run.checkpoints)[:1]:
            result["checkpoint_mb"] = round(file.stat().st_size / 1e6, 1)
    timed = list(zip(timer.tokens, timer.seconds, strict=True))
    steady = sorted(tokens / seconds for tokens, seconds in timed[1:] or timed)
    cards = trainer.world_size
    # Ranks wait for each other in each step, so their clocks agree, and their tokens add up.
    speed = sum(gathered(trainer, steady[len(steady) // 2]))
    bound = cards * limit / result["flops_per_token"]
    of_step = result["tokens_per_step"] / speed
    plan = module.plan
    result |= {
        "measured": True,
        "device": torch.cuda.get_device_name(device),
        "engine": module.engine_description,
        "measured_peak_gib": round(timer.peak / GIB, 2),
        "cards": cards,
        "tokens_per_second": round(speed),
        **{name: round(rate) for name, rate in per_card(speed, cards).items()},
        "card_tflops": round(limit / 1e12),
        "limit_tokens_per_second": round(bound),
        "share_of_limit": round(speed / bound, 3),
        "first_step_seconds": round(timer.seconds[0], 2),
        "validation_seconds": round(timer.validation, 2),
        "checkpoint_stall_seconds": round(checkpoint.stalled, 3),
        "epoch_seconds": round(result["steps_per_epoch"] * of_step),
        "run_seconds": round(result["steps"] * of_step) if result["steps"] else None,
        "advice": [],
    }
    if module.products.told:
        result["products"] = products_told(module, timer.fidelity)
    held = module.held_weights(device)
    static = static_bytes(model, held)
    if plan is None:
        result |= reference(module, data, model, static, CARDS)
    else:
        memory = planned_memory(module, model, held)
        result |= as_dict(plan)
        result["advice"] = advice(trainer, memory, static, plan, sizes, mean, module, data, model, static_bytes)
        if explained:
            result["explained"] = explain(memory, plan, static, sizes[plan.micro_batches_at_once], trainer.num_devices)
    return result


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan in plain numbers."""
    policies = plan.policies
    return {
        "budget_gib": round(plan.budget / GIB, 2),
        "estimated_peak_gib": round(plan.estimate / GIB, 2),
        "micro_batches_at_once": plan.micro_batches_at_once,
        "recomputed_layers": policies.recomputed,
        "embedding_on_cpu": policies.offload_embedding,
        "inputs_offloaded": policies.offload_inputs,
        "layers_offloaded": policies.offloaded,
        "mlp_piece_tokens": policies.mlp_piece,
        "layers_packed": policies.packed,
        "layers_held_in_bf16": len(policies.resident),
        "layers_streamed": len(policies.streamed),
        "head_on_host": policies.offload_head,
        "graph_tokens": plan.graph_tokens,
        "host_memory_gib": round(plan.host / GIB, 2),
    }
