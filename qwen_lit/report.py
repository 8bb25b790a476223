"""The run as one page that needs nothing else: curves, samples before and after, data, verdict, configuration."""

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from qwen_lit.lines import chat_turns, duration, start_lines
from qwen_lit.names import hub_name
from qwen_lit.page import cards, document, facts, grid, text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 480, 230, 66, 30, 12
STYLE = """
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:.8rem}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:14px;font-variant-numeric:tabular-nums}
.rule{stroke:var(--line)}.one{stroke:var(--one);fill:none;stroke-width:1.8}
.two{stroke:var(--two);fill:none;stroke-width:1.8}.dot.one{fill:var(--one)}.dot.two{fill:var(--two)}
@media(max-width:36rem){svg text{font-size:17px}}
.best{fill:none;stroke:var(--good);stroke-width:2}
.key{font-weight:400;color:var(--soft);margin-left:.8rem;white-space:nowrap}
.key i{display:inline-block;width:.9rem;height:.2rem;vertical-align:middle;margin-right:.3rem}
.chosen th,.chosen td{color:var(--good);font-weight:600}
.sample{margin:0 0 .8rem}.sample dt{color:var(--soft);font-size:.85rem}
.sample dd{margin:0 0 .5rem;white-space:pre-wrap;overflow-wrap:anywhere}.sample dd:last-child{margin:0}
.sample .asked{font-weight:600}
"""


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
    told = [
        f"{day:%Y-%m-%d %H:%M}",
        f"took {duration(summary['trained_seconds'])} of training",
        f"{hardware['count']}\u00a0×\u00a0{hardware['name']}",
        out,
    ]
    lines = start_lines(run, out)
    parts = [
        f"<h1>{text(Path(out).name)}: {text(model)}</h1><p class=soft>{text(' · '.join(told))}</p>",
        f"<p class=soft>{text(lines['trained'])}</p>",
        cards(figures(summary)),
        "<h2>Curves</h2><div class=curves>" + "".join(one for one in curves if one) + "</div>",
        samples(summary["samples"]),
        verdict(summary),
        not_exported(summary["export"]),
        "<h2>Data</h2>" + facts({name.replace("_", " "): percent(name, one) for name, one in summary["data"].items()}),
        "<h2>Run</h2>" + facts({**lines, **times(summary)}),
        "<h2>Throughput</h2>"
        + facts({name.replace("_", " "): percent(name, one) for name, one in summary["throughput"].items()}),
        "<h2>Machine and versions</h2>" + facts(machine(summary)),
        "<h2>Configuration</h2><details><summary>all of it</summary>"
        f"<pre>{text(_yaml(summary['config']))}</pre></details>",
    ]
    return document(f"{Path(out).name}: training report, {day:%Y-%m-%d}", "".join(parts), STYLE)


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
        keys += f'<span class=key><i style="background:var(--{colour})"></i>{text(name)}</span>' if name else ""
    if best and first <= best["step"] <= last and low <= best["val_loss"] <= high:
        drawn.append(f"<circle class=best cx={x(best['step']):.1f} cy={y(best['val_loss']):.1f} r=6 />")
        keys += f'<span class=key><i style="background:var(--good)"></i>best, step {best["step"]:,}</span>'
    return (
        f"<figure><figcaption>{text(title)}{keys}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{text(title)}">{"".join(drawn)}</svg></figure>'
    )


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


def samples(lines: list[dict[str, Any]]) -> str:
    """Each question's first and last answer."""
    if not lines:
        return ""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_prompt.setdefault(line["prompt"], []).append(line)
    boxes = []
    for prompt, answers in by_prompt.items():
        rows = [(role or "prompt", words, "asked" if role == "user" else "") for role, words in chat_turns(prompt)]
        shown = (answers[0], answers[-1])[: len(answers)]
        rows += [(f"answer at step {one['step']:,}", one["answer"], "") for one in shown]
        if answers[-1]["wanted"]:
            rows.append(("in the data", answers[-1]["wanted"], ""))
        told = "".join(f'<dt>{text(name)}<dd class="{kind}">{text(words)}</dd>' for name, words, kind in rows)
        boxes.append(f"<dl class=sample>{told}</dl>")
    return "<h2>Answers before and after</h2>" + "".join(boxes)


def verdict(summary: dict[str, Any]) -> str:
    """Whether the merged model answers as trained."""
    found = summary["verdict"]
    if not found:
        return ""
    chosen = summary["config"].get("export", {}).get("merge_base", "original")
    chosen = found["best"] if chosen == "auto" else chosen
    rows = [["adapter on its base", f"{found['adapter_loss']:.4f}", "", ""]]
    rows += [
        [f"merge, {name}", f"{one['loss']:.4f}", f"{one['kl']:.5f}", f"{one['same_top']:.2%}"]
        for name, one in found["merges"].items()
    ]
    at = 1 + list(found["merges"]).index(chosen) if chosen in found["merges"] else None
    return (
        f"<h2>Does the merged model answer as trained?</h2><p class=soft>{found['rows']} {text(found['kind'])} rows, "
        f"{found['tokens']:,} tokens; KL and the share of tokens with the same likeliest choice "
        "are from the adapter; what was exported stands out</p>" + grid(["", "loss", "KL", "same top"], rows, at)
    )


def not_exported(export: dict[str, Any]) -> str:
    """What could not be exported, and the command to try again."""
    if not export:
        return ""
    return f"<h2>Not exported</h2>{facts(export['missing'])}<p>Then: <code>{text(export['again'])}</code></p>"


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


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, allow_unicode=True, sort_keys=False))
