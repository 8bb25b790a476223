"""Every row of a prepared dataset beside what the exported tokenizer makes of it by itself, token for token."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from qwen_lit.data.difference import difference
from qwen_lit.data.prepare import PROVED, Task, cache_key, encoded
from qwen_lit.data.records import DataError
from qwen_lit.data.rows import Rows


def prove(task: Task, tokenizer: Any, folder: Path, processes: int | None = None) -> None:
    """Compare all rows, once for a folder; small datasets have been compared while they were prepared.

    The rows stream: memory holds a few chunks of the files, whatever their size.

    Args:
        task: what the folder was prepared from.
        tokenizer: transformers'.
        folder: as ``prepare`` returned it.
        processes: as for ``prepare``.

    Raises:
        DataError: naming the first row that differs, with the difference; or the files have changed since they were
            prepared, or cannot be read.
    """
    if (folder / PROVED).is_file():
        return
    try:
        _compare(task, tokenizer, folder, processes)
    except DataError as error:
        if _changed(task, tokenizer, folder):
            names = ", ".join(source.path for source in task.sources)
            raise DataError(
                f"{names}: changed since its rows were prepared, so they cannot be compared with the tokenizer's own "
                "token ids; put the file back, or begin anew with the changed one."
            ) from error
        raise
    # Where nobody can write, each run compares for itself.
    with contextlib.suppress(OSError):
        (folder / PROVED).touch()


def _compare(task: Task, tokenizer: Any, folder: Path, processes: int | None) -> None:
    try:
        stored = Rows(folder).batches
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder}: the prepared rows cannot be read ({error}); delete it and run again.") from error
    # Without the faster encoder each row is compared with ``apply_chat_template`` by the process that encodes it.
    batches = (batch for batch, _, _ in encoded(task, tokenizer, processes, None) if batch is not None)
    for kept, own in itertools.zip_longest(stored, batches):
        if kept is None or own is None or not kept.equals(own):
            raise DataError(_told(_rows(kept), _rows(own), tokenizer, folder))


def _changed(task: Task, tokenizer: Any, folder: Path) -> bool:
    try:
        return cache_key(task, tokenizer) != folder.name
    except DataError:
        return True


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    return (batch.slice(row, 1).to_pylist()[0] for row in range(len(batch) if batch is not None else 0))


def _told(stored: Iterator[dict[str, Any]], own: Iterator[dict[str, Any]], tokenizer: Any, folder: Path) -> str:
    """The first row that differs, and how.

    Args:
        stored: prepared rows.
        own: the same by the tokenizer alone.
        tokenizer: transformers'.
        folder: of the prepared rows.
    """
    kept, wanted = next(pair for pair in itertools.zip_longest(stored, own) if pair[0] != pair[1])
    if kept is None or wanted is None:
        lines = [f"the row is {'missing from' if kept is None else 'only in'} the prepared ones"]
    else:
        backend = tokenizer.backend_tokenizer
        lines = difference(kept, wanted, lambda ids: backend.decode(ids, skip_special_tokens=False))
    shown = "".join(f"\n  {line}" for line in lines)
    return (
        f"{(wanted or kept)['place']}: the prepared token ids differ from the exported tokenizer's own:{shown}\n"
        f"Delete {folder} and begin anew, with another output_dir where a run has trained on it; report this."
    )
