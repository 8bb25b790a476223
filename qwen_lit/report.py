"""The run as one page that needs nothing else: curves, samples before and after, data, verdict, configuration."""

import html
import math
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 240, 64, 32, 12
STYLE = """
:root{--ink:#1d2129;--soft:#5c6470;--line:#e3e6ea;--card:#fff;--ground:#f6f7f9;--one:#2563eb;--two:#d9480f;--good:#d8f3dc}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#9aa3af;--line:#333a44;--card:#1d2128;--ground:#14171b;
--one:#7aa7ff;--two:#ff9e64;--good:#1f4d2e}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.6 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
main{max-width:64rem;margin:0 auto;padding:2rem 1rem 4rem}h1{font-size:1.6rem;margin:0 0 .25rem}
h2{font-size:1.1rem;margin:2.2rem 0 .8rem}p{margin:.3rem 0;color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;margin:1.4rem 0}
.card,figure,details,.sample{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.9rem 1rem}
.card b{display:block;font-size:1.45rem;line-height:1.3;font-variant-numeric:tabular-nums}.card span{color:var(--soft)}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:.8rem}figure{margin:0}
figcaption{font-weight:600;margin-bottom:.4rem}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}.grid{stroke:var(--line)}
.one{stroke:var(--one);fill:none;stroke-width:1.8}.two{stroke:var(--two);fill:none;stroke-width:1.8}
.dot.one{fill:var(--one)}.dot.two{fill:var(--two)}.key{font-weight:400;color:var(--soft);margin-left:.8rem}
.key i{display:inline-block;width:.9rem;height:.2rem;vertical-align:middle;margin-right:.3rem}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .8rem .3rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}th{font-weight:500;color:var(--soft);white-space:nowrap}
tr.chosen{background:var(--good)}.sample{margin-bottom:.8rem}.sample dt{color:var(--soft);font-size:.85rem}
.sample dd{margin:0 0 .5rem;white-space:pre-wrap;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}summary{cursor:pointer}
"""


