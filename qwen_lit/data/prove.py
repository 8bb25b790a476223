"""Every row of a prepared dataset beside what the exported tokenizer makes of it by itself, token for token."""

from pathlib import Path
from typing import Any

from qwen_lit.data.prepare import PROVED, Task, encoded
from qwen_lit.data.records import DataError
from qwen_lit.data.rows import Rows


def prove(task: Task, tokenizer: Any, folder: Path, processes: int | None = None) -> None:
    """Compare all rows, once for a folder; small datasets have been compared while they were prepared.

    Args:
        task: what the folder was prepared from.
        tokenizer: transformers'.
        folder: as ``prepare`` returned it.
        processes: as for ``prepare``.

    Raises:
        DataError: naming the first row that differs.
    """
    if (folder / PROVED).is_file():
        return
    stored = Rows(folder).batches
    # Without the faster encoder each row is compared with ``apply_chat_template`` by the process that encodes it.
    batches = (batch for batch, _, _ in encoded(task, tokenizer, processes, None) if batch is not None)
    for kept, batch in zip(stored, batches, strict=True):
        if not kept.equals(batch):
            count = min(len(kept), len(batch))
            at = next((row for row in range(count) if not kept.slice(row, 1).equals(batch.slice(row, 1))), 0)
            raise DataError(
                f"{batch.column('place')[at].as_py()}: the prepared token ids differ from the exported tokenizer's "
                f"own; delete {folder} and report this."
            )
    (folder / PROVED).touch()
