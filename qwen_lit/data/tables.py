"""CSV and TSV to rows: every cell stays the text that it is."""

import csv
import io
import sys
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

from qwen_lit.data.decoding import not_utf8
from qwen_lit.data.faults import DataError, RowError, snippet
from qwen_lit.data.layouts import ANSWER_WORDS, FIELDS, QUESTION_WORDS

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_table(
    path: str, file: BinaryIO, separator: str, names: Collection[str], done: Callable[[], float]
) -> Iterator[tuple[str, dict[str, str] | RowError, float]]:
    """The place of each record, ``path:line`` of its first line, its row, and the share of the file up to it.

    A cell that is empty is absent from its row. Nothing is taken for a number, a date or a missing value.

    Args:
        path: of the file, as messages name it.
        file: its bytes.
        separator: of the cells.
        names: of columns that the configuration maps.
        done: tells the share that has been read.

    Raises:
        DataError: the file is not UTF-8, a quotation does not end, or its first line does not name the columns.
    """
    csv.field_size_limit(sys.maxsize)
    # A byte that is no UTF-8 is one of its own until it is known in which line it stands.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(text, delimiter=separator, strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            cells = next(records)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(f"{path}:{line}: cannot be read as a record ({error}); close its quotation.") from error
        first, line = line, records.line_num + 1
        if not all(map(_is_utf8, cells)):
            raw = separator.join(cells).encode("utf-8", "surrogateescape")
            raise not_utf8(path, raw, f"in line {first}", spreadsheet=True)
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            _check_header(path, header, separator, names)
        elif len(cells) != len(header):
            counts = f"has {len(cells)} cells, and the header {len(header)}"
            yield f"{path}:{first}", RowError("cells", f"{counts}: {snippet(separator.join(cells))}"), done()
        else:
            yield f"{path}:{first}", {key: cell for key, cell in zip(header, cells, strict=True) if cell}, done()
    if not header:
        raise DataError(f"{path}: is empty; its first line names the columns, such as instruction{separator}output.")


def _is_utf8(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_header(path: str, header: list[str], separator: str, names: Collection[str]) -> None:
    """The first line names columns of which some may be read.

    Raises:
        DataError: another separator stands in it, or it is a row.
    """
    if len(header) == 1:
        other = next((one for one in SEPARATORS if one != separator and one in header[0]), None)
        if other is not None:
            end = ".tsv" if other == "\t" else ".csv with commas"
            raise DataError(
                f"{path}: has one column, {snippet(header[0])}: its cells are separated by {SEPARATORS[other]}, not "
                f"by {SEPARATORS[separator]}; save it as {end}."
            )
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are named {twice!r}; give each a name of its own.")
    if not any(name in names or _may_be_read(name.lower()) for name in header):
        columns = ", ".join(snippet(name)[1:-1] for name in header[:5])
        raise DataError(
            f"{path}: its first line names no column that is read ({columns}); put the names of the columns there, "
            f"such as instruction{separator}output, or map yours: data.fields: {{instruction: …, output: …}}."
        )


def _may_be_read(name: str) -> bool:
    words = (*QUESTION_WORDS, *ANSWER_WORDS)
    return len(name) <= 64 and (name in FIELDS or any(word in name for word in words))