def page(summary: dict[str, Any]) -> str:
    """``report.html`` of a run.

    Args:
        summary: as ``RunReport.summary`` makes it.
    """
    run, history = summary["run"], summary["history"]
    curves = [
        chart("Loss", {"training": history.get("loss", []), "validation": history.get("val_loss", [])}),
        chart("Learning rate", {"": history.get("lr", [])}),
        chart("Tokens a second", {"": history.get("tokens_per_second", [])}),
        chart("Gradient norm", {"": history.get("grad_norm", [])}),
    ]
    parts = [
        f"<h1>{_text(run['model'].split(' (')[0])}</h1><p>{_text(run['trained'])}</p>",
        cards(summary),
        "<h2>Curves</h2><div class=curves>" + "".join(one for one in curves if one) + "</div>",
        samples(summary["samples"]),
        verdict(summary),
        not_exported(summary["export"]),
        "<h2>Data</h2>" + table(summary["data"]),
        "<h2>Run</h2>" + table({**run, "resumed at step": ", ".join(map(str, summary["resumed_at"])) or "never"}),
        "<h2>Throughput</h2>" + table({one.replace("_", " "): value for one, value in summary["throughput"].items()}),
        "<h2>Versions</h2>" + table(summary["versions"]),
        "<h2>Configuration</h2><details><summary>all of it</summary>"
        f"<pre>{_text(_yaml(summary['config']))}</pre></details>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(run['model'].split(' (')[0])}: training report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def cards(summary: dict[str, Any]) -> str:
    """The figures that are looked for first."""
    losses, speed = summary["losses"], summary["throughput"]
    shown = {"optimizer steps": f"{summary['steps']:,}"}
    if "loss" in losses:
        shown["training loss, last"] = f"{losses['loss']:.4f}"
    if "val_loss" in losses:
        shown["validation loss, last"] = f"{losses['val_loss']:.4f}"
        shown["perplexity"] = f"{math.exp(min(losses['val_loss'], 50)):.2f}"
    if "tokens_per_second" in speed:
        shown["tokens a second"] = f"{speed['tokens_per_second']:,.0f}"
    if "peak_memory_gib" in speed:
        shown["GiB of GPU memory at the peak"] = f"{speed['peak_memory_gib']:.2f}"
    if summary["stopped"]:
        shown["trained prompts that stop"] = "{} of {}".format(*summary["stopped"])
    shown["steps skipped"] = str(summary["skipped_steps"])
    boxes = "".join(
        f"<div class=card><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in shown.items()
    )
    return f"<div class=cards>{boxes}</div>"


def chart(title: str, curves: dict[str, list[list[float]]]) -> str:
    """A line chart as inline SVG; nothing for curves without points.

    Args:
        title: of the figure.
        curves: name to points ``[step, value]``, at most two curves.
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
        f'<line class=grid x1={LEFT} x2={WIDTH - 16} y1={y(t):.1f} y2={y(t):.1f} />'
        f'<text x={LEFT - 8} y={y(t) + 4:.1f} text-anchor=end>{number(t)}</text>'
        for t in ticks
    ]
    for step in sorted({first, (first + last) / 2, last}):
        drawn.append(f'<text x={x(step):.1f} y={HEIGHT - 8} text-anchor=middle>{step:,.0f}</text>')
    keys = ""
    for (name, points), colour in zip(curves.items(), ("one", "two"), strict=False):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        drawn.append(f'<polyline class={colour} points="{path}" />')
        if len(points) < 30:
            drawn += [f'<circle class="dot {colour}" cx={x(s):.1f} cy={y(v):.1f} r=2.5 />' for s, v in points]
        keys += f'<span class=key><i style="background:var(--{colour})"></i>{_text(name)}</span>' if name else ""
    return (
        f"<figure><figcaption>{_text(title)}{keys}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{_text(title)}">{"".join(drawn)}</svg></figure>'
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
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def samples(lines: list[dict[str, Any]]) -> str:
    """Each prompt's first and last answer."""
    if not lines:
        return ""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_prompt.setdefault(line["prompt"], []).append(line)
    boxes = []
    for prompt, answers in by_prompt.items():
        rows = [("prompt", prompt)]
        rows += [(f"answer at step {one['step']:,}", one["answer"]) for one in (answers[0], answers[-1])]
        if answers[-1]["wanted"]:
            rows.append(("in the data", answers[-1]["wanted"]))
        boxes.append(
            "<dl class=sample>" + "".join(f"<dt>{_text(name)}<dd>{_text(text)}</dd>" for name, text in rows) + "</dl>"
        )
    return "<h2>Answers before and after</h2>" + "".join(boxes)


def verdict(summary: dict[str, Any]) -> str:
    """Whether the merged model answers as trained."""
    found = summary["verdict"]
    if not found:
        return ""
    chosen = summary["config"].get("export", {}).get("merge_base", "original")
    chosen = found["best"] if chosen == "auto" else chosen
    rows = "".join(
        f"<tr{' class=chosen' if name == chosen else ''}><th>merge, {_text(name)}<td>{one['loss']:.4f}"
        f"<td>{one['kl']:.5f}<td>{one['same_top']:.2%}"
        for name, one in found["merges"].items()
    )
    return (
        f"<h2>Does the merged model answer as trained?</h2><p>{found['rows']} {_text(found['kind'])} rows, "
        f"{found['tokens']:,} tokens</p><table><tr><th><th>loss<th>KL from the adapter<th>same top token"
        f"<tr><th>adapter on its base<td>{found['adapter_loss']:.4f}<td><td>{rows}</table>"
    )


def not_exported(export: dict[str, Any]) -> str:
    """What could not be exported, and the command to try again."""
    if not export:
        return ""
    return f"<h2>Not exported</h2>{table(export['missing'])}<p>Once that is put right: {_text(export['again'])}</p>"


def table(values: dict[str, Any]) -> str:
    """Names and values."""
    rows = "".join(f"<tr><th>{_text(name)}<td>{_text(_shown(value))}" for name, value in values.items())
    return f"<table>{rows}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, allow_unicode=True, sort_keys=False))
