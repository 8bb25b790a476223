"""Files to tokenised rows on disk: once for each content, tokenizer, template and set of options."""

import contextlib
import fcntl
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from qwen_lit.data.chatml import Encoder, Example
from qwen_lit.data.fast import FastDiffers, FastEncoder
from qwen_lit.data.faults import DataError, Fault, RowError
from qwen_lit.data.records import Conversation, parse_line, parse_row
from qwen_lit.data.rows import SCHEMA, as_batch
from qwen_lit.data.sources import Chunk, RawRow, Source, digest, expand, read_chunks

log = logging.getLogger(__name__)
VERSION = 2
LARGE_BYTES = 2_000_000
"""Size of the files above which a faster encoder and more processes pay; started processes pay above 8 times this."""
PROVED = "proved"
"""The name of the file that stands in a prepared folder once every row has been compared token for token."""
EXACT_EVERY = 64
"""Of so many examples of a large dataset one is compared as each of a small one is; see ``fast`` for why it may be."""


@dataclass
class Report:
    """What became of every row."""

    rows: int = 0
    rows_per_source: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    """Rows that cannot be used, by kind."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Good rows that are too long to train, by kind."""
    changed: dict[str, int] = field(default_factory=dict)
    """Examples that differ from their row, by what was done."""
    first: list[Fault] = field(default_factory=list)
    """The first faults, in the order of the files."""
    examples: int = 0

    def add(self, other: "Report") -> None:
        """Take in the counts of a later chunk."""
        self.rows += other.rows
        self.examples += other.examples
        for name in ("rows_per_source", "formats", "faults", "dropped", "changed"):
            mine = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + count
        self.first += other.first[: max(0, 10 - len(self.first))]


@dataclass(frozen=True)
class Task:
    """All that the result depends on, besides the files' contents."""

    sources: list[Source]
    encoder: dict[str, Any]
    fields: dict[str, str]


def cache_key(task: Task, tokenizer: Any) -> str:
    """A name for the result: it changes with the files' contents, the tokenizer, its template and every option.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    parts: list[Any] = [VERSION, task.encoder, task.fields]
    for source in task.sources:
        parts.append([source.path, [[str(file), digest(file)] for file in expand(source)]])
    parts += [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, sorted(tokenizer.all_special_tokens)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def prepare(task: Task, tokenizer: Any, cache: Path, processes: int | None = None) -> Path:
    """Tokenise every row of the task's sources into ``cache/KEY``, unless it is there already.

    Returns:
        The folder: ``rows.arrow`` (an Arrow IPC file), ``report.json`` and ``rows.log`` (a line for each row that
        was left out or changed).

    Raises:
        DataError: a file cannot be read. Faulty rows are counted in the report; see ``judge``.
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
            fast = _fast(task, tokenizer)
            try:
                report = _write(task, tokenizer, partial, processes, fast)
            except FastDiffers as error:
                log.warning("%s: the fast tokenizer differs from the model's own, which does it all now", error)
                fast = None
                report = _write(task, tokenizer, partial, processes, fast)
            if fast is None:
                (partial / PROVED).touch()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")
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
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def judge(report: Report, on_bad_row: str, max_bad_share: float) -> None:
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
    counts = ", ".join(f"{kind}: {count}" for kind, count in Counter(report.faults).most_common())
    lines = "\n".join(f"  {fault.source}: {fault.message}" for fault in report.first)
    text = f"{bad} of {report.rows} rows are faulty ({counts}):\n{lines}"
    if bad > len(report.first):
        text += f"\n  … and {bad - len(report.first)} more"
    if on_bad_row == "error":
        raise DataError(f"{text}\nMend them, or set data.on_bad_row: skip.")
    if bad > max_bad_share * report.rows:
        raise DataError(
            f"{text}\nThat is more than data.max_bad_share {max_bad_share}; mend them, or raise the share."
        )


def _chunks(task: Task) -> Iterator[tuple[int, str, Chunk]]:
    for number, source in enumerate(task.sources):
        for path in expand(source):
            for chunk in read_chunks(path):
                yield number, source.path, chunk


def _size(task: Task) -> int:
    return sum(file.stat().st_size for source in task.sources for file in expand(source))


def _fast(task: Task, tokenizer: Any) -> FastEncoder | None:
    return FastEncoder.of(tokenizer) if _size(task) >= LARGE_BYTES else None


def _write(task: Task, tokenizer: Any, folder: Path, processes: int | None, fast: FastEncoder | None) -> Report:
    report = Report()
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        with (folder / "rows.log").open("w", encoding="utf-8", errors="backslashreplace") as lines:
            for batch, part, named in encoded(task, tokenizer, processes, fast):
                if batch is not None:
                    writer.write_batch(batch)
                lines.writelines(line + "\n" for line in named)
                report.add(part)
    return report


