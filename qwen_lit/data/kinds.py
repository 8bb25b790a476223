"""Files that are not rows: which they are, and how to make rows of them."""

import re
from pathlib import Path

from qwen_lit.data.faults import DataError

ROWS = (".jsonl", ".json", ".gz", ".zst", ".parquet")
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that stand beside rows and hold none."""
LOADED = {".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
SHEETS = (".xlsx", ".xls", ".ods")
TEXTS = (".txt", ".md", ".pdf", ".docx", ".epub", ".html")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def refuse_file(path: Path) -> None:
    """Stop at a file that holds no rows that are read.

    Raises:
        DataError: naming what to do with it.
    """
    suffix, out = path.suffix.lower(), path.with_suffix(".jsonl").name
    if path.name in METADATA:
        raise DataError(f"{path} describes a dataset and holds no rows; give the path of a JSONL file.")
    if suffix in LOADED:
        separator = ", sep='\\t'" if suffix == ".tsv" else ""
        load = f"load_dataset('{LOADED[suffix]}', data_files='{path}', split='train'{separator})"
        raise DataError(f"{path}: {suffix} is not read; make it JSONL: {_line('load_dataset', load, out)}")
    if suffix in SHEETS:
        raise DataError(f"{path}: {suffix} is not read; save the sheet as CSV, and make that JSONL.")
    if suffix in TEXTS and not _begins_with_json(path):
        raise DataError(
            f"{path}: {suffix} is raw text, which is not trained here; write questions with their answers, one JSON "
            'object a line: {"instruction": …, "output": …}.'
        )


def refuse_folder(path: Path) -> None:
    """Stop at a folder that ``datasets`` has saved.

    Raises:
        DataError: with the line that makes it JSONL.
    """
    split = ""
    if (path / "dataset_dict.json").is_file():
        split = "['train']"
    elif not (path / "state.json").is_file() or not any(path.glob("*.arrow")):
        return
    load = f"load_from_disk('{path}'){split}"
    raise DataError(
        f"{path} is a folder of datasets' save_to_disk, which is not read; make it JSONL: "
        f"{_line('load_from_disk', load, path.name + '.jsonl')}"
    )


def passed_over(folder: Path) -> list[str]:
    """Names of the files of a folder that are not read, though they might hold rows."""
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.is_file() and file.suffix.lower() in (*LOADED, *SHEETS, ".txt") and not file.name.startswith(".")
    )


def not_there(path: str) -> DataError:
    """Why nothing is at a path; a name of a hub comes with the line that saves its rows."""
    if HUB_NAME.fullmatch(path) and not path.lower().endswith(ROWS):
        load = f"load_dataset('{path}', split='train')"
        line = _line("load_dataset", load, path.partition("/")[2] + ".jsonl")
        return DataError(f"no such dataset: {path}; to save one of a hub as a file: {line}")
    return DataError(f"no such dataset: {path}; give the path of a JSONL file.")


def _line(name: str, load: str, out: str) -> str:
    return f"python -c \"from datasets import {name}; {load}.to_json('{out}', force_ascii=False)\""


def _begins_with_json(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    except OSError:
        return True  # reading it tells why
