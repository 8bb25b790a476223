"""The audited rows, as ``inspect --json`` has written them: searched, filtered, paged; and a row put right."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_lit.errors import UserError, shortened
from qwen_lit.studio.folders import Folders

FILTERS = ("all", "longest", "masked", "changed", "faulty")
"""What can be shown of the rows; ``faulty`` and ``changed`` are those that rows.log names."""
EDITED = ".jsonl"
"""The ending of files of which a row can be edited."""


@dataclass(frozen=True)
class Row:
    """One row as it is trained, or the reason why it is not."""

    place: str
    """``path:line``"""
    note: str
    tokens: int = 0
    trained: int = 0
    """Tokens with a loss."""
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    """Text, and whether it is trained."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class Audited:
    """An audit with its rows."""

    about: dict[str, Any]
    rows: list[Row]

    @classmethod
    def read(cls, path: Path) -> "Audited | None":
        """What ``inspect --json`` has written; None where it has written nothing, or not all yet."""
        try:
            with path.open(encoding="utf-8") as lines:
                about, *found = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return cls(about, [_row(one) for one in found])

    def chosen(self, filter: str, search: str) -> list[Row]:
        """The rows of one filter that hold a text.

        Args:
            filter: one of ``FILTERS``.
            search: a text, in letters of any case; empty finds all.
        """
        whole = [one for one in self.rows if one.pieces]
        named = [one for one in self.rows if not one.pieces]
        kept = {one.place for one in whole}
        rows = {
            "all": whole,
            "longest": sorted(whole, key=lambda row: -row.tokens),
            "masked": [one for one in whole if not one.trained],
            "changed": [one for one in whole if one.note] + [one for one in named if one.place in kept],
            "faulty": [one for one in named if one.place not in kept],
        }[filter]
        words = search.casefold()
        return [one for one in rows if words in one.text.casefold() or words in f"{one.place} {one.note}".casefold()]


def _row(line: dict[str, Any]) -> Row:
    if "pieces" not in line:
        return Row(line["place"], line["message"])
    pieces = [(str(text), bool(trained)) for text, trained in line["pieces"]]
    return Row(line["place"], line["note"], line["tokens"], line["trained"], pieces)


def source_line(folders: Folders, place: str) -> tuple[Path, int, str]:
    """The file, the number of the line from 1 on, and the line itself of a row.

    Args:
        folders: in which the file must lie.
        place: as the audit names it.

    Raises:
        UserError: there is none, or its file is not JSON lines.
    """
    path, _, number = place.rpartition(":")
    # A row of several examples has the number of the example behind that of the line.
    line = number.partition(" ")[0].partition("#")[0]
    file = folders.file(path)
    if file.suffix.lower() != EDITED or not line.isdigit():
        raise UserError(f"{shortened(place)}: only rows of a {EDITED} file can be edited here.")
    with file.open(encoding="utf-8") as lines:
        for count, text in enumerate(lines, 1):
            if count == int(line):
                return file, count, text.rstrip("\n")
    raise UserError(f"{shortened(place)}: the file has no such line.")


def save_edited(folders: Folders, place: str, text: str) -> Path:
    """A new file with one row put right; the file that it comes from stays as it is.

    Args:
        folders: in which both lie.
        place: of the row.
        text: a JSON object.

    Raises:
        UserError: it is no JSON object, or the row is not found.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError("not a row: give a JSON object.")
    source, number, _ = source_line(folders, place)
    target = folders.free_file(source.name)
    with source.open(encoding="utf-8") as lines, target.open("x", encoding="utf-8") as file:
        for count, line in enumerate(lines, 1):
            file.write(json.dumps(value, ensure_ascii=False) + "\n" if count == number else line)
    return target