def encoded(
    task: Task, tokenizer: Any, processes: int | None, fast: FastEncoder | None
) -> Iterator[tuple[Any, Report, list[str]]]:
    """Chunk by chunk, in order: a record batch or None, its report, and the lines of ``rows.log``."""
    # Forked workers start at once and share the tokenizer; a process that has started CUDA, which it cannot have
    # done without torch, must not be forked.
    cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
    method, least = ("spawn", 8 * LARGE_BYTES) if cuda else ("fork", LARGE_BYTES)
    count = processes or (min(16, len(os.sched_getaffinity(0))) if _size(task) >= least else 1)
    worker = _Worker(tokenizer, task, fast)
    if count < 2:
        for chunk in _chunks(task):
            yield worker(chunk)
        return
    with ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context(method), initializer=_start, initargs=(worker,)
    ) as pool:
        waiting: deque[Future[Any]] = deque()
        for chunk in _chunks(task):
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_worker: "_Worker | None" = None


def _start(worker: "_Worker") -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = worker


def _work(chunk: tuple[int, str, Chunk]) -> tuple[Any, Report, list[str]]:
    assert _worker is not None
    return _worker(chunk)


class _Worker:
    """Raw rows of one source to an Arrow batch, their report and the lines of ``rows.log``."""

    def __init__(self, tokenizer: Any, task: Task, fast: FastEncoder | None) -> None:
        exact_every = 1 if fast is None else EXACT_EVERY
        self.encoder = Encoder(tokenizer, **task.encoder, exact_every=exact_every, fast=fast)
        self.fields: Mapping[str, str] = task.fields

    def __call__(self, chunk: tuple[int, str, Chunk]) -> tuple[Any, Report, list[str]]:
        """Encode one chunk.

        Millions of small objects come and go here without a cycle among them; the collector's walks over them would
        take a quarter of the time.
        """
        enabled = gc.isenabled()
        gc.disable()
        try:
            return self._encode(chunk)
        finally:
            if enabled:
                gc.enable()

    def _encode(self, chunk: tuple[int, str, Chunk]) -> tuple[Any, Report, list[str]]:
        number, name, rows = chunk[0], chunk[1], chunk[2].rows()
        report, named = Report(rows=len(rows), rows_per_source={name: len(rows)}), []
        wrong: dict[int, RowError] = {}
        parsed = self._parse(rows, wrong)
        report.formats = dict(Counter(conversation.format for _, conversation, _ in parsed))
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        changed, dropped = Counter[str](), Counter[str]()
        outcomes = self.encoder.encode([conversation for _, conversation, _ in parsed])
        for (place, conversation, key), outcome in zip(parsed, outcomes, strict=True):
            errors = [one for one in outcome if isinstance(one, RowError)]
            fatal = next((error for error in errors if error.kind != "overlong"), None)
            if fatal is not None or len(errors) == len(outcome):
                wrong[place] = fatal or errors[0]
                continue
            # A turn with its history can be too long where others of its row are not.
            dropped.update(["overlong turn"] * len(errors))
            named += [f"{conversation.source}: overlong turn: {error}" for error in errors]
            examples = [one for one in outcome if isinstance(one, Example)]
            for example in examples:
                columns["input_ids"].append(example.input_ids)
                columns["spans"].append([place for span in example.spans for place in span])
                columns["supervised"].append(sum(end - begin for begin, end in example.spans))
                columns["hash"].append(key)
                columns["source"].append(number)
                columns["place"].append(example.source)
                columns["note"].append(example.note)
            notes = {note: None for example in examples if example.note for note in example.note.split("; ")}
            changed.update(notes.keys())
            if notes:
                named.append(f"{conversation.source}: changed: {'; '.join(notes)}")
        report.changed, report.dropped, report.examples = dict(changed), dict(dropped), len(columns["hash"])
        for place, fault in sorted(wrong.items()):
            source = rows[place].source
            group = report.dropped if fault.kind == "overlong" else report.faults
            group[fault.kind] = group.get(fault.kind, 0) + 1
            named.append(f"{source}: {fault.kind}: {fault}")
            if group is report.faults and len(report.first) < 10:
                report.first.append(Fault(source, fault.kind, str(fault)))
        return (as_batch(columns) if report.examples else None), report, [line.replace("\n", "\\n") for line in named]

    def _parse(self, rows: list[RawRow], wrong: dict[int, RowError]) -> list[tuple[int, Conversation, int]]:
        """The rows that can be used: number, conversation and hash of each; what is wrong with the others."""
        parsed = []
        for place, row in enumerate(rows):
            try:
                content = parse_line(row.content) if isinstance(row.content, bytes) else row.content
                conversation = parse_row(content, row.source, self.fields)
                parsed.append((place, conversation, content_hash(conversation)))
            except RowError as error:
                wrong[place] = error
        return parsed


_written = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def content_hash(conversation: Conversation) -> int:
    """64 bits of what a conversation says, wherever it stands; equal for duplicates.

    Raises:
        RowError: it holds half of a surrogate pair, which no tokenizer takes, or what is not JSON.
    """
    try:
        content = unicodedata.normalize("NFC", _written([conversation.messages, conversation.tools]))
        return int.from_bytes(hashlib.blake2b(content.encode("utf-8"), digest_size=8).digest(), "big")
    except UnicodeEncodeError as error:
        raise RowError("lone surrogate", f"has half of a surrogate pair at {content[error.start]!r}.") from error
    except RecursionError as error:
        raise RowError("bad JSON", "is nested too deep.") from error
    except TypeError as error:
        raise RowError("wrong type", f"holds a value that is not JSON ({error}).") from error
