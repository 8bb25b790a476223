"""What plan has found, in lines of at most 80 columns."""

import re
import textwrap
from datetime import timedelta
from typing import Any

from qwen_lit.commands.plan_advice import COMMAND
from qwen_lit.lines import plural
from qwen_lit.model.products import in_words
from qwen_lit.planner.explain import table_lines
from qwen_lit.planner.plan import GIB


def lines(result: dict[str, Any]) -> list[str]:
    """The answer in lines of at most 80 columns."""
    out = [
        f"data        {plural(result['rows'], 'row')}, {result['tokens_per_epoch']:,} tokens an epoch, "
        f"{result['supervised_share']:.0%} supervised",
        *(f"not trained {line}" for line in result["lost"]),
        f"run         {_steps(result)}, about {result['tokens_per_step']:,} tokens each",
        f"adapter     {result['adapter']}",
        *[f"            {result['left_out']}"] * bool(result["left_out"]),
    ]
    if result["measured"]:
        out.append(f"card        {result['device']}, {result['card_tflops']} TFLOP/s in a large product")
        out.append(f"engine      {result['engine']}")
        if "products" in result:
            out.append(f"products    {_products(result['products'])}")
        if "budget_gib" in result:
            out.append(
                f"memory      estimated {result['estimated_peak_gib']:.2f} GiB, measured "
                f"{result['measured_peak_gib']:.2f}, of {result['budget_gib']:.2f} GiB"
            )
            if result["host_memory_gib"]:
                out.append(f"host        {_host(result)}")
        else:
            out.append(f"memory      {_estimate(result)}, measured {result['measured_peak_gib']:.2f}")
            out += _loops(result)
        out += [
            f"speed       {speed_of(result)}, {result['share_of_limit']:.0%} of the "
            f"{result['limit_tokens_per_second']:,} {cards_of(result)} can do",
            f"time        an epoch {_time(result['epoch_seconds'])}, the run {_time(result['run_seconds'])}, "
            f"a validation {_time(result['validation_seconds'])}",
            f"checkpoint  {result['checkpoint_mb']} MB, training waits {result['checkpoint_stall_seconds']:.3f} s",
        ]
    else:
        out.append("no GPU is seen: this is arithmetic from the shapes, not a measurement")
        out.append(f"engine      on a GPU {result['engine']}")
        if not result["plans"]:
            card = f"a card of {result['fits_gib']:.0f} GiB has room" if result["fits"] else "which does not fit"
            out.append(f"memory      {_estimate(result)}; {card}")
            out += _loops(result)
        for plan in result["plans"]:
            how = f"{plan['micro_batches_at_once']} at once, {plan['recomputed_layers']} layers recomputed"
            how += f", {plan['layers_streamed']} streamed" * (plan["layers_streamed"] > 0)
            how += ", embedding on the CPU" * plan["embedding_on_cpu"]
            how += ", lm_head on the CPU" * plan["head_on_host"]
            how += ", inputs offloaded" * plan["inputs_offloaded"]
            how += f", {plan['layers_offloaded']} layers offloaded" * (plan["layers_offloaded"] > 0)
            how += f", MLP in pieces of {plan['mlp_piece_tokens']}" * (plan["mlp_piece_tokens"] > 0)
            how += f", {plan['layers_packed']} keep gate and up in 8 bits" * (plan["layers_packed"] > 0)
            how += f", CUDA graphs up to {plan['graph_tokens']} tokens" * (plan["graph_tokens"] > 0)
            how += f", {plan['host_memory_gib']:.1f} GiB of RAM" * (plan["host_memory_gib"] > 0)
            fits = how if plan["fits"] else "does not fit"
            out.append(f"{plan['budget_gib']:>7.2f} GiB  peak {plan['estimated_peak_gib']:>6.2f}  {fits}")
        if result["plans"]:
            out.append(
                "            at once: micro-batches of a step computed together; recomputed: layers whose forward "
                "runs twice, to save memory; streamed: layers whose weights wait in host memory; offloaded: what "
                "layers keep there until backward"
            )
    gguf = f", {result['gguf_gb']} GB to make the GGUF file" if result["gguf_gb"] else ""
    download = f", {result['download_gb']} GB to download the base" if result["download_gb"] else ""
    disk = f"{result['disk_gb']} GB for checkpoints and export, of it {result['export_gb']} GB merged"
    kept = f", {result['base_cache_gb']} the quantised base" if result["base_cache_gb"] else ""
    out.append(f"disk        {disk}{gguf}{kept}{download}")
    out.append(f"export      about {result['export_ram_gib']} GiB of RAM")
    out += result["advice"]
    tables = [one["explained"] for one in (result, *result.get("plans", [])) if "explained" in one]
    wrapped = [part for line in out for part in _wrapped(line)]
    return wrapped + [line for table in tables for line in table_lines(table)]


