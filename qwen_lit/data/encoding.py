"""Chunks of files to record batches of token ids, in as many processes as pay."""

import contextlib
import gc
import os
import sys
from collections import Counter, deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_lit.data.examples import CONVERSATION, Example, Row, RowEncoder
from qwen_lit.data.faults import Fault, RowError
from qwen_lit.data.report import TURN, Report
from qwen_lit.data.row_kinds import encoder_of, read_content, read_row
from qwen_lit.data.rows import as_batch
from qwen_lit.data.sources import Chunk, RawRow, Source, expand, read_chunks
from qwen_lit.data.workers import in_order
from qwen_lit.progress import Progress

LARGE_BYTES = 2_000_000
"""Size of the files above which more processes pay; processes that are started anew pay above 8 times this."""


@dataclass(frozen=True)
class Task:
    """All that the result depends on, besides the files' contents."""

    sources: list[Source]
    encoder: dict[str, Any]
    fields: dict[str, str]
    odd_turns: str = "error"


Encoded = tuple[Any, Report, list[str]]
"""Of one chunk: a record batch or None, its report, and the lines of ``rows.log``."""


def encoding(task: Task, tokenizer: Any, processes: int | None) -> contextlib.closing[Generator[Encoded, None, None]]:
    """A context of the task's rows, encoded, chunk by chunk in their order; whatever works on them ends with it.

    Args:
        task: what is encoded.
        tokenizer: transformers'.
        processes: that tokenise; None takes one per core for large files.
    """
    return contextlib.closing(_encoded(task, tokenizer, processes))


def _encoded(task: Task, tokenizer: Any, processes: int | None) -> Generator[Encoded, None, None]:
    # Forked workers start at once and share the tokenizer; a process that has started CUDA, which it cannot have
    # done without torch, must not be forked.
    cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
    method, least = ("spawn", 8 * LARGE_BYTES) if cuda else ("fork", LARGE_BYTES)
    count = processes or (min(16, len(os.sched_getaffinity(0))) if size(task) >= least else 1)
    worker = Worker(tokenizer, task)
    sizes: deque[float] = deque()
    with Progress("preparing rows", size(task)) as progress, contextlib.closing(_chunks(task, sizes)) as chunks:
        done = in_order(worker, chunks, count, method) if count > 1 else (worker(chunk) for chunk in chunks)
        with contextlib.closing(done) as found:
            for batch, report, lines in found:
                progress.advance(sizes.popleft(), rows=report.rows)
                yield batch, report, lines


def _chunks(task: Task, sizes: deque[float]) -> Generator[tuple[int, str, Chunk], None, None]:
    """The task's chunks, each with its source's number and path; ``sizes`` gets the bytes of its file for each."""
    for number, source in enumerate(task.sources):
        names = {*task.fields.values(), *(source.columns or {}).values()}
        for path in expand(source):
            before = 0.0
            for chunk in read_chunks(path, source.path if source.copy else None, names):
                sizes.append((chunk.share - before) * path.stat().st_size)
                before = chunk.share
                yield number, source.path, chunk


def size(task: Task) -> int:
    """Bytes of the task's files."""
    return sum(file.stat().st_size for source in task.sources for file in expand(source))


class Worker:
    """Raw rows of one source to an Arrow batch, their report and the lines of ``rows.log``."""

    def __init__(self, tokenizer: Any, task: Task) -> None:
        self.tokenizer, self.options = tokenizer, task.encoder
        # A tokenizer without a chat template is refused before any row is read.
        self.encoders: dict[str, RowEncoder[Any]] = {CONVERSATION: encoder_of(CONVERSATION, tokenizer, task.encoder)}
        self.fields: list[Mapping[str, str]] = [task.fields | (source.columns or {}) for source in task.sources]
        self.odd_turns = task.odd_turns

    def __call__(self, chunk: tuple[int, str, Chunk]) -> Encoded:
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

    def _encode(self, chunk: tuple[int, str, Chunk]) -> Encoded:
        number, name, raw = chunk[0], chunk[1], chunk[2].rows()
        count = sum(one.opens for one in raw)
        report, named = Report(rows=count, rows_per_source={name: count}), []
        wrong: dict[int, RowError] = {}
        parsed = self._parse(raw, self.fields[number], wrong)
        rows = [row for _, row in parsed]
        report.formats = dict(Counter(row.format for place, row in parsed if raw[place].opens))
        found = Counter(name for row in rows for name in row.mapped)
        report.mapped = {name: found[name] for name in self.fields[number].values()}
        report.unread = dict(Counter(name for row in rows for name in row.unread))
        taken: list[Example] = []
        changed, dropped = Counter[str](), Counter[str]()
        for (place, row), outcome in zip(parsed, self._outcomes(rows), strict=True):
            examples = [one for one in outcome if isinstance(one, Example)]
            errors = [one for one in outcome if isinstance(one, RowError)]
            fatal = next((error for error in errors if error.kind != "overlong"), None)
            if fatal is not None or not examples:
                wrong[place] = fatal or errors[0]
                continue
            # A turn with its history can be too long where others of its row are not.
            dropped.update([TURN] * len(errors))
            named += [f"{row.source}: {TURN}: {error}" for error in errors]
            report.take(examples)
            taken += examples
            notes = {note: None for example in examples if example.note for note in example.note.split("; ")}
            changed.update(notes.keys())
            if notes:
                named.append(f"{row.source}: changed: {'; '.join(notes)}")
        report.changed, report.dropped = dict(changed), dict(dropped)
        for place, fault in sorted(wrong.items()):
            source = fault.source or raw[place].source
            group = report.dropped if fault.kind == "overlong" else report.faults
            group[fault.kind] = group.get(fault.kind, 0) + 1
            named.append(f"{source}: {fault.kind}: {fault}")
            if group is report.faults and len(report.first) < 10:
                report.first.append(Fault(source, fault.kind, str(fault)))
        return (as_batch(taken, number) if taken else None), report, [line.replace("\n", "\\n") for line in named]

    def _outcomes(self, rows: list[Row]) -> list[list[Example | RowError]]:
        """For each row its examples; in the place of one that cannot be used, why."""
        found: list[list[Example | RowError]] = [[] for _ in rows]
        for kind in dict.fromkeys(row.kind for row in rows):
            if kind not in self.encoders:
                self.encoders[kind] = encoder_of(kind, self.tokenizer, self.options)
            places = [place for place, row in enumerate(rows) if row.kind == kind]
            outcomes = self.encoders[kind].encode([rows[place] for place in places])
            for place, outcome in zip(places, outcomes, strict=True):
                found[place] = outcome
        return found

    def _parse(
        self, raw: list[RawRow], fields: Mapping[str, str], wrong: dict[int, RowError]
    ) -> list[tuple[int, Row]]:
        """The rows that can be used, each with its number; what is wrong with the others."""
        parsed: list[tuple[int, Row]] = []
        for place, one in enumerate(raw):
            try:
                row = read_row(read_content(one), one.source, fields, self.odd_turns)
                # Whether its hash can be taken belongs to whether it can be used.
                row.hash  # noqa: B018
                parsed.append((place, row))
            except RowError as error:
                wrong[place] = error
        return parsed
