"""Speed and memory of data preparation, beside the tokenizer's bare ``encode_batch_fast`` on the same text and cores.

    python benchmarks/data.py --tokenizer FOLDER --rows ROWS.jsonl [--megabytes 40] [--many 1000000] [--json OUT]

The rows are repeated, each made distinct, up to the size asked for. Cold preparation reads, checks, renders,
tokenises, labels, reads back and writes; the bare tokenizer only tokenises the text of the same examples. Both take
turns, and the ratio of their medians counts. ``--text`` does so with a file of raw text. ``--many`` prepares that
many short rows with each number of ``--processes``, and reopens them. Beside the seconds stand those that
all processors spent, which a busy machine changes less, and its load.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qwen_lit.data.chatml import Encoder
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.faults import RowError
from qwen_lit.data.row_kinds import read_content, read_row
from qwen_lit.data.settings import DataSettings
from qwen_lit.data.sources import read_rows


@dataclass
class Cost:
    """What a part of the work took."""

    seconds: float
    cpu_seconds: float
    """Of this process and of those that it has started."""
    peak_mib: float
    """Of this process or of the largest that it has started, whichever is more."""

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s ({self.cpu_seconds:.1f} s of CPU, peak {self.peak_mib:.0f} MiB)"


@contextlib.contextmanager
def measured() -> Iterator[list[Cost]]:
    """A list that gets the cost of what is done within."""
    found: list[Cost] = []
    started, before = time.perf_counter(), cpu_seconds()
    yield found
    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found.append(Cost(time.perf_counter() - started, cpu_seconds() - before, max(peaks) / 1024))


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


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


def bare(tokenizer_path: str, path: str) -> tuple[Cost, int]:
    """``encode_batch_fast`` alone over the text of every example, and the bytes of the text."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    encoder = Encoder(tokenizer, max_length=2048)
    rows: list[Any] = [read_row(read_content(raw), raw.source, {}) for raw in read_rows(Path(path))]
    texts: list[str] = []
    for start in range(0, len(rows), 1000):
        drafts = encoder.drafts(rows[start : start + 1000])
        texts += [draft.text for outcome in drafts if not isinstance(outcome, RowError) for draft in outcome]
    with measured() as cost:
        for start in range(0, len(texts), 1000):
            encoder.backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
    return cost[0], sum(len(text.encode()) for text in texts)


def cold(tokenizer_path: str, path: str, cache: str, processes: int | None = None) -> Cost:
    """The whole preparation."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    data = QwenDataModule(DataSettings(path, val_size=0.01, cache_dir=cache, num_proc=processes), tokenizer)
    with measured() as cost:
        data.prepare_data()
    return cost[0]


def warm(tokenizer_path: str, path: str, cache: str) -> Cost:
    """Until a prepared dataset is open, split and ready."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    data = QwenDataModule(DataSettings(path, val_size=0.01, cache_dir=cache), tokenizer)
    with measured() as cost:
        data.setup()
    return cost[0]


def in_turns(given: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The bare tokenizer and the whole preparation of the rows, one after the other."""
    path = repeated(given.rows, Path(folder) / "rows.jsonl", int(given.megabytes * 1e6))
    bares, wholes = list[Cost](), list[Cost]()
    size = 0
    for turn in range(given.turns):
        alone, size = in_new_process(bare, given.tokenizer, str(path))
        whole = in_new_process(cold, given.tokenizer, str(path), f"{folder}/cache{turn}")
        bares.append(alone)
        wholes.append(whole)
        print(f"turn {turn + 1}: bare {alone}, whole {whole}, {size / whole.seconds / 1e6:.2f} MB/s, load {load()}")
    ratio = {
        name: statistics.median(getattr(one, name) for one in bares)
        / statistics.median(getattr(one, name) for one in wholes)
        for name in ("seconds", "cpu_seconds")
    }
    print(f"ratio of the medians {ratio['seconds']:.2f}, of CPU seconds {ratio['cpu_seconds']:.2f}")
    return {"bare": [*map(asdict, bares)], "whole": [*map(asdict, wholes)], "bytes": size, "ratio": ratio}


def many(given: argparse.Namespace, folder: str, count: int, processes: int) -> dict[str, Any]:
    """So many short rows, prepared and opened again."""
    rows, cache = short_rows(Path(folder) / f"{count}.jsonl", count), f"{folder}/many{processes}"
    whole = in_new_process(cold, given.tokenizer, str(rows), cache, processes)
    again = in_new_process(warm, given.tokenizer, str(rows), cache)
    print(f"{count:,} rows, {processes} processes: prepared in {whole}, reopened in {again}, load {load()}")
    return {"cold": asdict(whole), "warm": asdict(again)}


def load() -> str:
    """Processes that wanted a processor in the last minute, on average, and how many processors there are."""
    return f"{os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"


def main() -> int:
    """Print one table; write it as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", required=True, type=Path)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--text", type=Path, help="a file of raw text to prepare")
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.turns:
            results["preparation"] = in_turns(given, folder)
        if given.text:
            whole = in_new_process(cold, given.tokenizer, str(given.text), f"{folder}/text")
            print(f"{given.text.name}, {given.text.stat().st_size / 1e6:.1f} MB: prepared in {whole}, load {load()}")
            results["text"] = asdict(whole)
        for count in (10_000, given.many) if given.many else ():
            for processes in given.processes:
                results[f"{count} rows, {processes} processes"] = many(given, folder, count, processes)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