def _wrapped(line: str) -> list[str]:
    """A line in parts of at most 80 columns; those of a command can be typed as they are."""
    if not line.startswith(COMMAND):
        return textwrap.wrap(line, 80, subsequent_indent=" " * 12)
    parts, words = [line.split(" ", 1)[0]], re.split(r" (?=--)", line.split(" ", 1)[1])
    for word in words:
        if len(f"{parts[-1]} {word}") > 78 and parts[-1].strip():
            parts.append(f"   {word}")
        else:
            parts[-1] += f" {word}"
    return [f"{part} \\" for part in parts[:-1]] + parts[-1:]


def _estimate(result: dict[str, Any]) -> str:
    """The estimate for PEFT's own path, and its largest parts."""
    parts = sorted(result["parts_bytes"].items(), key=lambda part: -part[1])
    said = [f"{name} {size / GIB:.2f}" for name, size in parts if size > result["estimated_peak_gib"] * GIB / 50]
    return f"estimated {result['estimated_peak_gib']:.2f} GiB ({'; '.join(said)})"


def _host(result: dict[str, Any]) -> str:
    """What waits in the host's memory, and how much that is."""
    streamed = result["layers_streamed"]
    there = [f"{plural(streamed, 'layer')} streamed from there"] * bool(streamed)
    there += ["the embedding"] * result["embedding_on_cpu"] + ["lm_head"] * result["head_on_host"]
    there += ["what layers keep until backward"] * (result["layers_offloaded"] > 0 or result["inputs_offloaded"])
    return f"{result['host_memory_gib']:.2f} GiB of RAM: {', '.join(there)}"


def speed_of(result: dict[str, Any]) -> str:
    """Tokens a second of the run, and those of a card where there are several."""
    each = result.get("tokens_per_second_per_card")
    return f"{result['tokens_per_second']:,} tokens/s" + ("" if each is None else f" ({each:,} a card)")


def cards_of(result: dict[str, Any]) -> str:
    """The card of the run, or its cards."""
    return "this card" if result["cards"] == 1 else f"these {result['cards']} cards"


def _products(found: dict[str, Any]) -> str:
    """What products are computed in, and how near the gradient is to that in bf16."""
    if "cosine" not in found:
        return str(found["told"])
    below = ", which is below it: a run would go on in bf16" * (not found["cosine"] >= found["floor"])
    gradient = in_words(found["cosine"], found["error"])
    return f"{found['told']}: the gradient of a micro-batch has {gradient}; the floor is {found['floor']:g}{below}"


def _loops(result: dict[str, Any]) -> list[str]:
    """What linear attention costs without its package."""
    if not result["chunk_loops"]:
        return []
    return [
        f"slow        {plural(result['chunk_loops'], 'layer')} of linear attention loop over chunks of 64 tokens in "
        "float32, as flash-linear-attention is not installed"
    ]


def _steps(result: dict[str, Any]) -> str:
    if result["steps"] is None:
        return f"no known end, {result['steps_per_epoch']:,} optimizer steps an epoch"
    return plural(result["steps"], "optimizer step")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "as long as trainer.max_time"
    return str(timedelta(seconds=round(seconds))) if seconds >= 1 else f"{seconds:.2f} s"
