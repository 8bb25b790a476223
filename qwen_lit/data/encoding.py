"""Chunks of files to record batches of token ids, in as many processes as pay."""

import contextlib
import gc
import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter, deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_lit.data.chatml import Encoder
from qwen_lit.data.fast import FastEncoder
from qwen_lit.data.faults import Fault, RowError
from qwen_lit.data.passages import Passage
from qwen_lit.data.records import Conversation, parse_line, parse_row
from qwen_lit.data.report import TURN, Report
from qwen_lit.data.rows import SCHEMA, as_batch
from qwen_lit.data.sources import Chunk, RawRow, Source, expand, read_chunks
from qwen_lit.data.text import Block, Document, TextEncoder, read_text
from qwen_lit.data.workers import in_order
from qwen_lit.progress import Progress

LARGE_BYTES = 2_000_000
"""Size of the files above which a faster encoder and more processes pay; started processes pay above 8 times this."""
EXACT_EVERY = 64
"""Of so many examples of a large dataset one is compared as each of a small one is; see ``fast`` for why it may be."""


@dataclass(frozen=True)
class Task:
    """All that the result depends on, besides the files' contents."""

    sources: list[Source]
    encoder: dict[str, Any]
    fields: dict[str, str]
    odd_turns: str = "error"


Encoded = tuple[Any, Report, list[str]]
"""Of one chunk: a record batch or None, its report, and the lines of ``rows.log``."""


def encoding(
    task: Task, tokenizer: Any, processes: int | None, fast: FastEncoder | None, what: str
) -> contextlib.closing[Generator[Encoded, None, None]]:
    """A context of the task's rows, encoded, chunk by chunk in their order; whatever works on them ends with it.

    Args:
        task: what is encoded.
        tokenizer: transformers'.
        processes: that tokenise; None takes one per core for large files.
        fast: encodes in the place of the tokenizer.
        what: is done, for the eye.
    """
    return contextlib.closing(_encoded(task, tokenizer, processes, fast, what))


def _encoded(
    task: Task, tokenizer: Any, processes: int | None, fast: FastEncoder | None, what: str
) -> Generator[Encoded, None, None]:
    # Forked workers start at once and share the tokenizer; a process that has started CUDA, which it cannot have
    # done without torch, must not be forked.
    cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
    method, least = ("spawn", 8 * LARGE_BYTES) if cuda else ("fork", LARGE_BYTES)
    count = processes or (min(16, len(os.sched_getaffinity(0))) if size(task) >= least else 1)
    worker = Worker(tokenizer, task, fast)
    sizes: deque[float] = deque()
    with Progress(what, size(task)) as progress, contextlib.closing(_chunks(task, sizes)) as chunks:
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


def fast_encoder(task: Task, tokenizer: Any) -> FastEncoder | None:
    """What encodes a large task in the place of its tokenizer, where it is proven to be the same."""
    return FastEncoder.of(tokenizer) if size(task) >= LARGE_BYTES else None


def size(task: Task) -> int:
    """Bytes of the task's files."""
    return sum(file.stat().st_size for source in task.sources for file in expand(source))


