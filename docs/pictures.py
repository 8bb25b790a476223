"""Pictures of real runs: python docs/pictures.py terminal --model FOLDER, or report output/NAME/report.html."""

import argparse
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from rich.cells import cell_len

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "docs" / "assets"
COLUMNS, WIDE, HIGH, PAD = 92, 9.6, 22, 18
"""Cells of a line, and in pixels the size of a cell and the margin."""
COLOURS = {"plain": "#c9d1d9", "soft": "#8b949e", "bright": "#f0f6fc", "trained": "#7ee787"}
FONT = 'ui-monospace,"Cascadia Mono",Menlo,Consolas,"DejaVu Sans Mono","Noto Sans Mono CJK SC","PingFang SC",monospace'
SHOWN = ("rows", "formats", "faulty", "dropped", "duplicates", "token ids", "tokens", "batches", "verdict")
"""Lines of the audit that are in the picture; the histogram would fill it."""
Part = tuple[str, str]
"""Text, and the name of its colour."""


def terminal(model: str) -> None:
    """``inspect`` on rows of the examples, as a terminal shows it, as SVG."""
    config, data = "configs/qwen3_8b.yaml", "[examples/novel/rows.jsonl,examples/sharegpt_wandb]"
    command = [sys.executable, "-m", "qwen_lit", "inspect", "--config", config, "--data.dataset_path", data]
    with tempfile.TemporaryDirectory() as cache:
        command += ["--rows", "8", "--model.model_name_or_path", model, "--data.cache_dir", cache]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(found.stderr)
    audit, *rows = re.split(r"\n(?=── )", found.stdout.rstrip())
    lines: list[list[Part]] = [[("$ ", "trained"), (f"qwen-lit inspect --config {config} \\", "bright")]]
    lines.append([(f"    --data.dataset_path '{data}'", "bright")])
    lines += [
        [(line, "bright" if line.startswith("verdict") else "plain")]
        for line in audit.splitlines()
        if line.startswith(SHOWN)
    ]
    for row in (rows[1], rows[-3]):
        lines += [[], *coloured(row)]
    (ASSETS / "inspect.svg").write_text(drawn(lines), encoding="utf-8")


def coloured(row: str) -> list[list[Part]]:
    """One row in lines: its place, and its text, of which that between ⟦ and ⟧ is trained."""
    place, text = row.rstrip().split("\n", 1)
    lines, trained = [[(place, "soft")]], False
    for line in text.split("\n"):
        lines.append([])
        for part in re.split("([⟦⟧])", line):
            if part in ("⟦", "⟧"):
                trained = part == "⟦"
            elif part:
                lines[-1].append((part, "trained" if trained else "plain"))
    return lines


def drawn(lines: list[list[Part]]) -> str:
    """Lines as SVG. A run of characters of one width has its place and its length, whatever the reader's font."""
    width, height = COLUMNS * WIDE + 2 * PAD, len(lines) * HIGH + 2 * PAD + 16
    texts = []
    for number, line in enumerate(lines):
        at = 0
        for text, colour in line:
            # Spaces that stand together are one to a browser.
            for run in re.findall(r"\s{2,}|^\s|\s$|(?:\S|\s(?=\S))+", text):
                for size, piece in groupby(run, key=cell_len):
                    written = "".join(piece)
                    cells = size * len(written)
                    if written.strip():
                        texts.append(
                            f'<text x="{PAD + at * WIDE:.1f}" y="{PAD + 28 + number * HIGH}" fill="{COLOURS[colour]}" '
                            f'textLength="{cells * WIDE:.1f}">{html.escape(written)}</text>'
                        )
                    at += cells
    dots = "".join(
        f'<circle cx="{22 + 18 * n}" cy="16" r="5.5" fill="{fill}"/>'
        for n, fill in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" font-family=\'{FONT}\' font-size="16">'
        f'<rect width="100%" height="100%" rx="10" fill="#0d1117"/>{dots}'
        f'<text x="{width - PAD:.0f}" y="21" fill="{COLOURS["trained"]}" text-anchor="end" font-size="13">'
        f"trained text is green</text>\n" + "\n".join(texts) + "</svg>\n"
    )


def report(page: str, browser: str) -> None:
    """``report.html`` as a browser shows it, as PNG."""
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--no-first-run",
                "--hide-scrollbars",
                "--window-size=1280,1000",
                *(f"--disable-{one}" for one in quiet),
                f"--user-data-dir={profile}",
                f"--screenshot={ASSETS / 'report.png'}",
                Path(page).resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )


def main() -> None:
    """Take one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("terminal")
    one.add_argument("--model", default="Qwen/Qwen3-8B", help="folder with tokenizer and config.json")
    two = parts.add_parser("report")
    two.add_argument("page")
    two.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    given = parser.parse_args()
    if given.part == "terminal":
        terminal(given.model)
    else:
        report(given.page, given.browser)


if __name__ == "__main__":
    main()
