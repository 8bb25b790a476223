"""Tokens a second and peak memory of training steps, for this project and its peers, one process for each case.

    python benchmarks/train.py MODEL [--cases CASE,...] [--peers trl,unsloth] [--json OUT]

MODEL is a folder with a checkpoint of the shape to measure and a tokenizer; random weights will do. Each case trains
the same number of tokens a step: 16,384, every token supervised unless it says otherwise. A peer runs beside each case
where it is installed; ``rows``, ``peer_tokens`` and ``peer_recompute`` are its hand tuning. ``memory`` limits the
process to so many GiB.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*QKVO, "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "shipped": {"dropout": 0.1},
    "dropout 0": {"rows": 8, "peer_recompute": False},
    "dropout 0, 40 GiB": {"memory": 40, "rows": 4, "peer_recompute": False},
    "all linears": {"targets": ALL, "rows": 4, "peer_recompute": False},
    "24 GiB": {"memory": 24, "rows": 2, "peer_recompute": False},
    "16 GiB": {"memory": 16, "peer_recompute": False},
    "8 GiB": {"memory": 8, "rows": 4},
    "8 GiB, one row": {"memory": 8},
    "least memory": {"memory": 5.6, "tokens": 2048, "steps": 3},
    "longest row, 8 GiB": {"memory": 8, "longest": 32_000, "tokens": 32_000, "steps": 1},
    "longest row, 24 GiB": {"memory": 24, "longest": 120_000, "tokens": 120_000, "steps": 1},
    "longest row, 80 GiB": {"longest": 343_000, "tokens": 343_000, "steps": 1},
    "length mix": {"mix": True, "rows": 8, "peer_tokens": 32_768},
    "length mix, 24 GiB": {"mix": True, "memory": 24, "rows": 8, "peer_tokens": 32_768},
}


def documents(case: dict[str, Any], count: int, longest: int) -> list[tuple[Any, Any]]:
    """Random documents: of ``longest`` tokens each, or log-normal with a median of 300 and 60 % supervised."""
    import numpy as np

    draw = np.random.default_rng(1)
    if case.get("mix"):
        lengths = np.exp(draw.normal(5.7, 0.8, count)).astype(int).clip(30, longest)
    else:
        lengths = np.full(count, longest)
    begins = (0.4 * lengths).astype(int) if case.get("mix") else np.zeros(count, dtype=int)
    pairs = zip(lengths.tolist(), begins.tolist(), strict=True)
    return [(draw.integers(0, 150_000, n), np.array([[begin, n]])) for n, begin in pairs]


def ours(model_path: str, case: dict[str, Any]) -> dict[str, Any]:
    """Steps of the fast engine with the plan it makes for the memory it has."""
    from dataclasses import replace

    # Before torch, whose allocator it sets.
    # isort: off
    import qwen_lit  # noqa: F401
    import torch

    # isort: on
    import numpy as np
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from qwen_lit.data.batches import collate
    from qwen_lit.data.packing import best_fit
    from qwen_lit.engine.engine import FastEngine, unsupported_reason
    from qwen_lit.model.load import add_adapter, load_base
    from qwen_lit.model.optim import OPTIMIZERS
    from qwen_lit.planner.measure import free_memory, measure_host
    from qwen_lit.planner.memory import ModelMemory
    from qwen_lit.planner.plan import GIB
    from qwen_lit.planner.planner import apply, possible_at_once
    from qwen_lit.planner.search import choose

    device = torch.device("cuda:0")
    if "memory" in case:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case["memory"] * GIB / total)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    base = load_base(model_path, quantization, device)
    lora = LoraConfig(
        r=32, lora_alpha=64, lora_dropout=case.get("dropout", 0.0), target_modules=case.get("targets", QKVO)
    )
    model = add_adapter(base, lora, False)
    load_peak = torch.cuda.max_memory_allocated()
    reason = unsupported_reason(model, device)
    if reason:
        raise SystemExit(reason)
    longest, step_tokens = case.get("longest", 2048), case.get("tokens", 16_384)
    budget = min(free_memory(device), int(case["memory"] * GIB) if "memory" in case else 2**62)
    sizes = {n: n * longest for n in possible_at_once(step_tokens // longest)}
    memory = ModelMemory.of(model, 2)
    static = torch.cuda.memory_allocated()
    few: Any = collate([(np.zeros(16), np.array([[0, 16]]))], 0)
    few = {key: value.to(device) if hasattr(value, "to") else value for key, value in few.items()}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        machine = measure_host(FastEngine(model), memory, few, 1)
    machine = replace(machine, **{key: case[key] for key in ("share", "launch") if key in case})
    torch.cuda.empty_cache()
    plan = choose(memory, static, budget, sizes, machine)
    engine = apply(plan, model)
    steps, per_step = case.get("steps", 6), step_tokens // longest
    docs = documents(case, 4096 if case.get("mix") else steps * per_step, longest)
    packs = best_fit([len(ids) for ids, _ in docs], longest) if case.get("mix") else [[n] for n in range(len(docs))]
    parts = []
    for begin in range(0, steps * per_step, per_step):
        cuts = range(begin, begin + per_step, plan.micro_batches_at_once)
        groups = [sum(packs[at : min(at + plan.micro_batches_at_once, begin + per_step)], []) for at in cuts]
        parts.append([collate([docs[n] for n in group], 0) for group in groups])
    groups_of = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 2e-4}]
    optimizer = OPTIMIZERS["paged_adamw_8bit"].build(groups_of, (0.9, 0.999))
    seconds, losses, tokens = [], [], []

    def train(part: list[Any]) -> torch.Tensor:
        total, supervised = torch.zeros((), device=device), sum(batch["targets"].numel() for batch in part)
        for batch in part:
            moved: Any = {k: v.to(device, non_blocking=True) if hasattr(v, "to") else v for k, v in batch.items()}
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = engine.loss_sum(moved) / supervised
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    for step in range(steps):
        torch.cuda.synchronize()
        started, part = time.perf_counter(), parts[step]
        total_loss = train(part)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(round(float(total_loss), 4))
        tokens.append(sum(batch["tokens"] for batch in part))
        if step == 0 and steps > 1:
            torch.cuda.reset_peak_memory_stats()
        if case.get("profile") and step == steps - 2:
            profile(lambda: train(part))  # noqa: B023
    first = 1 if steps > 1 else 0
    rates = sorted(n / s for n, s in zip(tokens[first:], seconds[first:], strict=True))
    return {
        "tokens_per_second": round(rates[len(rates) // 2]),
        "first_step_s": round(seconds[0], 1),
        "losses": losses[:3],
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "estimate_gib": round(plan.estimate / GIB, 2),
        "micro_batches_at_once": plan.micro_batches_at_once,
        "recompute": plan.policies.recomputed,
        "chunk": plan.policies.loss_chunk,
        "offload_embedding": plan.policies.offload_embedding,
        "offload_inputs": plan.policies.offload_inputs,
        "piece": plan.policies.mlp_piece,
        "offload_activations": plan.policies.offloaded,
        "share": machine.share,
        "launch": machine.launch,
        "resident": len(plan.policies.resident),
        "load_gib": round(load_peak / GIB, 2),
    }


def profile(step: Any) -> None:
    """Print the kernels of one optimizer step by their time on the device, and how long it had nothing to do."""
    import torch

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


def trl(model_path: str, case: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer over PEFT, eight rows of 2048 one at a time, recomputing all layers."""
    return _sft(model_path, case, "trl")


