"""Which rows an epoch takes, and which are held out for validation: by content, so that each keeps its side."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from qwen_lit.data.rows import Rows
from qwen_lit.data.sources import Source
from qwen_lit.errors import UserError

SPARES_ONE = 10
"""Distinct rows of which a share of any size holds out one at least."""


def distinct(values: np.ndarray) -> np.ndarray:
    """The values in order, each once; a sort, which takes a twentieth of ``np.unique``'s time for a million hashes."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def limit(hashes: np.ndarray, val_size: float, sources: list[Source], cache: Path) -> Any:
    """Rows whose hash is below this are held out.

    Args:
        hashes: ``[rows]`` of uint64, of what each row says.
        val_size: a share below 1, or a count of distinct rows.
        sources: of the rows; a count is kept for them.
        cache: folder in which it is kept.

    Raises:
        UserError: there are not more distinct rows than the count.
    """
    if not val_size:
        return np.uint64(0)
    each, count = distinct(hashes), int(val_size)
    if val_size < 1:
        share = np.uint64(int(val_size * 2**64))
        # A file that can spare a row has one to measure on, however small the share.
        return each[1] if len(each) >= SPARES_ONE and each[0] >= share else share
    if count >= len(each):
        raise UserError(
            f"data.val_size is {count}, but there are {len(each)} distinct rows; give a smaller count, or a share "
            "such as 0.1."
        )
    # What a count has once held out stays held out when the files grow: the limit is kept beside the rows.
    places = [
        [source.path, source.name, source.split] if source.copy else str(Path(source.path).absolute())
        for source in sources
    ]
    name = json.dumps([places, count])
    kept = cache / f"split-{hashlib.sha256(name.encode()).hexdigest()[:32]}.txt"
    if kept.is_file() and count <= (each < (found := np.uint64(int(kept.read_text())))).sum() < len(each):
        return found
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(str(each[count]))
    partial.rename(kept)
    return each[count]


def chosen(rows: Rows, sources: list[Source]) -> np.ndarray:
    """Numbers of the examples of an epoch, by each source's cap and weight."""
    of_source, hashes = rows.column("source"), rows.column("hash")
    # Other orders than the split's, so that no choice moves another.
    mixed, again = (hashes * np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9))
    taken = []
    for number, source in enumerate(sources):
        mine = np.flatnonzero(of_source == number)
        if source.max_rows is not None:
            mine = mine[np.isin(mixed[mine], distinct(mixed[mine])[: source.max_rows])]
        whole = int(source.weight)
        part = mine[again[mine] < np.uint64(int((source.weight - whole) * 2**64))]
        taken += [mine] * whole + [part]
    return np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)
