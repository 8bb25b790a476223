"""Datasets by name, as peers write them."""

from pathlib import Path
from typing import Any

from qwen_lit.convert.draft import Draft
from qwen_lit.convert.values import is_nothing, listed

LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Names of datasets' own loaders, whose files stand elsewhere."""


def named_source(draft: Draft, where: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A dataset that is a file, a folder or a name of the hub.

    Args:
        draft: takes the notes.
        where: the dataset, in a note.
        entry: with ``path``, and perhaps ``data_files``, ``name`` (the subset) and ``split``.
    """
    path, files = str(entry.get("path")), listed("data_files", entry.get("data_files"))
    if isinstance(entry.get("data_files"), dict):
        files = [one for part in entry["data_files"].values() for one in listed("data_files", part)]
    if files:
        folder = None if path in LOADERS else Path(path)
        paths = [(folder / str(one)).as_posix() if folder else str(one) for one in files]
        path = paths[0]
        for other in paths[1:]:
            draft.note(f"{where}: add {other} to data.dataset_path")
    split = entry.get("split")
    if not is_nothing(entry.get("name")):
        draft.note(f"{where}: the subset {entry['name']} is not chosen by name; save it as JSONL")
    if not is_nothing(split) and split != "train":
        draft.note(f"{where}: split {split} is not chosen by name; save it as JSONL, or set max_rows")
    return {"path": path}