class Worker:
    """Raw rows of one source to an Arrow batch, their report and the lines of ``rows.log``."""

    def __init__(self, tokenizer: Any, task: Task, fast: FastEncoder | None) -> None:
        self.exact_every = 1 if fast is None else EXACT_EVERY
        self.encoder = Encoder(tokenizer, **task.encoder, exact_every=self.exact_every, fast=fast)
        self.texts: TextEncoder | None = None
        """For raw text, once there is some."""
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
        number, name, rows = chunk[0], chunk[1], chunk[2].rows()
        count = sum(opens(row.content) for row in rows)
        report, named = Report(rows=count, rows_per_source={name: count}), []
        wrong: dict[int, RowError] = {}
        parsed = self._parse(rows, self.fields[number], wrong)
        report.formats = dict(Counter(one.format for _, one, _ in parsed if opens(one)))
        found = Counter(name for _, conversation, _ in parsed for name in conversation.mapped)
        report.mapped = {name: found[name] for name in self.fields[number].values()}
        report.unread = dict(Counter(name for _, conversation, _ in parsed for name in conversation.unread))
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        changed, dropped = Counter[str](), Counter[str]()
        outcomes = self._outcomes([conversation for _, conversation, _ in parsed])
        for (place, conversation, key), outcome in zip(parsed, outcomes, strict=True):
            errors = [one for one in outcome if isinstance(one, RowError)]
            fatal = next((error for error in errors if error.kind != "overlong"), None)
            if fatal is not None or len(errors) == len(outcome):
                wrong[place] = fatal or errors[0]
                continue
            # A turn with its history can be too long where others of its row are not.
            dropped.update([TURN] * len(errors))
            named += [f"{conversation.source}: {TURN}: {error}" for error in errors]
            examples = [one for one in outcome if not isinstance(one, RowError)]
            report.taken += 1
            if isinstance(conversation, Document):
                report.blocks += len(examples)
                report.texts += 1
            for example in examples:
                columns["input_ids"].append(example.input_ids)
                columns["spans"].append([place for span in example.spans for place in span])
                columns["supervised"].append(sum(end - begin for begin, end in example.spans))
                columns["hash"].append(example.hash if isinstance(example, Block) else key)
                columns["text"].append(int(isinstance(example, Block)))
                columns["source"].append(number)
                columns["place"].append(example.source)
                columns["note"].append(example.note)
            notes = {note: None for example in examples if example.note for note in example.note.split("; ")}
            changed.update(notes.keys())
            if notes:
                named.append(f"{conversation.source}: changed: {'; '.join(notes)}")
        report.changed, report.dropped, report.examples = dict(changed), dict(dropped), len(columns["hash"])
        for place, fault in sorted(wrong.items()):
            source = fault.source or rows[place].source
            group = report.dropped if fault.kind == "overlong" else report.faults
            group[fault.kind] = group.get(fault.kind, 0) + 1
            named.append(f"{source}: {fault.kind}: {fault}")
            if group is report.faults and len(report.first) < 10:
                report.first.append(Fault(source, fault.kind, str(fault)))
        return (as_batch(columns) if report.examples else None), report, [line.replace("\n", "\\n") for line in named]

    def _outcomes(self, rows: list[Conversation | Document]) -> list[Any]:
        """For each row its examples or blocks; in the place of one that cannot be used, why."""
        chats = [row for row in rows if isinstance(row, Conversation)]
        encoded = self.encoder.encode(chats)
        if len(chats) == len(rows):
            return encoded
        told = iter(encoded)
        return [next(told) if isinstance(row, Conversation) else self._blocks(row) for row in rows]

    def _blocks(self, document: Document) -> list[Block] | list[RowError]:
        one = self.encoder
        if self.texts is None:
            self.texts = TextEncoder(
                one.tokenizer,
                max_length=one.max_length,
                control=one.control,
                control_tokens=one.control_tokens,
                exact_every=self.exact_every,
                fast=one.fast,
            )
        try:
            return self.texts.encode(document)
        except RowError as error:
            return [error]

    def _parse(
        self, rows: list[RawRow], fields: Mapping[str, str], wrong: dict[int, RowError]
    ) -> list[tuple[int, Conversation | Document, int]]:
        """The rows that can be used: number, conversation or text, and hash of each; what is wrong with the others."""
        parsed: list[tuple[int, Conversation | Document, int]] = []
        for place, row in enumerate(rows):
            try:
                content = parse_line(row.content) if isinstance(row.content, bytes) else row.content
                if isinstance(content, RowError):
                    raise content
                document = read_text(content, row.source, fields)
                if document is not None:
                    parsed.append((place, document, document.hash))
                    continue
                conversation = parse_row(content, row.source, fields, self.odd_turns)
                parsed.append((place, conversation, content_hash(conversation)))
            except RowError as error:
                wrong[place] = error
        return parsed


def opens(row: Any) -> bool:
    """Whether a row is one of its own, or the first passage of a text file that is read in several."""
    passage = row.passage if isinstance(row, Document) else row
    return not isinstance(passage, Passage) or passage.opens


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
