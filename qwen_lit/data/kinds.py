"""Which files hold rows, and how to make rows of those that do not."""

import os
import re
from pathlib import Path

from qwen_lit.data.faults import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXTS = (".txt", ".md")
PACKED = (".gz", ".zst")
ROWS = (".jsonl", ".json", *SEPARATORS, ".txt", *PACKED, ".parquet")
"""What is taken from a folder; a .md beside them is most likely a description."""
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that stand beside rows and hold none."""
ABOUT = re.compile(r"(?:readme|licen[cs]e|notice|requirements)\b.*", re.IGNORECASE)
"""Texts that stand beside rows and are about them."""
SHEETS = (".xlsx", ".xls", ".ods")
PAPERS = (".pdf", ".docx", ".doc", ".epub", ".mobi", ".html", ".htm", ".rtf")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case, without that of its compression."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def is_passed_over(path: Path) -> bool:
    """Whether a file of a folder or a glob is about rows."""
    return path.name in METADATA or (kind_of(path) in TEXTS and ABOUT.fullmatch(path.name) is not None)


def is_hub_name(path: str) -> bool:
    """Whether a path that is not there is the name of a dataset of the hub."""
    known = (*ROWS, *TEXTS, *SHEETS, *PAPERS, ".arrow", ".yaml")
    return HUB_NAME.fullmatch(path) is not None and not path.lower().endswith(known) and not os.path.exists(path)


def refuse_file(path: Path) -> None:
    """Stop at a file that holds no rows that are read.

    Raises:
        DataError: naming what to do with it.
    """
    suffix, out = kind_of(path), path.with_suffix(".jsonl").name
    if path.name in METADATA:
        raise DataError(f"{path} describes a dataset and holds no rows; give the path of a JSONL file.")
    if suffix == ".arrow":
        load = f"load_dataset('arrow', data_files='{path}', split='train')"
        raise DataError(f"{path}: {suffix} is not read; make it JSONL: {_line('load_dataset', load, out)}")
    if suffix in SHEETS:
        raise DataError(f"{path}: {suffix} is not read; save the sheet as 'CSV UTF-8', and give that file.")
    if suffix in PAPERS:
        raise DataError(f"{path}: {suffix} is not read; save its text as .txt in UTF-8, and give that file.")


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
        if file.is_file()
        and file.suffix.lower() in (*SHEETS, *PAPERS, ".arrow", ".md")
        and not file.name.startswith(".")
        and not is_passed_over(file)
    )


def not_there(path: str) -> DataError:
    """Why nothing is at a path."""
    return DataError(f"no such dataset: {path}; give the path of a JSONL, CSV, Parquet or .txt file.")


def _line(name: str, load: str, out: str) -> str:
    return f"python -c \"from datasets import {name}; {load}.to_json('{out}', force_ascii=False)\""