def unsloth(model_path: str, case: dict[str, Any]) -> dict[str, Any]:
    """The same over Unsloth's model and its offloaded checkpoints."""
    return _sft(model_path, case, "unsloth")


def _sft(model_path: str, case: dict[str, Any], peer: str) -> dict[str, Any]:
    if peer == "unsloth":
        from unsloth import FastLanguageModel
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if "memory" in case:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case["memory"] * 2**30 / total)
    rows, recompute, steps = case.get("rows", 1), case.get("peer_recompute", True), case.get("steps", 6)
    tokens = case.get("peer_tokens", case.get("tokens", 16_384))
    accumulate = tokens // 2048 // rows
    targets, dropout = case.get("targets", QKVO), case.get("dropout", 0.0)
    lora = {"r": 32, "lora_alpha": 64, "lora_dropout": dropout, "target_modules": targets, "bias": "none"}
    config: Any = None
    if peer == "unsloth":
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_path, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True
        )
        checkpointing = "unsloth" if recompute else False
        model = FastLanguageModel.get_peft_model(
            model, use_gradient_checkpointing=checkpointing, random_state=0, **lora
        )
    else:
        from peft import LoraConfig

        tokenizer = AutoTokenizer.from_pretrained(model_path)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_path, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
        )
        config = LoraConfig(task_type="CAUSAL_LM", **lora)
    docs = documents(case, steps * accumulate * rows, 2048)
    data = Dataset.from_list(
        [
            {
                "input_ids": ids.tolist(),
                "attention_mask": [1] * len(ids),
                "labels": [-100] * int(span[0, 0]) + ids[span[0, 0] :].tolist(),
            }
            for ids, span in docs
        ]
    )
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **options: Any) -> None:
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)
            if len(seconds) == 1:
                torch.cuda.reset_peak_memory_stats()

    def pad(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        width = max(len(one["input_ids"]) for one in batch)
        fill = {"input_ids": tokenizer.eos_token_id, "attention_mask": 0, "labels": -100}
        return {
            key: torch.tensor([one[key] + [value] * (width - len(one[key])) for one in batch])
            for key, value in fill.items()
        }

    settings = SFTConfig(
        output_dir="/tmp/benchmark",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=2e-4,
        bf16=True,
        optim="paged_adamw_8bit",
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        max_length=2048,
        packing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[Clock()],
        data_collator=pad,
    )
    trainer.train()
    counts = [
        sum(len(ids) for ids, _ in docs[n : n + accumulate * rows]) for n in range(0, len(docs), accumulate * rows)
    ]
    rates = sorted(n / s for n, s in zip(counts[1:], seconds[1:], strict=False))
    losses = [round(one["loss"], 4) for one in trainer.state.log_history if "loss" in one]
    return {
        "tokens_per_second": round(rates[len(rates) // 2]),
        "first_step_s": round(seconds[0], 1),
        "losses": losses[:3],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


RUNNERS = {"qwen_lit": ours, "trl": trl, "unsloth": unsloth}


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of one table: ours of each case, and beside it each peer with how many times as fast ours is.

    Args:
        results: as the runners give them, with ``case`` and ``runner``; those of one case follow its own.
    """
    out = [
        "| case | runner | tokens/s | peak GiB | estimate GiB | first step s | ours is |",
        "|---|---|---|---|---|---|---|",
    ]
    ours: dict[str, Any] = {}
    for one in results:
        ours = one if one["runner"] == "qwen_lit" else ours
        if "error" in one:
            told = one["error"].strip().splitlines()
            out.append(f"| {one['case']} | {one['runner']} | failed: {told[-1][:80] if told else ''} | | | | |")
            continue
        speed, theirs = ours.get("tokens_per_second"), one["tokens_per_second"]
        ratio = f"{speed / theirs:.2f} x" if speed and one is not ours else ""
        out.append(
            f"| {one['case']} | {one['runner']} | {theirs:,} | {one['peak_gib']:.2f} | "
            f"{one.get('estimate_gib', '')} | {one['first_step_s']} | {ratio} |"
        )
    return out


def main() -> int:
    """Run every case in a process of its own; print a line for each as it ends, and one table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", default=";".join(CASES), help="names of cases, or JSON objects, parted by ;")
    parser.add_argument("--peers", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, case = given.one.split(":", 1)
        print("RESULT " + json.dumps(RUNNERS[name](given.model, json.loads(case))), flush=True)
        return 0
    results = []
    for name in given.cases.split(";"):
        case = CASES[name] if name in CASES else json.loads(name)
        for runner in ["qwen_lit", *filter(None, given.peers.split(","))]:
            command = [sys.executable, __file__, given.model, "--one", f"{runner}:{json.dumps(case)}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            found = json.loads(lines[-1][7:]) if lines else {"error": (done.stderr or done.stdout)[-600:]}
            if case.get("profile"):
                print(done.stdout)
            results.append({"case": name, "runner": runner, **found})
            print(json.dumps(results[-1]), flush=True)
    print("\n".join(table(results)))
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
