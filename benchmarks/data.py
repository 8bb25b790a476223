"""Speed and memory of data preparation, beside the tokenizer's bare ``encode_batch_fast`` on the same text and cores.

    python benchmarks/data.py --tokenizer FOLDER --rows ROWS.jsonl [--megabytes 40] [--many 1000000] [--json OUT]

The rows are repeated, each made distinct, up to the size asked for. Cold preparation reads, checks, renders,
tokenises, labels and writes; the bare tokenizer only tokenises the text of the same examples. The two take turns, and
the ratio of their medians counts. ``--many`` also prepares that many short rows, and reopens them.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qwen_lit.data.chatml import Encoder
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.faults import RowError
from qwen_lit.data.records import parse_line, parse_row
from qwen_lit.data.sources import read_rows


def repeated(rows: Path, out: Path, size: int) -> Path:
    """Rows of ``rows`` over and over, each with a number of its own, until ``size`` bytes."""
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    written, number = 0, 0
    with out.open("w", encoding="utf-8") as file:
        while written < size:
            row = dict(lines[number % len(lines)])
            if "instruction" in row:
                row["instruction"] = f"{number} {row['instruction']}"
            written += file.write(json.dumps(row, ensure_ascii=False) + "\n") * 2
            number += 1
    return out


def short_rows(out: Path, count: int) -> Path:
    """``count`` distinct short rows."""
    with out.open("w", encoding="utf-8") as file:
        for n in range(count):
            file.write(f'{{"instruction": "What is {n} plus {n % 97}?", "output": "It is {n + n % 97}."}}\n')
    return out


def in_new_process(function: Any, *arguments: Any) -> Any:
    """The function's result from a fresh process, so that memory peaks and warm caches are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def bare(tokenizer_path: str, path: str) -> tuple[float, int]:
    """Seconds of ``encode_batch_fast`` alone over the text of every example, and its bytes."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    encoder = Encoder(tokenizer, max_length=2048)
    rows = list(read_rows(Path(path)))
    texts: list[str] = []
    for start in range(0, len(rows), 1000):
        drafts = encoder.drafts([parse_row(parse_line(row.content), row.source) for row in rows[start : start + 1000]])
        texts += [draft.text for outcome in drafts if not isinstance(outcome, RowError) for draft in outcome]
    started = time.perf_counter()
    for start in range(0, len(texts), 1000):
        encoder.backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
    return time.perf_counter() - started, sum(len(text.encode()) for text in texts)


def cold(tokenizer_path: str, path: str, cache: str) -> tuple[float, float]:
    """Seconds of the whole preparation, and the peak memory of the process and its largest worker in MiB."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    started = time.perf_counter()
    data = QwenDataModule(path, val_size=0.01, cache_dir=cache, tokenizer=tokenizer)
    data.prepare_data()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return seconds, max(peak) / 1024


def warm(tokenizer_path: str, path: str, cache: str) -> tuple[float, float]:
    """Seconds until a prepared dataset is open, split and ready, and the peak memory in MiB."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    data = QwenDataModule(path, val_size=0.01, cache_dir=cache, tokenizer=tokenizer)
    started = time.perf_counter()
    data.setup()
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Print one table; write it as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", required=True, type=Path)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = repeated(given.rows, Path(folder) / "rows.jsonl", int(given.megabytes * 1e6))
        bares, wholes = [], []
        for turn in range(given.turns):
            seconds, size = in_new_process(bare, given.tokenizer, str(path))
            whole, peak = in_new_process(cold, given.tokenizer, str(path), f"{folder}/cache{turn}")
            bares.append(seconds)
            wholes.append(whole)
            print(
                f"turn {turn + 1}: bare {size / seconds / 1e6:.2f} MB/s, whole preparation "
                f"{size / whole / 1e6:.2f} MB/s, ratio {seconds / whole:.2f}, peak {peak:.0f} MiB"
            )
        middle = statistics.median(bares) / statistics.median(wholes)
        print(f"ratio of the medians {middle:.2f}")
        results["preparation"] = {"bare_s": bares, "whole_s": wholes, "bytes": size, "peak_mib": peak, "ratio": middle}
        for count in (10_000, given.many) if given.many else ():
            rows = short_rows(Path(folder) / f"{count}.jsonl", count)
            whole, peak = in_new_process(cold, given.tokenizer, str(rows), f"{folder}/many")
            opened, open_peak = in_new_process(warm, given.tokenizer, str(rows), f"{folder}/many")
            print(
                f"{count:,} rows: prepared in {whole:.1f} s (peak {peak:.0f} MiB), "
                f"reopened in {opened:.2f} s (peak {open_peak:.0f} MiB)"
            )
            results[f"{count} rows"] = {
                "cold_s": whole,
                "cold_peak_mib": peak,
                "warm_s": opened,
                "warm_peak_mib": open_peak,
            }
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
