"""The run as one page that needs nothing else: curves, samples before and after, data, verdict, configuration."""

import html
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from qwen_lit.lines import chat_turns, duration, start_lines
from qwen_lit.names import hub_name
from qwen_lit.page import render

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 480, 230, 66, 30, 12


def page(summary: dict[str, Any]) -> str:
    """``report.html`` of a run.

    Args:
        summary: as ``RunReport.summary`` makes it.
    """
    run, history, best = summary["run"], summary["history"], summary["best"]
    curves = [
        chart("Loss", {"training": history.get("loss", []), "validation": history.get("val_loss", [])}, best),
        chart("Learning rate", {"": history.get("lr", [])}),
        chart("Tokens a second", {"": history.get("tokens_per_second", [])}),
        chart("Gradient norm", {"": history.get("grad_norm", [])}),
    ]
    model, out = hub_name(run["model"]) or Path(run["model"]).name, summary["output_dir"]
    hardware, day = summary["hardware"], datetime.fromisoformat(summary["ended"])
    about = [
        f"{day:%Y-%m-%d %H:%M}",
        f"took {duration(summary['trained_seconds'])} of training",
        f"{hardware['count']}\u00a0×\u00a0{hardware['name']}",
        out,
    ]
    lines = start_lines(run, out)
    return render(
        "report.html.jinja",
        title=f"{Path(out).name}: training report, {day:%Y-%m-%d}",
        heading=f"{Path(out).name}: {model}",
        about=" · ".join(about),
        trained=lines["trained"],
        figures=figures(summary),
        curves=[one for one in curves if one],
        samples=samples(summary["samples"]),
        verdict=verdict(summary),
        export=summary["export"],
        sections={
            "Data": _named(summary["data"]),
            "Run": {**lines, **times(summary)},
            "Throughput": _named(summary["throughput"]),
            "Machine and versions": machine(summary),
        },
        config=yaml.safe_dump(summary["config"], allow_unicode=True, sort_keys=False),
    )


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): percent(name, value) for name, value in values.items()}


def figures(summary: dict[str, Any]) -> dict[str, str]:
    """What is looked for first."""
    last, best, speed = summary["last"], summary["best"], summary["throughput"]
    shown = {"optimizer steps": f"{summary['steps']:,}"}
    if "loss" in last:
        shown["training loss, last"] = f"{last['loss']:.4f}"
    if "val_loss" in last:
        shown["validation loss, last"] = f"{last['val_loss']:.4f}"
        shown["perplexity, last"] = f"{math.exp(min(last['val_loss'], 50)):,.2f}"
    if best:
        shown[f"best validation, step {best['step']:,}"] = f"{best['val_loss']:.4f}"
    if made := summary["exported"]:
        shown["step that is exported"] = f"{made['step']:,}"
    shown["of training"] = duration(summary["trained_seconds"])
    if "tokens_per_second" in speed:
        shown["tokens a second"] = f"{speed['tokens_per_second']:,.0f}"
    if "peak_memory_gib" in speed:
        shown["GiB of GPU memory, peak"] = f"{speed['peak_memory_gib']:.2f}"
    if summary["stopped"]:
        shown["trained prompts that stop"] = "{} of {}".format(*summary["stopped"])
    shown["steps skipped"] = f"{summary['skipped_steps']:,}"
    return shown


