"""The numbers of a GGUF file's tensors, out of a model's safetensors, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from qwen_lit.export.folder import BaseModel, ExportError
from qwen_lit.families.gguf import GgufTensor, Runs

MOST_NUMBERS = 2**24
"""In float32 at a time."""


@dataclass(frozen=True)
class Matrices:
    """A tensor of a GGUF file as matrices of the same size, such as experts; a vector is one of one column."""

    base: BaseModel
    tensor: GgufTensor
    shape: list[int]
    """In the GGUF file, in numpy's order."""
    rows: Runs
    """Of each matrix, in the file's order."""

    @property
    def columns(self) -> int:
        """Of a matrix."""
        return 1 if len(self.shape) == 1 else self.shape[-1]

    def each(self) -> Iterator[list[torch.Tensor]]:
        """Of each matrix, the tensors whose rows, one after the other, are its rows, as the files have them."""
        names, count = self.tensor.sources, self.tensor.count
        if len(names) == 1:
            # Mapped once, not once an expert.
            whole = self.base.get(names[0])
            yield from ([one] for one in (whole if count > 1 else [whole.reshape(len(whole), -1)]))
            return
        size = len(names) // count
        for start in range(0, len(names), size):
            yield [self.base.get(name) for name in names[start : start + size]]

    def __iter__(self) -> Iterator[np.ndarray]:
        """All rows in the file's order, float32 [n, columns]; a vector as [1, n]."""
        most = max(1, MOST_NUMBERS // self.columns)
        for parts in self.each():
            for runs in cut(self.rows, most):
                found = torch.cat([piece for run in runs for piece in rows_of(parts, run)])
                if self.tensor.stored.columns:
                    found = torch.cat([found[:, run.start : run.stop] for run in self.tensor.stored.columns], 1)
                numbers = valued(found.to(torch.float32), self.tensor.stored.value).numpy()
                yield numbers.reshape(1, -1) if len(self.shape) == 1 else numbers


def matrices(base: BaseModel, tensor: GgufTensor) -> Matrices:
    """A tensor of a GGUF file of a model, and its shape.

    Args:
        base: the model's files.
        tensor: what it takes from them.

    Raises:
        ExportError: the files lack a part of it, or have it in another shape than the model's config says.
    """
    for name in tensor.sources:
        if name not in base.where:
            raise ExportError(f"{name} is not in the model's files; {tensor.name} is made of it")
    shapes = [base.where[name][2] for name in tensor.sources]
    rows = sum(shape[-2 if len(shape) == 3 and tensor.count > 1 else 0] for shape in shapes)
    if len(shapes) > 1:
        rows //= tensor.count
    columns = shapes[0][-1] if len(shapes[0]) > 1 else 1
    stored = tensor.stored
    for runs, there in ((stored.rows, rows), (stored.columns, columns)):
        if runs and max(run.stop for run in runs) > there:
            raise ExportError(f"{tensor.sources[0]} has shape {shapes[0]}, which is not what its config.json says")
    taken = stored.rows or (range(rows),)
    shape = [sum(len(run) for run in taken)]
    if len(shapes[0]) > 1:
        shape = [*([tensor.count] if tensor.count > 1 else []), *shape, columns]
    return Matrices(base, tensor, shape, taken)


def cut(runs: Runs, most: int) -> Iterator[list[range]]:
    """Runs of rows in groups of at most ``most`` rows."""
    group: list[range] = []
    room = most
    for run in runs:
        while len(run) > room:
            yield [*group, run[:room]]
            group, run, room = [], run[room:], most
        if run:
            group.append(run)
            room -= len(run)
    if group:
        yield group


def rows_of(parts: list[torch.Tensor], run: range) -> Iterator[torch.Tensor]:
    """A run of the rows of tensors that lie one after the other."""
    start = 0
    for part in parts:
        first, last = max(run.start, start), min(run.stop, start + len(part))
        if first < last:
            yield part[first - start : last - start]
        start += len(part)


def valued(numbers: torch.Tensor, value: str) -> torch.Tensor:
    """Numbers of a parameter as llama.cpp takes them, see ``Stored.value``."""
    if value == "plus one":
        return numbers + 1
    return -numbers.exp() if value == "minus exp" else numbers
