"""Files to raw rows: JSON lines (plain, gzip, zstd), JSON arrays and Parquet, read in bounded memory."""

import glob
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen_lit.data.records import DataError

BOM = b"\xef\xbb\xbf"
CHUNK_BYTES, CHUNK_ROWS = 500_000, 1000


@dataclass
class Source:
    """One of several datasets."""

    path: str
    """File, folder or glob: JSONL (also .gz, .zst), a JSON array or Parquet."""
    weight: float = 1.0
    """How often each row is trained in an epoch: 2 is twice, 0.5 is half of the rows, chosen by content."""
    max_rows: int | None = None
    """Most rows taken, chosen by content; null takes all."""


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in the file."""

    source: str
    """``path:line``."""
    content: Any
    """Bytes of a line, or an object that the file format has parsed already."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file, cheap to hand to another process."""

    path: str
    content: bytes | list[RawRow]
    """Whole lines, or rows that the file format has parsed already."""
    first: int = 1
    """The number of the first line."""

    def rows(self) -> list[RawRow]:
        """Its rows; blank lines are none."""
        if isinstance(self.content, list):
            return self.content
        lines = enumerate(self.content.split(b"\n"), self.first)
        return [RawRow(f"{self.path}:{number}", line.rstrip(b"\r")) for number, line in lines if line.strip()]


def as_sources(dataset_path: str | Sequence[str | Source]) -> list[Source]:
    """A path, a list of paths or of sources, as sources."""
    given = [dataset_path] if isinstance(dataset_path, str) else dataset_path
    return [Source(one) if isinstance(one, str) else one for one in given]


def expand(source: Source) -> list[Path]:
    """The files of a source, in order.

    Raises:
        DataError: its path matches no file.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        return [path]
    pattern = str(path / "*") if path.is_dir() else str(path)
    suffixes = (".jsonl", ".json", ".gz", ".zst", ".parquet")
    files = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [file for file in files if file.is_file() and (not path.is_dir() or file.suffix in suffixes)]
    if not files:
        raise DataError(f"no such dataset: {source.path}; give the path of a JSONL file.")
    return files


def digest(path: Path) -> str:
    """SHA-256 of the file's contents, in hex.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def read_rows(path: Path) -> Iterator[RawRow]:
    """Rows of one file in its order; raises as ``read_chunks`` does."""
    for chunk in read_chunks(path):
        yield from chunk.rows()


def read_chunks(path: Path) -> Iterator[Chunk]:
    """Rows of one file in its order, some at a time.

    Raises:
        DataError: the file cannot be read, decompressed or parsed as a whole.
    """
    try:
        if path.suffix == ".parquet":
            yield from _batched(path, _parquet(path))
            return
        with _open(path) as file:
            start = file.peek(4096)[:4096] if isinstance(file, io.BufferedReader) else b""
            if start.removeprefix(BOM).lstrip()[:1] == b"[":
                yield from _batched(path, _array(path, file.read()))
                return
            first = 1
            while block := file.read(CHUNK_BYTES):
                block += file.readline()
                yield Chunk(str(path), block.removeprefix(BOM) if first == 1 else block, first)
                first += block.count(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def _batched(path: Path, rows: Iterator[RawRow]) -> Iterator[Chunk]:
    while batch := list(itertools.islice(rows, CHUNK_ROWS)):
        yield Chunk(str(path), batch)


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: needs the zstandard package: pip install 'qwen_lit[zstd]'.") from error
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
            return io.BufferedReader(_Checked(reader, path))
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: is not zstd data ({error}).") from error
    return path.open("rb")


class _Checked(io.RawIOBase):
    """A zstd stream whose faults are ``OSError``, as those of every other file."""

    def __init__(self, inner: Any, path: Path) -> None:
        self.inner, self.path = inner, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            data = self.inner.read(len(buffer))
        except zstandard.ZstdError as error:
            raise OSError(f"damaged zstd data: {error}") from error
        buffer[: len(data)] = data
        return len(data)


def _array(path: Path, raw: bytes) -> Iterator[RawRow]:
    try:
        text = raw.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {error.start}; save the file as UTF-8.") from error
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        if position < len(text) and text[position] == "]":
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: the JSON array breaks off ({error}).") from error
        yield RawRow(f"{path}:{line}", row)


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(f"{path}:{number}", _without_none(row))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not Parquet that can be read ({error}).") from error


def _without_none(value: Any) -> Any:
    """Parquet fills absent fields of nested rows with null; the row means that they are absent."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