def chart(title: str, curves: dict[str, list[list[float]]], best: dict[str, Any] | None = None) -> str:
    """A line chart as inline SVG; nothing for curves without points.

    Args:
        title: of the figure.
        curves: name to points ``[step, value]``, at most two curves.
        best: ``step`` and ``val_loss`` of a point to mark.
    """
    curves = {name: [p for p in points if math.isfinite(p[1])] for name, points in curves.items()}
    curves = {name: points for name, points in curves.items() if points}
    everything = [point for points in curves.values() for point in points]
    if not everything:
        return ""
    first, last = min(p[0] for p in everything), max(p[0] for p in everything)
    low, high, ticks = scale(min(p[1] for p in everything), max(p[1] for p in everything))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 16) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    drawn = [
        f"<line class=rule x1={LEFT} x2={WIDTH - 16} y1={y(t):.1f} y2={y(t):.1f} />"
        f"<text x={LEFT - 8} y={y(t) + 5:.1f} text-anchor=end>{number(t)}</text>"
        for t in ticks
    ]
    for step in sorted({first, (first + last) / 2, last}):
        anchor = "end" if step == last > first else "middle"
        drawn.append(f"<text x={x(step):.1f} y={HEIGHT - 8} text-anchor={anchor}>{step:,.0f}</text>")
    keys = ""
    for (name, points), colour in zip(curves.items(), ("one", "two"), strict=False):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        drawn.append(f'<polyline class={colour} points="{path}" />')
        if len(points) < 30:
            drawn += [f'<circle class="dot {colour}" cx={x(s):.1f} cy={y(v):.1f} r=2.5 />' for s, v in points]
        keys += f'<span class=key><i style="background:var(--{colour})"></i>{html.escape(name)}</span>' if name else ""
    if best and first <= best["step"] <= last and low <= best["val_loss"] <= high:
        drawn.append(f"<circle class=best cx={x(best['step']):.1f} cy={y(best['val_loss']):.1f} r=6 />")
        keys += f'<span class=key><i style="background:var(--good)"></i>best, step {best["step"]:,}</span>'
    title, size = html.escape(title), f"0 0 {WIDTH} {HEIGHT}"
    figure = f'<svg viewBox="{size}" role=img aria-label="{title}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{title}{keys}</figcaption>{figure}</figure>"


def scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round bounds around the values, and four to eight ticks."""
    if high <= low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, last * step, [n * step for n in range(first, last + 1)]


def number(value: float) -> str:
    """A tick, short."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 0.001:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def percent(name: str, value: Any) -> Any:
    """A share as percent; anything else as it is."""
    return f"{value:.1%}" if name.startswith("share_") or name in ("fill", "flop_use") else value


def samples(lines: list[dict[str, Any]]) -> list[list[tuple[str, str, str]]]:
    """For each question its turns, and its first and last answer: name, words, and ``asked`` for a question."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_prompt.setdefault(line["prompt"], []).append(line)
    found = []
    for prompt, answers in by_prompt.items():
        rows = [(role or "prompt", words, "asked" if role == "user" else "") for role, words in chat_turns(prompt)]
        shown = (answers[0], answers[-1])[: len(answers)]
        rows += [(f"answer at step {one['step']:,}", one["answer"], "") for one in shown]
        if answers[-1]["wanted"]:
            rows.append(("in the data", answers[-1]["wanted"], ""))
        found.append(rows)
    return found


def verdict(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Whether the merged model answers as trained; None where it was not measured."""
    found = summary["verdict"]
    if not found:
        return None
    chosen = summary["config"].get("export", {}).get("merge_base") or next(iter(found["merges"]))
    chosen = found["best"] if chosen == "auto" else chosen
    adapter = {"name": "adapter on its base", "loss": f"{found['adapter_loss']:.4f}", "kl": "", "same_top": ""}
    merges = [
        {
            "name": f"merge, {name}",
            "loss": f"{one['loss']:.4f}",
            "kl": f"{one['kl']:.5f}",
            "same_top": f"{one['same_top']:.2%}",
            "chosen": name == chosen,
        }
        for name, one in found["merges"].items()
    ]
    return {
        "about": f"{found['rows']} {found['kind']} rows, {found['tokens']:,} tokens",
        "rows": [adapter | {"chosen": False}, *merges],
    }


def times(summary: dict[str, Any]) -> dict[str, Any]:
    """When it was, and which steps stand out."""
    best, made = summary["best"], summary["exported"]
    shown = {
        "resumed at step": ", ".join(f"{step:,}" for step in summary["resumed_at"]) or "never",
        "started": summary["started"],
        "ended": summary["ended"],
        "this command": duration(summary["duration_seconds"]),
        "training": duration(summary["trained_seconds"]),
    }
    if best:
        shown["best step"] = f"{best['step']:,}, validation loss {best['val_loss']:.4f}"
    if made:
        shown["exported"] = f"step {made['step']:,}, the {made['checkpoint']}"
    return shown


def machine(summary: dict[str, Any]) -> dict[str, Any]:
    """Devices, libraries and the commit."""
    hardware = summary["hardware"]
    shown = {"device": f"{hardware['count']} × {hardware['name']}"}
    if "memory_gib" in hardware:
        shown["memory of a device"] = f"{hardware['memory_gib']:.1f} GiB"
    if "driver" in hardware:
        shown["driver"] = hardware["driver"]
    if "git" in summary:
        shown["git commit"] = summary["git"]["commit"] + " and changes" * summary["git"]["dirty"]
    return shown | {name: value for name, value in summary["versions"].items() if value}
