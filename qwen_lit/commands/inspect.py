"""``qwen-lit inspect``: the audit of a dataset, and rows as they will be trained."""

import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_lit.data.audit import Audit, audit, find_rows, report_lines, row_outcome, spread_rows, text_report, text_row
from qwen_lit.data.audit_json import write_audit
from qwen_lit.data.audit_page import html_report
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.rows import Rows
from qwen_lit.errors import UserError

ON_THE_PAGE = 100
"""Rows that the page shows at least."""


def inspect(
    data: QwenDataModule,
    model_name: str,
    accumulate: int,
    shown: int,
    row: str | None,
    html: str | None,
    json: str | None = None,
) -> int:
    """Print the audit and some rows; returns the exit code, 1 where something is wrong with the data.

    Args:
        data: with its tokenizer; nothing of it is prepared yet.
        model_name: as the page names it.
        accumulate: micro-batches of an optimizer step.
        shown: number of rows to show.
        row: show this one instead, as path:line.
        html: also write the audit and the rows to this file.
        json: also write the audit and every row to this file, a JSON object a line.

    Raises:
        UserError: there is no such row, or a file cannot be written.
    """
    data.prepare_data(refuse_faulty=False)
    try:
        data.setup(refuse_faulty=False)
    except UserError as error:
        # Nothing is left to train on; why, is what the audit is for.
        print("\n".join([*report_lines(data.report), f"verdict         {error}"]))
        return 1
    assert data.train_rows is not None and data.val_rows is not None
    result = audit(data, accumulate)
    for line in text_report(result):
        print(line)
    rows, numbers = Rows(data.train_rows.folder), None
    if row is not None:
        rows, numbers = found(row, list(dict.fromkeys([data.train_rows.folder, data.val_rows.folder])))
    for number in spread_rows(rows, shown) if numbers is None else numbers:
        print("\n" + text_row(rows, number, data.tokenizer, sys.stdout.isatty()))
    if html is not None:
        on_page = spread_rows(rows, max(shown, ON_THE_PAGE)) if numbers is None else numbers
        write_page(Path(html), result, rows, on_page, model_name, data)
    if json is not None:
        try:
            write_audit(Path(json), result, data)
        except OSError as error:
            raise UserError(f"--json: cannot write {json} ({error.strerror or error}).") from error
    return 1 if result.problems else 0


def found(row: str, folders: list[Path]) -> tuple[Rows, list[int]]:
    """Tell what became of a row of a file; returns the prepared rows made of it, and where they stand among others.

    Args:
        row: as path:line.
        folders: of prepared rows.

    Raises:
        UserError: there is no such row.
    """
    lines = [line for folder in folders for line in row_outcome(folder, row)]
    holding = [folder for folder in folders if find_rows(Rows(folder), row)]
    if not lines and not holding:
        raise UserError(f"--row: there is no row {row}; give path:line as the audit names it.")
    print("\n" + "\n".join(lines) if lines else "", end="")
    rows = Rows(holding[0] if holding else folders[0])
    return rows, find_rows(rows, row)


def write_page(
    path: Path, result: Audit, rows: Rows, numbers: Sequence[int], model_name: str, data: QwenDataModule
) -> None:
    """The audit and the rows as a page.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page = html_report(result, rows, list(numbers), data.tokenizer, model_name, data)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: cannot write {path} ({error.strerror or error}).") from error
