"""Files to tokenised rows on disk: once for each content, tokenizer, template and set of options."""

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from qwen_lit.data.encoding import Task, encoding
from qwen_lit.data.faults import DataError, Fault
from qwen_lit.data.report import Report
from qwen_lit.data.rows import SCHEMA
from qwen_lit.data.sources import digest, expand

log = logging.getLogger(__name__)
VERSION = 7


def cache_key(task: Task, tokenizer: Any) -> str:
    """A name for the result: it changes with the files' contents, the tokenizer, its template and every option.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    parts: list[Any] = [VERSION, task.encoder, task.fields, task.odd_turns]
    for source in task.sources:
        parts.append([source.path, source.columns, [[str(file), digest(file)] for file in expand(source)]])
    parts += [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, sorted(tokenizer.all_special_tokens)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def prepare(task: Task, tokenizer: Any, cache: Path, processes: int | None = None) -> Path:
    """Tokenise every row of the task's sources into ``cache/KEY``, unless it is there already.

    Returns:
        The folder: ``rows.arrow`` (an Arrow IPC file), ``report.json`` and ``rows.log`` (a line for each row that
        was left out or changed).

    Raises:
        DataError: a file cannot be read. Faulty rows are counted in the report; see ``raise_if_too_many_faults``.
    """
    key = cache_key(task, tokenizer)
    folder = cache / key
    if (folder / "report.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{key}.lock"):
        if (folder / "report.json").is_file():
            return folder
        partial = cache / f"{key}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            report = _write(task, tokenizer, partial, processes)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def read_report(folder: Path) -> Report:
    """The report of a prepared folder."""
    raw = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Report(**{**raw, "first": [Fault(**fault) for fault in raw["first"]]})


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process prepares; others of the same machine wait for it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process prepares the same rows; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def raise_if_too_many_faults(report: Report, on_bad_row: str, max_bad_share: float) -> None:
    """Stop when there are more faulty rows than the configuration allows.

    Args:
        report: of the whole preparation.
        on_bad_row: ``error`` allows none, ``skip`` a share of ``max_bad_share``.
        max_bad_share: between 0 and 1.

    Raises:
        DataError: naming the first ten and the counts by kind.
    """
    bad = sum(report.faults.values())
    if not bad:
        return
    # A large text file is one row, and each of its passages can be faulty.
    rows = max(report.rows, report.taken + bad)
    counts = ", ".join(f"{kind}: {count}" for kind, count in Counter(report.faults).most_common())
    lines = "\n".join(f"  {fault.source}: {fault.message}" for fault in report.first)
    text = f"{bad} of {rows} rows are faulty ({counts}):\n{lines}"
    if bad > len(report.first):
        text += f"\n  … and {bad - len(report.first)} more"
    if on_bad_row == "error":
        raise DataError(f"{text}\nFix them, or set data.on_bad_row: skip.")
    if bad > max_bad_share * rows:
        raise DataError(f"{text}\nThat is more than data.max_bad_share {max_bad_share}; fix them, or raise the share.")


def _write(task: Task, tokenizer: Any, folder: Path, processes: int | None) -> Report:
    report = Report()
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        with (folder / "rows.log").open("w", encoding="utf-8", errors="backslashreplace") as lines:
            with encoding(task, tokenizer, processes) as chunks:
                for batch, part, named in chunks:
                    if batch is not None:
                        writer.write_batch(batch)
                    lines.writelines(line + "\n" for line in named)
                    report.add(part)
    return report
