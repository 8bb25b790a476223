"""What the pages of a run and of an audit share: one file that loads nothing, right on a phone and in the dark."""

import html
from typing import Any

STYLE = """
:root{color-scheme:light dark;--ink:#1d2129;--soft:#59616d;--line:#e3e6ea;--card:#fff;--ground:#f6f7f9;--one:#2563eb;
--two:#c2410c;--good:#15703a;--bad:#b3261e;--mark:#c8f0cd}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a3abb6;--line:#333a44;--card:#1d2128;--ground:#14171b;
--one:#7aa7ff;--two:#ff9e64;--good:#6fdc8c;--bad:#ff8f86;--mark:#1f5a2c}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.6 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.6rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2rem 0 .8rem}p{margin:.3rem 0}.soft,p.soft{color:var(--soft);overflow-wrap:anywhere}
.good{color:var(--good)}.bad{color:var(--bad)}.verdict{font-weight:600;overflow-wrap:anywhere}
.cards{display:flex;flex-wrap:wrap;gap:.6rem;margin:1.4rem 0}
.card{flex:1 1 9.5rem;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem}
.card b{display:block;font-size:1.4rem;line-height:1.3;white-space:nowrap;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:.85rem}
.box,figure,details,.sample{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem}
.box{overflow-x:auto}figure{margin:0}figcaption{font-weight:600;margin-bottom:.4rem}
table{border-collapse:collapse;width:100%}tr:last-child>*{border-bottom:0}
td,th{padding:.35rem 1.2rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td:last-child,th:last-child{padding-right:0}th{font-weight:500;color:var(--soft)}
.facts th{width:12.5rem}.facts td{overflow-wrap:anywhere}.num{white-space:nowrap;font-variant-numeric:tabular-nums}
.grid td,.grid th{white-space:nowrap;font-variant-numeric:tabular-nums}
@media(max-width:36rem){.facts th,.facts td{display:block;width:auto;padding:.1rem 0;border:0}
.facts th{padding-top:.5rem;font-size:.85rem}.facts tr+tr th{border-top:1px solid var(--line)}}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px;margin:.6rem 0 0}
summary{cursor:pointer;overflow-wrap:anywhere}mark{background:var(--mark);color:var(--ink)}
details{margin-bottom:.8rem}
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: markup.
        style: what this page has beside ``STYLE``.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def text(value: Any) -> str:
    """Words that cannot become markup."""
    return html.escape(str(value))


def cards(shown: dict[str, str]) -> str:
    """The figures that are looked for first, by what they are."""
    boxes = "".join(
        f"<div class=card><b>{text(value)}</b><span>{text(name)}</span></div>" for name, value in shown.items()
    )
    return f"<div class=cards>{boxes}</div>"


def facts(values: dict[str, Any]) -> str:
    """Names and values, one below the other on a narrow screen."""
    rows = "".join(f"<tr><th>{text(name)}<td>{_shown(value)}" for name, value in values.items())
    return f"<div class=box><table class=facts>{rows}</table></div>"


def grid(head: list[str], rows: list[list[str]], chosen: int | None = None) -> str:
    """A table of figures that scrolls in its own box.

    Args:
        head: names of the columns.
        rows: as many cells each.
        chosen: number of the row that stands out.
    """
    first = "".join(f"<th>{text(one)}" for one in head)
    others = "".join(
        f"<tr{' class=chosen' if number == chosen else ''}><th>{text(row[0])}"
        + "".join(f"<td>{text(one)}" for one in row[1:])
        for number, row in enumerate(rows)
    )
    return f"<div class=box><table class=grid><tr>{first}{others}</table></div>"


def _shown(value: Any) -> str:
    """A value, with numbers in one piece."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | float):
        whole = isinstance(value, int) or abs(value) >= 1000
        return f"<span class=num>{value:,.0f}</span>" if whole else f"<span class=num>{value:.4g}</span>"
    return text(value)
