"""Files to raw rows: JSON lines, JSON arrays, CSV, Parquet and raw text, also compressed, read in bounded memory."""

import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from qwen_lit.data.faults import DataError, RowError, snippet
from qwen_lit.data.kinds import (
    ROWS,
    SEPARATORS,
    TEXTS,
    is_hub_name,
    is_passed_over,
    kind_of,
    not_there,
    refuse_file,
    refuse_folder,
)
from qwen_lit.data.passages import BOM, Passage, holds_json, read_passages
from qwen_lit.data.strict import decoder
from qwen_lit.data.tables import read_table
from qwen_lit.names import expanded
from qwen_lit.progress import Progress

CHUNK_BYTES, CHUNK_ROWS = 500_000, 1000
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compressed files, and what ``pyarrow`` calls their compression."""
Value = str | int | float | bool | dict[str, str] | None
"""Of a key of a ``Source``."""


@dataclass
class Source:
    """One of several datasets."""

    path: str
    """File, folder or glob: JSONL, a JSON array, CSV, TSV, Parquet or raw text (.txt, .md), also .gz and .zst; or the
    name of a dataset of the hub, as tatsu-lab/alpaca."""
    weight: float = 1.0
    """How often each row is trained in an epoch: 2 is twice, 0.5 is half of the rows, chosen by content."""
    max_rows: int | None = None
    """Most distinct rows taken, chosen by content; null takes all. The weight applies to those that are left."""
    name: str | None = None
    """Which of the configurations of a dataset of the hub."""
    split: str | None = None
    """Which of its splits, or a part of one, as train[:1000]; null takes train, or the only one."""
    columns: dict[str, str] | None = None
    """Our field name to the columns' of this source, beside ``data.fields``."""
    copy: str | None = None
    """The file that holds what the hub has under ``path``."""


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in the file."""

    source: str
    """``path:line``."""
    content: Any
    """Bytes of a line, or an object that the file format has parsed already."""
    opens: bool = True
    """Whether a row begins here; a large text file is read in several passages."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file, cheap to hand to another process."""

    path: str
    content: bytes | list[RawRow]
    """Whole lines, or rows that the file format has parsed already."""
    first: int = 1
    """The number of the first line."""
    share: float = 1.0
    """Share of the file that has been read at the end of this chunk."""

    def rows(self) -> list[RawRow]:
        """Its rows; blank lines are none."""
        if isinstance(self.content, list):
            return self.content
        lines = enumerate(self.content.split(b"\n"), self.first)
        rows = ((number, line.removeprefix(BOM).rstrip(b"\r")) for number, line in lines if line.strip())
        return [RawRow(f"{self.path}:{number}", line) for number, line in rows if line]


def as_sources(dataset_path: str | Sequence[str | Mapping[str, Any]]) -> list[Source]:
    """A path, or a list of paths and of ``Source`` fields, as sources.

    Raises:
        DataError: an item has an unknown key, or a value of another kind, or the list is empty.
    """
    given = [dataset_path] if isinstance(dataset_path, str) else dataset_path
    if not given:
        raise DataError("an empty list; give at least one path.")
    return [Source(one) if isinstance(one, str) else _source(one) for one in given]


def _source(item: Mapping[str, Any]) -> Source:
    text, none = "a text", type(None)
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "path": ((str,), text),
        "weight": ((int, float), "a number"),
        "max_rows": ((int, none), "a whole number or null"),
        "name": ((str, none), text),
        "split": ((str, none), text),
        "columns": ((Mapping, none), "our names with the file's, as {instruction: question, output: answer}"),
    }
    for key, value in item.items():
        if key not in kinds:
            raise DataError(f"an item has the key {key!r}; its keys are {', '.join(kinds)}.")
        if isinstance(value, bool) or not isinstance(value, kinds[key][0]):
            raise DataError(f"{item.get('path')}: {key} is {value!r}; give {kinds[key][1]}.")
    if "path" not in item:
        raise DataError(f"the item {dict(item)} has no path.")
    source = Source(**item)
    for ours, theirs in (source.columns or {}).items():
        if not isinstance(theirs, str):
            raise DataError(f"{source.path}: columns.{ours} is {theirs!r}; give the name of a column.")
    if (source.name or source.split) and not is_hub_name(source.path):
        key = "name" if source.name else "split"
        raise DataError(f"{source.path}: {key} is for datasets of the hub, and this is a path; leave it out.")
    return source


def expand(source: Source) -> list[Path]:
    """The files of a source, in order.

    Raises:
        DataError: its path matches no file, one that holds no rows, or is not one of this machine.
    """
    if source.copy is not None:
        return [Path(source.copy)]
    if re.match(r"\w[\w+.-]*://", source.path):
        raise DataError(f"{source.path} is an address, and only local files are read; download it and give its path.")
    if not source.path.strip():
        raise DataError("an empty path; give the path of a JSONL file.")
    path = Path(expanded(source.path))
    if os.path.isfile(path):
        refuse_file(path)
        return [path]
    if os.path.isdir(path):
        refuse_folder(path)
    pattern = glob.escape(str(path)) + "/*" if os.path.isdir(path) else str(path)
    files = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [file for file in files if file.is_file() and not is_passed_over(file)]
    if os.path.isdir(path):
        files = [file for file in files if file.suffix.lower() in ROWS]
    if not files and os.path.isdir(path):
        raise DataError(f"{source.path} holds no file that ends in {', '.join(ROWS)}; give the file itself.")
    if not files:
        raise not_there(source.path)
    for file in files:
        refuse_file(file)
    return files


