"""The audit of a dataset as one page that needs nothing else."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from qwen_lit.data.audit import Audit, pieces, text_report
from qwen_lit.data.rows import Rows
from qwen_lit.page import cards, document, facts, text

LINE = "<br>"
STYLE = """
.bars{display:grid;grid-template-columns:auto 1fr auto;gap:.15rem .8rem;align-items:center}
.bars span{white-space:nowrap;text-align:right;font-variant-numeric:tabular-nums;color:var(--soft)}
.bars i{display:block;background:var(--one);height:.75rem;border-radius:2px}
.bars b{font-weight:400;white-space:nowrap;font-variant-numeric:tabular-nums}
"""


def html_report(result: Audit, rows: Rows, numbers: Iterable[int], tokenizer: Any, model: str, data: Any) -> str:
    """The audit and some rows as a page.

    Args:
        result: the audit.
        rows: of which some are shown.
        numbers: of these.
        tokenizer: that made them.
        model: whose tokenizer it is.
        data: the DataModule that was audited.
    """
    told = {f"  {fault.source}: {fault.message}" for fault in result.report.first}
    audited: dict[str, list[str]] = {}
    for line in text_report(result):
        if line.startswith("verdict"):
            continue
        if not line.startswith("  "):
            name, words = line[:16].strip(), line[16:].strip()
            # Validation files have lines of the same names.
            name = f"{name}, validation" if name in audited else name
            audited[name] = [words]
        elif not line.startswith("  ≤") and line not in told:
            audited[name].append(line.strip())
    now, files = datetime.now(), [source.path for source in (*data.sources, *data.val_sources)]
    shown = {
        "files": ", ".join(files),
        "model": model,
        "data.max_length": f"{data.max_length:,} tokens",
        **{name: LINE.join(words) for name, words in audited.items() if words != [""]},
    }
    most = max(count for _, count in result.histogram)
    bars = "".join(
        f'<span>≤ {edge:,}</span><i style="width:{100 * count / most:.2f}%"></i><b>{count:,}</b>'
        for edge, count in result.histogram
    )
    faults = "".join(f"<li>{text(fault.source)}: {text(fault.message)}" for fault in result.report.first)
    examples = []
    for number in numbers:
        place, note = rows.place(number)
        body = "".join(
            f"<mark>{text(words)}</mark>" if trained else text(words)
            for words, trained in pieces(rows, number, tokenizer)
        )
        title = text(f"{place} {note and f'({note})'}")
        examples.append(f"<details open><summary>{title}</summary><pre>{body}</pre></details>")
    names = ", ".join(Path(one).name for one in files)
    figures = {
        "rows to train on": f"{result.train:,}",
        "rows held out": f"{result.val:,}",
        "tokens": f"{result.tokens:,}",
        "of them trained": f"{result.supervised / max(1, result.tokens):.1%}",
        "optimizer steps an epoch": f"{result.steps:,}",
        "tokens in the longest row": f"{result.percentiles[100]:,}",
    }
    body = (
        f"<h1>{text(names)}: dataset audit</h1>"
        f"<p class=soft>{text(f'{now:%Y-%m-%d %H:%M} · {model} · at most {data.max_length:,} tokens a row')}</p>"
        f'<p class="verdict {"bad" if result.problems else "good"}">{text(result.verdict)}</p>'
        + cards(figures)
        + facts(shown).replace(text(LINE), LINE)
        + f'<h2>Tokens in a row</h2><div class="box bars">{bars}</div>'
        + (f"<h2>First faults</h2><ul>{faults}</ul>" if faults else "")
        + f"<h2>Rows</h2><p class=soft>Trained text is <mark>marked</mark>.</p>{''.join(examples)}"
    )
    return document(f"{names}: dataset audit, {now:%Y-%m-%d}", body, STYLE)
