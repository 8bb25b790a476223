"""Datasets as peers name them: a file, a folder, or a name of a hub with its subset and split."""

import re
from pathlib import Path
from typing import Any

from qwen_lit.convert.draft import Draft
from qwen_lit.convert.values import is_nothing, listed

LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Names of datasets' own loaders, whose files stand elsewhere."""
FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".md", ".gz", ".zst")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(name: str) -> bool:
    """Whether it can only be the name of a model or a dataset on a hub."""
    return bool(HUB_NAME.fullmatch(name)) and not name.endswith(FILES) and not Path(name).exists()


def named_sources(draft: Draft, where: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The items of ``data.dataset_path`` for one dataset.

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
        return [{"path": (folder / str(one)).as_posix() if folder else str(one)} for one in files]
    chosen = {key: str(entry[key]) for key in ("name", "split") if not is_nothing(entry.get(key))}
    if chosen.get("split") == "train":
        del chosen["split"]
    if is_hub_name(path):
        return [{"path": path, **chosen}]
    for key, value in chosen.items():
        draft.note(f"{where}: {key} {value} is chosen of datasets on a hub alone; all its rows are taken")
    return [{"path": path}]


def with_columns(items: list[dict[str, Any]], columns: dict[str, str]) -> list[dict[str, Any]]:
    """The items, each with the columns that are not found by themselves: our name to the file's."""
    return [{**one, "columns": dict(columns)} if columns else one for one in items]
