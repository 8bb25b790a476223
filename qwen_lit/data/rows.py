"""Prepared examples on disk: an Arrow IPC file, read in place."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qwen_lit.data.examples import KINDS, NO_END, Example

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),
        "supervised": pa.int32(),
        "kind": pa.int32(),
        "prompt_end": pa.int32(),
        "end": pa.int32(),
        "thought": pa.int32(),
        "hash": pa.uint64(),
        "source": pa.int32(),
        "place": pa.string(),
        "note": pa.string(),
    }
)


def as_batch(examples: list[Example], source: int) -> pa.RecordBatch:
    """Examples as one record batch.

    Args:
        examples: of rows of one source.
        source: its number.
    """
    columns: dict[str, list[Any]] = {
        "input_ids": [one.input_ids for one in examples],
        "spans": [[place for span in one.spans for place in span] for one in examples],
        "supervised": [sum(end - begin for begin, end in one.spans) for one in examples],
        "kind": [KINDS.index(one.kind) for one in examples],
        "prompt_end": [one.prompt_end for one in examples],
        "end": [one.end for one in examples],
        "thought": [int(one.thought) for one in examples],
        "hash": [one.hash for one in examples],
        "source": [source] * len(examples),
        "place": [one.source for one in examples],
        "note": [one.note for one in examples],
    }
    return pa.record_batch([_column(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def numbers(array: pa.Array) -> np.ndarray:
    """The numbers of a column without nulls, in place; ``to_numpy`` imports pandas, 0.3 s at each start."""
    return np.from_dlpack(array)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """What ``pa.array`` makes of the values; that imports pandas too, in each process that encodes."""
    if kind == pa.string():
        raw = [value.encode() for value in values]
        return pa.Array.from_buffers(kind, len(raw), [None, _offsets(raw), pa.py_buffer(b"".join(raw))])
    if pa.types.is_list(kind):
        flat = _column(list(itertools.chain.from_iterable(values)), kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [None, _offsets(values)], children=[flat])
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, str(kind)))])


def _offsets(values: list[Any]) -> pa.Buffer:
    return pa.py_buffer(np.cumsum([0, *map(len, values)], dtype=np.int32))


class Rows:
    """Prepared examples of a folder, read in place from disk; pickled as its path and the chosen numbers."""

    def __init__(self, folder: Path, chosen: np.ndarray | None = None) -> None:
        """Opens the folder.

        Args:
            folder: as ``prepare`` returns it.
            chosen: int64 ``[n]``, numbers of the examples to show, in order; None shows all.
        """
        self.folder = folder
        source = pa.memory_map(str(folder / "rows.arrow"))
        reader = pa.ipc.open_file(source)
        self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.starts = np.cumsum([0, *(len(batch) for batch in self.batches)])
        self.chosen = np.arange(self.starts[-1]) if chosen is None else chosen

    def __reduce__(self) -> Any:
        return Rows, (self.folder, self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers for the chosen examples; ``length`` is tokens of each."""
        if name == "length":
            parts = [np.diff(numbers(batch.column("input_ids").offsets)) for batch in self.batches]
        else:
            parts = [numbers(batch.column(name)) for batch in self.batches]
        return np.concatenate(parts)[self.chosen] if parts else np.zeros(0, dtype=np.int64)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 ``[t]`` and trained ranges int32 ``[k, 2]`` of one example."""
        batch, row = self._find(number)
        ids = numbers(batch.column("input_ids")[row].values)
        return ids, numbers(batch.column("spans")[row].values).reshape(-1, 2)

    def place(self, number: int) -> tuple[str, str]:
        """``path:line`` of one example, and what was changed in it."""
        batch, row = self._find(number)
        return batch.column("place")[row].as_py(), batch.column("note")[row].as_py()

    def prompt(self, number: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of one example, int32: those of its prompt, and of what is taught to follow it.

        Args:
            number: of the example.
            most: tokens that follow where the example does not say where the model is to stop.
        """
        batch, row = self._find(number)
        ids, begin = numbers(batch.column("input_ids")[row].values), batch.column("prompt_end")[row].as_py()
        ends = batch.column("end")[row].as_py() != NO_END
        return ids[:begin], ids[begin : batch.column("spans")[row].values[-1].as_py() if ends else begin + most]

    def of_kind(self, kind: str) -> np.ndarray:
        """Whether each chosen example is of a kind of ``examples.KINDS``, bool ``[n]``."""
        return self.column("kind") == KINDS.index(kind)

    def that_end(self) -> "Rows":
        """The examples after which the model is taught to stop."""
        return Rows(self.folder, self.chosen[self.column("end") != NO_END])

    def _find(self, number: int) -> tuple[Any, int]:
        at = int(self.chosen[number])
        index = int(np.searchsorted(self.starts, at, "right")) - 1
        return self.batches[index], at - int(self.starts[index])
