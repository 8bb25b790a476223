"""The audit of a dataset as one page that needs nothing else."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from qwen_lit.data.audit import Audit, pieces, text_report
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.rows import Rows
from qwen_lit.page import render


def html_report(
    result: Audit, rows: Rows, numbers: Iterable[int], tokenizer: Any, model: str, data: QwenDataModule
) -> str:
    """The audit and some rows as a page.

    Args:
        result: the audit.
        rows: of which some are shown.
        numbers: of these.
        tokenizer: that made them.
        model: whose tokenizer it is.
        data: the DataModule that was audited.
    """
    reported = {f"  {fault.source}: {fault.message}" for fault in result.report.first}
    audited: dict[str, list[str]] = {}
    for line in text_report(result):
        if line.startswith("verdict"):
            continue
        if not line.startswith("  "):
            name, words = line[:16].strip(), line[16:].strip()
            # Validation files have lines of the same names.
            name = f"{name}, validation" if name in audited else name
            audited[name] = [words]
        elif not line.startswith("  ≤") and line not in reported:
            audited[name].append(line.strip())
    now, files = datetime.now(), [source.path for source in (*data.sources, *data.val_sources)]
    most = max(count for _, count in result.histogram)
    names = ", ".join(Path(one).name for one in files)
    return render(
        "audit.html.jinja",
        title=f"{names}: dataset audit, {now:%Y-%m-%d}",
        heading=f"{names}: dataset audit",
        about=f"{now:%Y-%m-%d %H:%M} · {model} · at most {data.settings.max_length:,} tokens a row",
        problems=result.problems,
        verdict=result.verdict,
        figures={
            "rows to train on": f"{result.train:,}",
            "rows held out": f"{result.val:,}",
            "tokens": f"{result.tokens:,}",
            "of them trained": f"{result.supervised / max(1, result.tokens):.1%}",
            "optimizer steps an epoch": f"{result.steps:,}",
            "tokens in the longest row": f"{result.percentiles[100]:,}",
        },
        audited={
            "files": ", ".join(files),
            "model": model,
            "data.max_length": f"{data.settings.max_length:,} tokens",
            **{name: words for name, words in audited.items() if words != [""]},
        },
        bars=[
            {"edge": f"{edge:,}", "width": f"{100 * count / most:.2f}", "count": f"{count:,}"}
            for edge, count in result.histogram
        ],
        faults=result.report.first,
        rows=[_row(rows, number, tokenizer) for number in numbers],
    )


def _row(rows: Rows, number: int, tokenizer: Any) -> dict[str, Any]:
    place, note = rows.place(number)
    return {"title": f"{place} {note and f'({note})'}", "pieces": pieces(rows, number, tokenizer)}