def digest(path: Path) -> str:
    """SHA-256 of the file's contents, in hex.

    Raises:
        DataError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file, Progress(f"reading {path.name}", path.stat().st_size, "B") as progress:
            while block := file.read(2**20):
                found.update(block)
                progress.advance(len(block))
            return found.hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def read_rows(path: Path, names: Collection[str] = ()) -> Iterator[RawRow]:
    """Rows of one file in its order; takes ``names`` and raises as ``read_chunks`` does."""
    for chunk in read_chunks(path, names=names):
        yield from chunk.rows()


def read_chunks(path: Path, shown: str | None = None, names: Collection[str] = ()) -> Iterator[Chunk]:
    """Rows of one file in its order, some at a time.

    Args:
        path: of the file.
        shown: what its rows' places begin with; None is the path.
        names: of columns that the configuration maps.

    Raises:
        DataError: the file cannot be read, decompressed or parsed as a whole.
    """
    name, kind = shown or str(path), kind_of(path)
    try:
        if kind == ".parquet":
            yield from _batched(name, _parquet(path, name))
            return
        with path.open("rb") as raw, _open(path, raw) as file:
            size = max(path.stat().st_size, 1)
            start = file.peek(4096)[:4096] if isinstance(file, io.BufferedReader) else b""
            if kind in SEPARATORS:
                rows = read_table(name, file, SEPARATORS[kind], names, lambda: min(1.0, raw.tell() / size))
                yield from _batched(name, ((RawRow(place, row), share) for place, row, share in rows))
            elif kind in TEXTS and not holds_json(start):
                passages = read_passages(name, file, lambda: min(1.0, raw.tell() / size))
                made = ((RawRow(at, one, _opens(one)), share) for at, one, share in passages)
                yield from _batched(name, made, 1)
            elif start.removeprefix(BOM).lstrip()[:1] == b"[":
                yield from _batched(name, _array(name, file.read()))
            else:
                first = 1
                while block := file.read(CHUNK_BYTES):
                    block += file.readline()
                    yield Chunk(name, block, first, raw.tell() / size)
                    first += block.count(b"\n")
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error}).") from error


def _batched(path: str, rows: Iterator[tuple[RawRow, float]], count: int = CHUNK_ROWS) -> Iterator[Chunk]:
    while batch := list(itertools.islice(rows, count)):
        yield Chunk(path, [row for row, _ in batch], share=batch[-1][1])


def _opens(passage: Passage | RowError) -> bool:
    return isinstance(passage, RowError) or passage.opens


def _open(path: Path, raw: BinaryIO) -> BinaryIO:
    """The file's contents, decompressed; a compressed file that ends early or is damaged is an ``OSError``."""
    if compression := COMPRESSIONS.get(path.suffix.lower()):
        return io.BufferedReader(pyarrow.input_stream(raw, compression=compression, buffer_size=0))
    return raw


def _array(path: str, raw: bytes) -> Iterator[tuple[RawRow, float]]:
    """Each row, and the share of the file that ends with it."""
    try:
        text = raw.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {error.start}; save the file as UTF-8.") from error
    plain, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    position, line, counted, on_line, number = text.index("[") + 1, 1, 0, 0, 0

    def skip() -> str:
        """The next character that is not blank, at ``position``."""
        nonlocal position
        position = blank.match(text, position).end()  # type: ignore[union-attr]
        return text[position : position + 1]

    while (ahead := skip()) != "]":
        if number and ahead != ",":
            raise DataError(f"{path}:{line}: the JSON array breaks off (a comma or ] is missing).")
        if number:
            position += 1
            skip()
        before, line = line, line + text.count("\n", counted, position)
        counted, on_line = position, 1 if line != before else on_line + 1
        try:
            row, position = decoder.raw_decode(text, position)
        except RowError:
            # As a line of its own it is reported as one.
            end = plain.raw_decode(text, position)[1]
            row, position = text[position:end].encode(), end
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: the JSON array breaks off ({error}).") from error
        number += 1
        yield RawRow(f"{path}:{line}" + (f"[{on_line}]" if on_line > 1 else ""), row), position / len(text)
    position += 1
    if skip():
        line += text.count("\n", counted, position)
        raise DataError(f"{path}:{line}: something follows the JSON array: {snippet(text[position:])}")


def _parquet(path: Path, name: str) -> Iterator[tuple[RawRow, float]]:
    """The rows of a Parquet file, each with the share of the file that ends with it."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(f"{name}:{number}", _without_none(row)), number / file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: is not Parquet that can be read ({error}).") from error


def _without_none(value: Any) -> Any:
    """Parquet fills absent fields of nested rows with null; the row means that they are absent."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
